"""Invented names and values of the quickstart's world; some names are held out from every text of training."""

from __future__ import annotations

import random
import zlib

from ptd.quickstart.domains import LANDMARK, NAME

HELD_OUT_ONE_IN = 8


DROP_PROBABILITY = 0.2


LANDMARK_KINDS = ("Bridge", "Park", "Station", "Hall", "Tower", "Gate", "Church", "Castle")


_ONSETS = (
    *("b", "br", "c", "cl", "d", "dr", "f", "fl", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st"),
    *("t", "th", "tr", "v", "w", "z"),
)


_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")


_CODAS = ("", "", "", "l", "n", "r", "s", "m")


_ENDINGS = (
    *("ba", "by", "ck", "da", "dan", "den", "do", "fer", "ford", "gan", "ko", "la", "lin", "lo", "ma", "mel", "mor"),
    *("na", "nel", "no", "ra", "ran", "ric", "ro", "sa", "sel", "son", "ta", "ton", "va", "ver", "vik", "zo"),
)


def is_held_out(name: str) -> bool:
    """Return whether a name is held out of the pretraining corpus; this depends only on the name, on every machine."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def invent_name(rng: random.Random, held_out: bool = False) -> str:
    """Return an invented name of two or three syllables; ``held_out``: one that the pretraining corpus leaves out."""
    while True:
        middle = rng.choice(_ONSETS) + rng.choice(_VOWELS) if rng.random() < 0.5 else ""
        first = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        name = (first + middle + rng.choice(_ENDINGS)).capitalize()
        if is_held_out(name) == held_out:
            return name


def draw_value(rng: random.Random, values: tuple[str, ...], held_out: bool = False) -> str:
    """Return one value of a slot: one from its list, or an invented name or landmark."""
    if values == NAME:
        return invent_name(rng, held_out)
    if values == LANDMARK:
        return f"{invent_name(rng, held_out)} {rng.choice(LANDMARK_KINDS)}"
    return rng.choice(values)
