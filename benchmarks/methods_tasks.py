"""The tasks of ``benchmarks/methods.py``: text the project generates itself, so no data file and no network is needed.

- ``intents``: what does a customer want, six labels. Half of the messages also mention another intent, denied or long
  past ("I don't want my money back, …"), so no keyword decides.
- ``entities``: persons, places, products and dates in sentences, BIO tags. Many names are ambiguous (Georgia, May).
- ``advert``: the quickstart's record-to-text task (`ptd.quickstart.task`).

The test rows of ``intents`` and ``entities`` use sentences and words that no training row has. Development rows (for
choosing learning rates) come from the training rows' sentences and words, with seeds of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

from ptd.quickstart.task import make_task

Row = dict[str, Any]
Side = Literal[0, 1]
"""0: what training and development rows are made of; 1: what only test rows have."""

THINGS: tuple[Sequence[str], Sequence[str]] = (
    ("kettle", "lamp", "winter coat", "phone case", "office chair", "blender", "backpack", "radio", "tent", "printer"),
    ("toaster", "curtains", "running shoes", "keyboard", "bookshelf", "camera", "suitcase", "hair dryer"),
)

# Intent -> (sentences that want it, phrases that name it), each for training and for the test.
INTENTS: dict[str, tuple[tuple[Sequence[str], Sequence[str]], tuple[Sequence[str], Sequence[str]]]] = {
    "refund": (
        (
            ("Please send me my money back for the {x}.", "I would like a refund for the {x}.",
             "You charged me twice for the {x}, return the second payment.",
             "I sent the {x} back and still wait for the amount on my card.",
             "How do I get reimbursed for the {x}?", "The {x} cost less than you took; pay me the difference."),
            ("Nobody has paid me back for the {x} I returned.",
             "Can the sum for the {x} be credited to my account again?",
             "I expect compensation for what I paid for the {x}.",
             "When do I see the price of the {x} on my bank statement again?"),
        ),
        (("a refund", "my money back", "to be reimbursed"), ("compensation", "the amount credited", "repayment")),
    ),
    "track": (
        (
            ("Where is my {x}?", "The {x} should have been here on Monday.", "When will the {x} be delivered?",
             "The parcel with the {x} has not moved for a week.", "I ordered the {x} long ago and nothing has come.",
             "The tracking page of the {x} shows nothing."),
            ("Has the {x} left your warehouse yet?", "Two weeks and still no sign of the {x} at my door.",
             "Which day can I expect the courier with the {x}?",
             "The shipment of my {x} seems to be lost on its way."),
        ),
        (("the whereabouts of a parcel", "a tracking number"), ("news of the courier", "the shipping date")),
    ),
    "cancel": (
        (
            ("Please cancel my order of the {x}.", "I want to stop the order for the {x} before it ships.",
             "I changed my mind, do not send the {x}.",
             "Take the {x} off my order.", "I no longer need the {x}, please call the order off.",
             "End my subscription with the {x} today."),
            ("Withdraw my purchase of the {x}, it is not packed yet.",
             "Let us forget about the {x}, I will not take it.",
             "Kindly annul the {x} I bought this morning.",
             "The {x} was ordered by mistake, remove it from the queue."),
        ),
        (("a cancellation", "an order stopped"), ("a withdrawal of the purchase", "an annulment")),
    ),
    "keep": (
        (
            ("I decided to keep my order of the {x} after all.", "Please ignore my cancellation of the {x}.",
             "Leave the order for the {x} as it is.",
             "I still want the {x}, go on with it.", "Do not cancel the {x}, I need it.",
             "Forget what I wrote yesterday, the {x} shall be sent."),
            ("The {x} may stay on my list, I take back what I said.",
             "Kindly reinstate the {x}; my earlier note was wrong.",
             "On second thoughts I would rather have the {x} than not.",
             "Proceed with the {x} as if I had never complained."),
        ),
        (("an order kept", "everything left as it is"), ("an order reinstated", "things going on as planned")),
    ),
    "repair": (
        (
            ("The {x} stopped working after two days.", "My {x} is broken, can you fix it?",
             "A part of the {x} came off, send a spare one.",
             "The {x} makes a strange noise and gets hot.", "I need a technician to look at the {x}.",
             "How can I mend the {x} under warranty?"),
            ("The {x} is defective, who can look after it?",
             "Something inside the {x} snapped; I need a replacement piece.",
             "Since last night the {x} refuses to do anything.", "Is there a workshop that services the {x}?"),
        ),
        (("a repair", "something fixed", "a technician"), ("a workshop", "a spare piece", "a service visit")),
    ),
    "praise": (
        (
            ("The {x} is wonderful, thank you!", "I just wanted to say how happy I am with the {x}.",
             "Great service, and the {x} is perfect.",
             "My family loves the {x}.", "Best {x} I ever bought, well done.",
             "Compliments to your team, the {x} is lovely."),
            ("What a delight this {x} turned out to be.", "I could not be more pleased with the {x}.",
             "Five stars for the {x} and for your friendly people.", "The {x} exceeded all my hopes."),
        ),
        (("a thank-you note", "praise"), ("a compliment", "a good review")),
    ),
}  # fmt: skip

# {p}: what another intent is called, {x}: another thing.
DISTRACTORS: tuple[Sequence[str], Sequence[str]] = (
    ("I don't want {p}.", "This is not about {p}.", "Last year I asked for {p}, that was settled.",
     "My neighbour wanted {p} for her {x}, I do not.", "Your colleague offered {p}, but that is not my point."),
    ("There is no need for {p} this time.", "Unlike before, I am not after {p}.",
     "A friend of mine once got {p} for a {x}; mine is another matter.", "Please do not talk to me of {p} again."),
)  # fmt: skip
OPENERS: tuple[Sequence[str], Sequence[str]] = (
    ("", "", "Hello.", "Good morning.", "Dear team,"),
    ("", "", "Hi there.", "To whom it may concern:"),
)
CLOSERS: tuple[Sequence[str], Sequence[str]] = (
    ("", "", "Regards.", "Please answer soon."),
    ("", "", "Cheers.", "I look forward to your reply."),
)

NAMES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "PER": (
        ("Anna Weber", "Jordan Miles", "Peter Novak", "Georgia Lane", "Ravi Patel", "May Chen", "Carlos Ruiz",
         "Florence Hill",
         "Tom Baker", "Lucia Rossi", "Austin Park", "Emma Stone", "Omar Haddad", "Sofia Lund", "Grace Kim", "Daniel"),
        ("April Summers", "Sydney Clark", "Igor Petrov", "Chelsea Brooks", "Mei Tanaka", "August Berg",
         "Fatima Khan", "Paris Gray",
         "Hugo Martin", "Victoria Wells", "Nadia"),
    ),
    "LOC": (
        ("Jordan", "Georgia", "Florence", "Austin", "Berlin", "Kyoto", "New York", "Lisbon", "Cape Town", "Norway",
         "Hyde Park",
         "Buenos Aires", "Cairo", "Lane End", "Mumbai"),
        ("Sydney", "Chelsea", "Paris", "Victoria", "Oslo", "San Diego", "Nairobi", "Lake Como", "Warsaw",
         "Gray Harbour", "Peru"),
    ),
    "PROD": (
        ("Lumo 4 kettle", "Aero phone", "Nordic tent", "Florence sofa", "Pixel Max camera", "Spring jacket",
         "Kyoto knife",
         "Trail Pro boots", "Quiet One headset", "Solar radio", "May Day perfume", "Vento fan"),
        ("Brisa 2 lamp", "Oslo desk", "Summit watch", "Sydney backpack", "Clear View monitor", "Autumn coat",
         "Paris teapot",
         "Rapid X drill", "Monday planner"),
    ),
    "DATE": (
        ("Monday", "3 May", "last Friday", "in April", "12 June 2021", "yesterday", "next week", "2019",
         "the first of March",
         "Sunday morning", "on 7 July", "two days ago"),
        ("Tuesday", "21 August", "this Thursday", "in October", "5 January 2023", "tomorrow", "last month", "2020",
         "the tenth of September", "Saturday evening"),
    ),
}  # fmt: skip
SENTENCES: tuple[Sequence[str], Sequence[str]] = (
    ("{PER} bought the {PROD} in {LOC} {DATE} .", "{DATE} {PER} flew from {LOC} to {LOC} .",
     "The {PROD} that {PER} ordered never reached {LOC} .",
     "Ask {PER} whether the {PROD} ships to {LOC} .", "Our shop in {LOC} opens {DATE} .",
     "{PER} and {PER} returned the {PROD} {DATE} .",
     "I met {PER} at the office in {LOC} .", "Since {DATE} the {PROD} is sold in {LOC} only .",
     "Nobody in {LOC} knows {PER} .",
     "The lamp and the chair arrived late , but nobody complained .", "My {PROD} broke {DATE} , says {PER} ."),
    ("{DATE} a parcel for {PER} left {LOC} .", "{LOC} is where {PER} tested the {PROD} .",
     "According to {PER} , the {PROD} was shown in {LOC} {DATE} .",
     "We will visit {LOC} with {PER} {DATE} .", "Is the {PROD} of {PER} still in {LOC} ?",
     "Repairs of the {PROD} take until {DATE} .",
     "Neither {PER} nor {PER} lives near {LOC} .", "The meeting was moved , so everyone went home early ."),
)  # fmt: skip

LABELS = sorted(INTENTS)
TAGS = ["O", *(f"{mark}-{kind}" for kind in NAMES for mark in "BI")]


def _message(rng: random.Random, label: str, side: Side) -> Row:
    thing, other = rng.sample(THINGS[side], 2)
    parts = [rng.choice(INTENTS[label][0][side])]
    if rng.random() < 0.5:
        mentioned = rng.choice([name for name in INTENTS if name != label])
        phrase = rng.choice(INTENTS[mentioned][1][side])
        parts.insert(rng.randrange(2), rng.choice(DISTRACTORS[side]).format(p=phrase, x=other))
    text = " ".join([rng.choice(OPENERS[side]), *parts, rng.choice(CLOSERS[side])])
    return {"text": " ".join(text.format(x=thing).split()), "label": label}


def intents(rows: int, seed: int, side: Side) -> list[Row]:
    """Rows ``{"text", "label"}``; any ``rows`` first ones are balanced over the labels up to one row."""
    rng = random.Random(f"intents {seed} {side}")
    made: list[Row] = []
    while len(made) < rows:
        made += [_message(rng, label, side) for label in rng.sample(LABELS, len(LABELS))]
    return made[:rows]


def entities(rows: int, seed: int, side: Side) -> list[Row]:
    """Rows ``{"tokens", "tags"}``: words and their BIO tags."""
    rng = random.Random(f"entities {seed} {side}")
    return [_sentence(rng, rng.choice(SENTENCES[side]), side) for _ in range(rows)]


def _sentence(rng: random.Random, template: str, side: Side) -> Row:
    tokens: list[str] = []
    tags: list[str] = []
    for piece in template.split():
        kind = piece.strip("{}") if piece.startswith("{") else None
        words = rng.choice(NAMES[kind][side]).split() if kind else [piece]
        tokens += words
        tags += ["O"] if kind is None else [f"B-{kind}", *[f"I-{kind}"] * (len(words) - 1)]
    return {"tokens": tokens, "tags": tags}


def data_of(
    task: str, seed: int, train_rows: int, eval_rows: int, split: Literal["dev", "test"]
) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows; a smaller ``train_rows`` gives the first of a larger one with the same seed."""
    if task == "advert":
        return make_task(seed, train_rows, eval_rows)
    make = {"intents": intents, "entities": entities}[task]
    return make(train_rows, seed, 0), make(eval_rows, seed + 10_000, 0 if split == "dev" else 1)
