"""The views of an entity: records in eight layouts and texts of eleven kinds; a `Style` chooses their wording."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ptd.quickstart.domains import YES_NO, Domain

T = TypeVar("T")


@dataclass
class Entity:
    """An invented entity: its domain, its name and the values of its known slots."""

    domain: Domain
    name: str
    values: dict[str, str]


class Style:
    """A source of wording choices. A steady style makes the same choice each time for the same key.

    ``labels`` is the style that names the slots in records. It is the style of another view if both views are to use
    the same labels.
    """

    def __init__(self, rng: random.Random, steady: bool = True) -> None:
        self.rng, self.steady, self.made = rng, steady, dict[str, float]()
        self.labels = self

    def number(self, key: str) -> float:
        if not self.steady:
            return self.rng.random()
        return self.made.setdefault(key, self.rng.random())

    def pick(self, key: str, options: tuple[T, ...]) -> T:
        return options[int(self.number(key) * len(options))]

    def ordered(self, entity: Entity, key: str) -> list[str]:
        return sorted(entity.values, key=lambda slot: self.number(f"{key} {slot}"))

    def predicate(self, entity: Entity, slot: str) -> str:
        spec, value = entity.domain.slots[slot], entity.values[slot]
        options = spec.no_predicates if spec.values == YES_NO and value == "no" else spec.predicates
        return self.pick(f"predicate {slot} {len(options)}", options).replace("{}", value)

    def complement(self, entity: Entity, slot: str) -> str:
        spec, value = entity.domain.slots[slot], entity.values[slot]
        options = spec.no_complements if spec.values == YES_NO and value == "no" else spec.complements
        return self.pick(f"complement {slot} {len(options)}", options).replace("{}", value)

    def question(self, entity: Entity, slot: str) -> str:
        return self.pick(f"question {slot}", entity.domain.slots[slot].questions).replace("@", entity.name) + "?"

    def noun(self, entity: Entity) -> str:
        return self.pick("noun", entity.domain.nouns)

    def subject(self, entity: Entity, position: int) -> str:
        if position == 0 or self.pick("refer", (True, False)):
            return entity.name
        return _capital(self.pick("pronoun", entity.domain.pronouns))

    def phrase(self, entity: Entity, key: str) -> str:
        return " ".join(self.complement(entity, slot) for slot in self.ordered(entity, key))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def record(entity: Entity, style: Style, layout: int) -> str:
    """Return the entity as a record in one of eight layouts, none of which is the tuning task's."""
    slots = style.ordered(entity, "record order")
    labels = [style.labels.pick(f"label {slot}", entity.domain.slots[slot].labels) for slot in slots]
    pairs = list(zip(labels, (entity.values[slot] for slot in slots), strict=True))
    pairs.insert(0 if style.pick("name first", (True, True, False)) else len(pairs), ("name", entity.name))
    if layout == 0:
        return "\n".join(f"{key}: {value}" for key, value in pairs)
    if layout == 1:
        return ", ".join(f"{key}: {value}" for key, value in pairs)
    if layout == 2:
        return "; ".join(f"{key} = {value}" for key, value in pairs)
    if layout == 3:
        return ", ".join(f"{key} -> {value}" for key, value in pairs)
    if layout == 4:
        return " ".join(f"<{key}> {value}" for key, value in pairs)
    if layout == 5:
        return json.dumps(dict(pairs))
    if layout == 6:
        return " ".join(f"({key} {value})" for key, value in pairs)
    return " | ".join(key for key, _ in pairs) + "\n" + " | ".join(value for _, value in pairs)


def _sentences(entity: Entity, style: Style) -> str:
    slots = style.ordered(entity, "order")
    return " ".join(f"{style.subject(entity, i)} {style.predicate(entity, slot)}." for i, slot in enumerate(slots))


def _joined(entity: Entity, style: Style) -> str:
    parts = [style.predicate(entity, slot) for slot in style.ordered(entity, "order")]
    lead = style.pick("lead", (f"The {style.noun(entity)} ", f"Our {style.noun(entity)} "))
    return f"{lead}{entity.name} {_listing(parts)}."


def _noun_phrase(entity: Entity, style: Style) -> str:
    lead = style.pick("lead", ("Here is @, a", "Meet @, the", "This is @, our")).replace("@", entity.name)
    return f"{lead} {style.noun(entity)} {style.phrase(entity, 'order')}."


