"""The model card of an adapter folder: its metadata for the hub, its text, and commands that run as written."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_backbone, tiny_model
from huggingface_hub import ModelCard
from peft import PeftModel, PrefixTuningConfig, get_peft_model

import ptd
from ptd.checkpoint import Adapter, load_adapter, save_adapter
from ptd.checkpoint.card import MARK, NAME
from ptd.cli import main
from ptd.commands.export import export_adapter
from ptd.types import EmptyLayout, LayerShape, PrefixLayout, SoftLayout

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT

P = 4
FACTS: dict[str, Any] = {
    "fingerprint": "0123-4567",
    "backbone_config": {"dtype": "bfloat16", "quantization": "nf4"},
    "method": {"name": "prefix", "num_virtual_tokens": P, "init_text": None},
    "task": {"kind": "causal_lm"},
    "data": {"train": "/home/someone/secret/train.jsonl", "eval": "C:\\Users\\someone\\eval.csv"},
    "training": {"rows": 1234, "tokens": 56789, "evaluation": {"loss": 0.123456789, "perplexity": 1.13, "step": 200}},
    "versions": {"ptd": "9.8.7"},
}
UNIFORM = (LayerShape(2, 8, 8),) * 2


def prefix(backbone: str = "some/backbone", layers: tuple[LayerShape, ...] = UNIFORM, **rest: Any) -> Adapter:
    layout = PrefixLayout(layers)
    flat = torch.randn(P, layout.width, generator=torch.Generator().manual_seed(1))
    rest = {"task_type": "CAUSAL_LM", "peft_type": "PREFIX_TUNING", "facts": FACTS, **rest}
    return Adapter(flat, layout, backbone, **rest)


def written(folder: Path, adapter: Adapter, **options: Any) -> str:
    save_adapter(folder, adapter, **options)
    return (folder / NAME).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}")[1].split("\n## ")[0].split("\n### ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_what_the_hub_reads(tmp_path: Path) -> None:
    save_adapter(tmp_path, prefix(revision="main"))
    data = ModelCard.load(tmp_path / NAME).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("some/backbone", "peft", "text-generation")
    assert data.tags == ["ptd", "prompt-tuning", "prefix", "peft", "base_model:adapter:some/backbone"]


def test_what_a_person_reads(tmp_path: Path) -> None:
    text = written(tmp_path, prefix("/home/someone/models/Llama-7B"))
    for row in (
        *("backbone | Llama-7B", "backbone weights during training | nf4"),
        *("virtual tokens | 4", "parameters of the prompt | 256"),
        *("rows | 1,234", "tokens | 56,789", "training data | train.jsonl", "held-out data | eval.csv"),
        *("loss | 0.123457", "perplexity | 1.13", "num_virtual_tokens | 4", "backbone | 0123-4567"),
    ):
        assert f"{row} |" in text
    assert "## Evaluation after step 200" in text
    assert "- ptd 9.8.7" in text
    assert "init_text" not in text, "what has no value is left out"
    assert "someone" not in text, "no paths of the machine"
    assert ModelCard(text).data.base_model is None, "a folder is no name on the hub"


def test_the_reason_why_peft_cannot(tmp_path: Path) -> None:
    layers = tuple(LayerShape(2, 8, 8, kind) for kind in ("encoder", "decoder", "cross"))
    adapter = prefix(layers=layers, task_type="SEQ_2_SEQ_LM", facts={"task": {"kind": "seq2seq_lm"}})
    text = written(tmp_path, adapter)
    assert f"PEFT cannot load this adapter: {adapter.peft_obstacle()}" in text
    assert not blocks(section(text, "Use with PEFT"), "python")
    assert "AutoModelForSeq2SeqLM" in section(text, "Use with ptd")
    assert ModelCard(text).data.library_name == "ptd"


def test_a_head(tmp_path: Path) -> None:
    facts = {"task": {"kind": "classification"}, "method": {"name": "prompt"}}
    head = {"weight": torch.ones(3, 32), "bias": torch.zeros(3)}
    flat = torch.randn(P, 32)
    adapter = Adapter(flat, SoftLayout(32), "a/b", None, "FEATURE_EXTRACTION", "PROMPT_TUNING", head, facts)
    text = written(tmp_path / "both", adapter)
    assert "parameters of the head | 99 |" in text
    assert "ptd predict --adapter ADAPTER --data rows.jsonl" in text
    assert "without the trained head" in section(text, "Use with PEFT")
    assert ModelCard(text).data.pipeline_tag == "text-classification"
    exported = written(tmp_path / "peft", adapter, peft_only=True)
    assert "is not in this folder" in section(exported, "Use with ptd")
    assert "ptd predict" not in exported
    alone = written(tmp_path / "head", Adapter(torch.empty(0, 0), EmptyLayout(), "a/b", head=head, facts=facts))
    assert "virtual tokens" not in alone
    assert "PEFT cannot load this adapter: it has no prompt" in alone


def test_commands_work_as_they_stand(tmp_path: Path, backbone_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for ptd and the code for PEFT give the same logits, and the prompt changes them."""
    model = tiny_model("llama")
    model.name_or_path = str(backbone_dir)
    torch.manual_seed(1)
    ptd.attach(model, "prefix", num_virtual_tokens=P).save(tmp_path / "made")
    facts = {**load_adapter(tmp_path / "made").facts, "task": {"kind": "causal_lm"}, "data": {"max_length": 64}}
    text = written(tmp_path / "ADAPTER", replace(load_adapter(tmp_path / "made"), facts=facts))
    text = text.replace("PATH_OF_THE_BACKBONE", str(backbone_dir))
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "1 + 1 = ", "completion": "2"}) + "\n", encoding="utf-8")

    ids = torch.randint(5, VOCAB, (1, 9), generator=torch.Generator().manual_seed(2))
    logits = []
    for title in ("Use with ptd", "Use with PEFT"):
        (code,) = blocks(section(text, title), "python")
        names: dict[str, Any] = {}
        exec(code, names)
        with torch.no_grad():
            logits.append(names["model"].eval()(input_ids=ids).logits)
            plain = tiny_model("llama")(input_ids=ids).logits
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[0] - plain).abs().max() > 1e-2

    commands = blocks(text, "bash")
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command) + (["--max-new-tokens", "2"] * ("generate" in command)))
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        assert out.getvalue()


