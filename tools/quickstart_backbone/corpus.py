"""Generator of the quickstart backbone's pretraining corpus; the same seed gives the same text on every machine.

Most documents are a *collection*: a few invented entities of one domain, each described two or three times, first by a
view that cannot be predicted (a record or a text) and then by views that follow from it. Records have eight formats and
views have twelve kinds. Within a collection the format, the wording and the slot order usually stay the same, so that a
model gains from recognising the style as well as from copying values. One document in four is a *roll call*, a list
given twice. Neither the tuning task's records (``key: value | key: value``) nor its texts ever occur, though short
phrases of them do ("Not for children").

Names are built from syllables. One name in eight, chosen by a hash, is held out: it never occurs in the corpus, so that
the task can test on names that the backbone cannot have seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from views import TEXT_VIEWS, Entity, Style, view

from ptd.quickstart.domains import DOMAINS, YES_NO, Domain
from ptd.quickstart.names import DROP_PROBABILITY, draw_value, invent_name

FIRST_VIEW_WEIGHT = 0.1
ROLL_CALL_PROBABILITY = 0.25


Segment = tuple[str, float]


def invent_entity(rng: random.Random, domain: Domain) -> Entity:
    """Return an entity of which each slot is known with probability 0.8, and at least two slots are known."""
    known = [slot for slot in domain.slots if rng.random() >= DROP_PROBABILITY]
    if len(known) < 2:
        known = rng.sample(list(domain.slots), 2)
    values = {slot: draw_value(rng, domain.slots[slot].values) for slot in known}
    return Entity(domain, invent_name(rng), values)


def _roll_call(rng: random.Random) -> list[Segment]:
    """Return a list given twice, of names and values or of pairs of them; the second list of pairs has a new order.

    Nearly every token of the repetition can be copied, so that the copying circuits form early in training.
    """
    slots = [slot for domain in DOMAINS.values() for slot in domain.slots.values() if slot.values != YES_NO]

    def item() -> str:
        return invent_name(rng) if rng.random() < 0.5 else draw_value(rng, rng.choice(slots).values)

    items = [item() for _ in range(rng.randint(4, 12))]
    start, link = rng.choice(("List:", "Count:", "Say:")), rng.choice((",", ";", " and", " -", " then"))
    again = items
    if rng.random() < 0.5:
        relation = rng.choice((":", " =", " ->", " has", " with"))
        items = [f"{name}{relation} {item()}" for name in items[:8]]
        again = rng.sample(items, len(items))
    return [(f"{start} {f'{link} '.join(items)}", FIRST_VIEW_WEIGHT), (f"\n{start} {f'{link} '.join(again)}", 1.0)]


def collection(rng: random.Random) -> list[Segment]:
    """Return one document as segments of text, each with its loss weight; they are joined without separators."""
    if rng.random() < ROLL_CALL_PROBABILITY:
        return _roll_call(rng)
    domain = DOMAINS[rng.choice(tuple(DOMAINS))]
    record_first, steady = rng.random() < 0.7, rng.random() < 0.8
    first_kind = None if record_first else rng.randrange(len(TEXT_VIEWS))
    # The twelfth kind of view is a record. Three numbers of the range stand for it, so that a record is more frequent
    # than each kind of text.
    draws = rng.sample(range(len(TEXT_VIEWS) + 3), 2)
    later_kinds = [draw if draw < len(TEXT_VIEWS) else None for draw in draws][: 1 if rng.random() < 0.75 else 2]
    styles = [Style(rng, steady) for _ in range(1 + len(later_kinds))]
    if rng.random() < 0.5:
        for style in styles[1:]:
            style.labels = styles[0]
    segments: list[Segment] = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        entity = invent_entity(rng, domain)
        separator = "\n\n" if segments else ""
        segments.append((separator + view(entity, styles[0], first_kind), FIRST_VIEW_WEIGHT))
        for style, kind in zip(styles[1:], later_kinds, strict=True):
            segments.append(("\n" + view(entity, style, kind), 1.0))
    return segments


def collections(seed: int) -> Iterator[list[Segment]]:
    """Yield documents without end."""
    rng = random.Random(seed)
    while True:
        yield collection(rng)