def _questions(entity: Entity, style: Style) -> str:
    ask, reply = style.pick("marks", (("Q: ", "A: "), ("", "- "), ("Question: ", "Answer: ")))
    slots = style.ordered(entity, "order")
    return "\n".join(f"{ask}{style.question(entity, slot)}\n{reply}{_capital(entity.values[slot])}." for slot in slots)


def _bullets(entity: Entity, style: Style) -> str:
    mark = style.pick("bullet", ("- ", "* ", "+ "))
    say = style.pick("say", (style.predicate, style.complement))
    return "\n".join([f"About {entity.name}:", *(mark + say(entity, slot) for slot in style.ordered(entity, "order"))])


def _dialogue(entity: Entity, style: Style) -> str:
    first, second = style.pick("speakers", (("Ann", "Ben"), ("Guests", "Guide"), ("Child", "Mother")))
    opening = style.pick("opening", ("Tell me about @.", "What do you know about @?", "Have you heard of @?"))
    pronoun = style.pick("pronoun", entity.domain.pronouns)
    parts = [style.predicate(entity, slot) for slot in style.ordered(entity, "order")]
    return f"{first}: {opening.replace('@', entity.name)}\n{second}: {_capital(pronoun)} {_listing(parts)}."


def _letter(entity: Entity, style: Style) -> str:
    greeting = style.pick("greeting", ("Dear friend,", "Hello all,", "Dear mother,"))
    verb = style.pick("letter verb", ("I have found", "You should see", "We went to see", "You must hear about"))
    farewell = style.pick("farewell", ("Yours always", "See you soon", "Good night"))
    parts = [style.predicate(entity, slot) for slot in style.ordered(entity, "order")]
    pronoun = _capital(style.pick("pronoun", entity.domain.pronouns))
    return f"{greeting}\n{verb} {entity.name}. {pronoun} {_listing(parts)}.\n{farewell}"


def _advert(entity: Entity, style: Style) -> str:
    noun, phrase = style.noun(entity), style.phrase(entity, "order")
    form = style.pick(
        "advert",
        (
            "Looking for a {} {}? Try @!",
            "Do you want a {} {}? Then go to @.",
            "You can have a {} {}: @.",
            "If you ever need a {} {}, think of @.",
        ),
    )
    return form.format(noun, phrase).replace("@", entity.name)


def _summary(entity: Entity, style: Style) -> str:
    slots = [slot for slot in style.ordered(entity, "order") if entity.values[slot] not in YES_NO]
    join = style.pick("join", (", ", " - ", "; "))
    return f"On {entity.name}: " + join.join(entity.values[slot] for slot in slots or entity.values)


def _fronted(entity: Entity, style: Style) -> str:
    slots = style.ordered(entity, "order")
    front = f"{_capital(style.complement(entity, slots[0]))}, " if len(slots) > 1 else ""
    parts = [style.predicate(entity, slot) for slot in slots[1:] or slots]
    link = style.pick("link", (" It is also said that ", " People add that ", " Note that "))
    text = f"{front}{entity.name} {parts[0]}."
    pronoun = style.pick("pronoun", entity.domain.pronouns)
    return text + (f"{link}{pronoun} {_listing(parts[1:])}." if len(parts) > 1 else "")


def _quiz(entity: Entity, style: Style) -> str:
    parts = [style.predicate(entity, slot) for slot in style.ordered(entity, "order")]
    reply = style.pick("reply", ("Answer: @", "It is @.", "@, of course."))
    return f"Which {style.noun(entity)} {_listing(parts)}?\n{reply.replace('@', entity.name)}"


TEXT_VIEWS: tuple[Callable[[Entity, Style], str], ...] = (
    _sentences, _joined, _noun_phrase, _questions, _bullets, _dialogue, _letter, _advert, _summary, _fronted, _quiz,
)  # fmt: skip
RECORD_LAYOUTS = 8
_ARTICLE = re.compile(r"\b([Aa]) (?=[AEIOaeio])")


def view(entity: Entity, style: Style, kind: int | None) -> str:
    """Return the entity as the text view ``kind``, or as a record if ``kind`` is None."""
    if kind is not None:
        return _ARTICLE.sub(r"\1n ", TEXT_VIEWS[kind](entity, style))
    return record(entity, style, int(style.number("layout") * RECORD_LAYOUTS))