def test_saving_again_renews_ptds_own_card_only(tmp_path: Path) -> None:
    first = written(tmp_path, prefix())
    assert written(tmp_path, prefix("another/backbone")) != first
    own = (tmp_path / NAME).read_text(encoding="utf-8").replace(MARK, "") + "\nTuned on Sundays.\n"
    (tmp_path / NAME).write_text(own, encoding="utf-8")
    assert written(tmp_path, prefix()) == own
    assert load_adapter(tmp_path).backbone == "some/backbone"


def test_peft_saves_into_the_folder_of_an_adapter(tmp_path: Path) -> None:
    """PEFT loads ptd's folder and, saving there, adds to its card; ptd does not replace a card that PEFT wrote."""
    theirs = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    save_adapter(tmp_path / "ours", prefix())
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "ours")
    text = (tmp_path / "ours" / NAME).read_text(encoding="utf-8")
    assert "# prefix for some/backbone" in text
    assert "- PEFT 0." in text
    theirs.save_pretrained(tmp_path / "theirs")
    before = (tmp_path / "theirs" / NAME).read_text(encoding="utf-8")
    assert written(tmp_path / "theirs", prefix()) == before


def test_an_exported_adapter_has_one(tmp_path: Path) -> None:
    save_adapter(tmp_path / "ours", prefix("/home/someone/models/Llama-7B"))
    export_adapter(str(tmp_path / "ours"), tmp_path / "peft", base_model="meta/Llama-7B")
    text = (tmp_path / "peft" / NAME).read_text(encoding="utf-8")
    assert ModelCard(text).data.base_model == "meta/Llama-7B"
    assert "perplexity | 1.13 |" in text
    assert "someone" not in text
    assert 'from_pretrained("meta/Llama-7B")' in section(text, "Use with PEFT")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"training": 5, "versions": ["x"], "data": {"train": 7}, "method": {"name": ["a"]}, "task": {"kind": {}}},
        {"method": {"name": "x\n---\nlibrary_name: y", "a|b": "| </td>\n# ``` [x](http://y)", "long": "z" * 10_000}},
    ],
)
def test_whatever_an_adapter_says_of_itself(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Facts of any form stay inside the tables and the front matter; none of them becomes markup."""
    text = written(tmp_path, prefix(facts=facts))
    assert ModelCard(text).data.library_name == "peft"
    assert len(text) < 5000
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert all(line.startswith(("# ", "## Data", "## Method", "## Use with")) for line in headings)
    assert len([line for line in headings if line.startswith("# ")]) == 1
    assert "</td>" not in text.replace(r"\</td\>", "")


def test_a_cloze_is_loaded_with_its_language_model(tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "bert", "bert")
    task = {"kind": "classification", "patterns": ["{text} {mask}"], "verbalizer": {"a": ["a"]}}
    adapter = Adapter(torch.randn(P, 32), SoftLayout(32), str(backbone), None, "FEATURE_EXTRACTION", "PROMPT_TUNING",
                      facts={"task": task})  # fmt: skip
    text = written(tmp_path / "adapter", adapter)
    assert "AutoModelForMaskedLM" in section(text, "Use with PEFT")
    assert f"{backbone.name} |" in text
