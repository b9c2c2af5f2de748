"""A few families of each kind give the results of the committed family sheet, and the sheet notices faults.

``make families-test`` compares a fifth of all families, and ``make families`` writes the sheet.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter

import family_sheet
import pytest
from ptd_kernels import prefix_attention
from sheet import attached, records
from sheet.cases import draw_prefix, draw_rows
from sheet.configs import model_types, part, tiny_model
from sheet.measure import measure
from sheet.page import page
from sheet.plain import Plain

QUICK = [
    ("llama", "causal_lm"),
    ("mistral", "causal_lm"),
    ("stablelm", "causal_lm"),
    ("llama4_text", "causal_lm"),
    ("gemma4_text", "causal_lm"),
    ("bloom", "causal_lm"),
    ("gpt_neo", "causal_lm"),
    ("gpt_oss", "causal_lm"),
    ("qwen3_next", "causal_lm"),
    ("mamba", "causal_lm"),
    ("deepseek_v4", "causal_lm"),
    ("esm", "masked_lm"),
    ("mobilebert", "masked_lm"),
    ("modernbert", "masked_lm"),
    ("deberta-v2", "masked_lm"),
    ("t5", "seq2seq_lm"),
    ("nllb-moe", "seq2seq_lm"),
    ("led", "seq2seq_lm"),
    ("mistral3", "body"),
    ("gemma3", "body"),
]
SHEET = {(each["type"], each["kind"]): each for each in records.read()[0]}


def measured(model_type: str, kind: str) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many families emit warnings
        return {"type": model_type, "kind": kind, **records.folded(measure(model_type, kind))}


@pytest.mark.parametrize(("model_type", "kind"), QUICK)
def test_a_family_gives_the_results_of_the_sheet(model_type, kind):
    found = measured(model_type, kind)
    assert len(found["cells"]) >= 6
    assert records.faults(found) == []
    assert records.differences(found, SHEET[model_type, kind]) == []
    refused = {cell for cell, outcome in found["cells"].items() if outcome == "refused"}
    assert refused <= {cell for cells in found["why"].values() for cell in cells}


def test_the_sheet_has_every_language_model_and_no_fault():
    assert set(model_types(("causal_lm", "seq2seq_lm", "masked_lm"))) <= set(SHEET) <= set(model_types())
    assert [text for each in SHEET.values() for text in records.faults(each)] == []
    assert {*SHEET["llama", "causal_lm"]["cells"].values()} == {"right"}


def test_the_page_is_that_of_the_sheet():
    assert page(*records.read()) == records.PAGE.read_text(encoding="utf-8")


def test_a_regression_fails():
    before = SHEET["bloom", "causal_lm"]
    now = json.loads(json.dumps(before))
    assert records.differences(now, before) == []
    now["cells"]["prefix padded"] = "refused"
    now["why"]["it cannot"] = ["prefix padded"]
    (said,) = records.differences(now, before)
    assert said == "bloom causal_lm: prefix padded: refused, in the sheet right (it cannot)"
    now["cells"]["prefix padded"] = "wrong"
    assert records.faults(now) == ["prefix padded: wrong: it cannot"]
    unbuilt = {"type": "bloom", "kind": "causal_lm", "outcome": "not built", "reason": "ImportError: no such package"}
    assert records.differences(unbuilt, before) == []
    assert len(records.differences(before, None)) == 1


def test_the_fifths_are_all_types_and_alike():
    sizes = Counter(family_sheet.fifth_of(*pair) for pair in model_types())
    assert sorted(sizes) == list(range(family_sheet.FIFTHS))
    assert max(sizes.values()) < 1.3 * min(sizes.values())


def test_a_process_that_dies_is_a_record():
    worker = family_sheet.Worker()
    try:
        worker.start()
        assert worker.process is not None
        worker.process.kill()
        found = worker.measure("llama", "causal_lm")
    finally:
        worker.stop()
    assert records.faults(found) == ["crashed: the process ended with -9"]


def test_rows_that_see_each_other_are_noticed(monkeypatch):
    give = attached.Attached.give

    def without_borders(*tensors, cu_seqlens=None, max_seqlen=None, **rule):
        return prefix_attention(*tensors, **rule)

    def give_and_break(self, *given, **options):  # only now, because attaching also checks for this fault
        monkeypatch.setattr("ptd.inject.attention.prefix_attention", without_borders)
        give(self, *given, **options)

    monkeypatch.setattr(attached.Attached, "give", give_and_break)
    cells = measured("llama", "causal_lm")["cells"]
    assert {cells[f"{method} packed"] for method in ("none", "prefix", "prompt", "marks")} == {"wrong"}
    assert {cells[f"{method} padded"] for method in ("none", "prefix", "prompt", "marks")} == {"right"}


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "deepseek_v3"])
def test_the_reference_with_a_prefix_is_that_of_a_filled_cache(model_type):
    model = part(tiny_model(model_type, "causal_lm"), "causal_lm")
    plain = Plain(model, draw_rows(False, None))
    assert plain.why_no_prefix == ""
    error = plain.prefix_by_cache(draw_prefix(plain.shapes), window=None)
    assert error is None if model_type == "deepseek_v3" else error < 1e-5  # deepseek_v3 caches something else
