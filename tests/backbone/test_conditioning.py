"""Text for initialisers is drawn from the training rows."""

from __future__ import annotations

import numpy as np
from families import VOCAB, tiny_model

from ptd.backbone import TextConditioner
from ptd.inject import Attachment
from ptd.types import DataReport, Examples, virtual_id

OWN = 7
"""The only token in the rows, apart from virtual tokens."""


def conditioner(*rows: list[int]) -> TextConditioner:
    tokens = np.array([token for row in rows for token in row], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    report = DataReport(len(rows), len(tokens), len(tokens))
    examples = Examples.of_text(tokens, np.ones(len(tokens), dtype=bool), offsets, report)
    return TextConditioner(Attachment(tiny_model()), None, examples)


def test_rows_without_tokens_of_their_own_are_passed_over_however_much_is_drawn() -> None:
    found = conditioner([virtual_id(0), virtual_id(1)], [OWN, virtual_id(0), OWN])
    assert found.rows(200) == [[OWN] * 200]


def test_frequent_tokens_stand_in_where_no_row_has_any_of_its_own() -> None:
    drawn = conditioner([virtual_id(0)], [virtual_id(1)]).rows(40)[0]
    assert len(drawn) == 40
    assert len(set(drawn)) > 10
    assert all(0 <= token < VOCAB for token in drawn)
