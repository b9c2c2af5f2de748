"""Run benchmarks/families.py on a few families of each kind: ptd's values are right, or ptd refuses with a reason.

``make sweep-test`` (PTD_SWEEP=1) runs every family that transformers can build.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ptd_kernels import prefix_attention

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import families_measure
import families_ptd
from families_cases import draw_prefix, draw_rows
from families_configs import model_types, part, tiny_model
from families_plain import Plain

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "families.py"
QUICK = [
    ("llama", "causal_lm"),
    ("mistral", "causal_lm"),
    ("stablelm", "causal_lm"),
    ("doge", "causal_lm"),
    ("llama4_text", "causal_lm"),
    ("gemma4_text", "causal_lm"),
    ("esm", "masked_lm"),
    ("mobilebert", "masked_lm"),
    ("modernbert", "masked_lm"),
    ("t5", "seq2seq_lm"),
    ("nllb-moe", "seq2seq_lm"),
    ("splinter", "body"),
    ("mistral3", "body"),
    ("gemma3", "body"),
    ("deberta-v2", "body"),
]
FINE = {"right", "runs padded", "refused"}


def measure(model_type: str, kind: str) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many families emit warnings
        return families_measure.measure(model_type, kind)


@pytest.mark.parametrize(("model_type", "kind"), QUICK)
def test_a_family_is_right_or_refused(model_type, kind):
    cells = measure(model_type, kind)
    assert len(cells) >= 6
    assert [cell for cell in cells if cell["outcome"] not in FINE] == []
    assert all(cell.get("reason") for cell in cells if cell["outcome"] == "refused")


def test_what_is_supported_is_right_in_every_cell():
    assert {cell["outcome"] for cell in measure("llama", "causal_lm")} == {"right"}


def test_rows_that_see_each_other_are_noticed(monkeypatch):
    give = families_ptd.Attached.give

    def without_borders(*tensors, cu_seqlens=None, max_seqlen=None, **rule):
        return prefix_attention(*tensors, **rule)

    def give_and_break(self, *given, **options):  # only now, because attaching also checks for this fault
        monkeypatch.setattr("ptd.inject.attention.prefix_attention", without_borders)
        give(self, *given, **options)

    monkeypatch.setattr(families_ptd.Attached, "give", give_and_break)
    outcomes = {(cell["method"], cell["layout"]): cell["outcome"] for cell in measure("llama", "causal_lm")}
    assert {outcomes[method, "packed"] for method in ("none", "prefix", "prompt", "marks")} == {"wrong"}
    assert {outcomes[method, "padded"] for method in ("none", "prefix", "prompt", "marks")} == {"right"}


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "deepseek_v3"])
def test_the_reference_with_a_prefix_is_that_of_a_filled_cache(model_type):
    model = part(tiny_model(model_type, "causal_lm"), "causal_lm")
    plain = Plain(model, draw_rows(False, None))
    assert plain.why_no_prefix == ""
    error = plain.prefix_by_cache(draw_prefix(plain.shapes), window=None)
    assert error is None if model_type == "deepseek_v3" else error < 1e-5  # deepseek_v3 caches something else


@pytest.mark.skipif("PTD_SWEEP" not in os.environ, reason="minutes; make sweep-test")
@pytest.mark.timeout(3600)
def test_every_family_is_right_or_refused(tmp_path):
    output = tmp_path / "families.json"
    subprocess.run([sys.executable, SCRIPT, "--output", output], check=True)
    records = json.loads(output.read_text())["records"]
    assert {(each["type"], each["kind"]) for each in records} == set(model_types())
    bad = {"wrong", "crashed", "sweep failed"}
    assert [each for each in records if each["outcome"] in bad] == []
