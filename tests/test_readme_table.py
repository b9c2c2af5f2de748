"""The numbers in README.md's table of methods are those of the modules, built for Llama-2-7B's shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from ptd.checkpoint import Adapter, save_adapter
from ptd.config import DataConfig, TaskConfig
from ptd.engine.prompt_step import Trained
from ptd.methods import TaskFacts, method
from ptd.readouts import Readout
from ptd.tasks import make_task
from ptd.types import BackboneShape, LayerShape

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
P = 20
LABELS = {"kind": "classification", "labels": ["negative", "positive"]}
TEXT: dict[str, Any] = {"kind": "causal_lm"}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "`head`": ({"name": "head"}, LABELS),
    "`hard_prompt`": (
        {"name": "hard_prompt"},
        LABELS | {"patterns": ["{text} {mask}"], "verbalizer": {"negative": ["bad"], "positive": ["good"]}},
    ),
    "`prompt`": ({"name": "prompt", "num_virtual_tokens": P, "init": "random"}, TEXT),
    "`p_tuning`": ({"name": "p_tuning", "num_virtual_tokens": P, "encoder_hidden_size": 512}, TEXT),
    "`prefix`": ({"name": "prefix", "num_virtual_tokens": P}, TEXT),
    "`prefix` with MLP": (
        {"name": "prefix", "num_virtual_tokens": P, "prefix_projection": True, "encoder_hidden_size": 512},
        TEXT,
    ),
    "`p_tuning_v2`": ({"name": "p_tuning_v2", "num_virtual_tokens": P}, LABELS),
}
"""First cell of a row -> the ``method`` and ``task`` sections it stands for, from the README's text around it."""


def llama_2_7b() -> BackboneShape:
    config = LlamaConfig()  # its defaults are those of Llama-2-7B
    layer = LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim)
    assert (config.num_hidden_layers, config.hidden_size, layer.kv_heads, layer.key_dim) == (32, 4096, 32, 128)
    return BackboneShape("llama", config.hidden_size, config.vocab_size, None, (layer,) * config.num_hidden_layers)


class Sizes:
    """Replaces a backbone: provides everything that an initialiser needs, without storage."""

    def __init__(self, shape: BackboneShape) -> None:
        self.shape = shape

    def rows(self, count: int) -> list[list[int]]:
        return [[0] * count]

    chunks = rows

    def frequent(self, count: int) -> list[int]:
        return [0] * count

    def token_ids(self, text: str, *, special: bool = False) -> list[int]:
        return [0] * len(text)

    def keys_and_values(self, sides: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.zeros(len(sides[0]), sum(layer.numel for layer in self.shape.layers))

    def embeddings(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(ids), self.shape.input_size)


def built(section: dict[str, Any], task_section: dict[str, Any]) -> Trained:
    """Return everything that is trained, without storage."""
    shape = llama_2_7b()
    chosen = method(section["name"])
    config = chosen.config(**{key: value for key, value in section.items() if key != "name"})
    task = make_task(TaskConfig(**task_section), DataConfig(), "decoder")
    with torch.device("meta"):
        encoder = chosen.build(config, shape, Sizes(shape), TaskFacts(), seed=0)
        tokenizer: Any = None
        # The readout of a cloze has no parameters, but needs the tokenizer for its words.
        readout = Readout() if task.cloze else task.readout(tokenizer, shape.hidden_size, chosen.head(config))
        return Trained(encoder, readout)


def stored_bytes(trained: Trained, folder: Path) -> int:
    """Return the bytes that the adapter's tensors take on disk."""
    with torch.device("meta"):
        flat = trained.encoder()
    head = {name: torch.zeros(parameter.shape) for name, parameter in trained.readout.named_parameters()}
    layout, kind = trained.encoder.layout, trained.encoder.peft_type
    save_adapter(folder, Adapter(torch.zeros(flat.shape), layout, "", None, "CAUSAL_LM", kind, head))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def parameters(count: int) -> str:
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:.2f} M"


def size(count: int) -> str:
    return "0" if count == 0 else f"{count / 1e6:.2f} MB"


def table() -> dict[str, list[str]]:
    """Return the rows of the table of methods: first cell -> the other cells."""
    lines = README.split("| method |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_the_table_has_every_method() -> None:
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_numbers_of_the_table(row: str, tmp_path: Path) -> None:
    trained = built(*ROWS[row])
    assert table()[row][2:4] == [parameters(trained.count()), size(stored_bytes(trained, tmp_path))]


def test_what_is_stored_is_what_is_reduced(tmp_path: Path) -> None:
    """The README gives one number for both: the flat prompt and the head, in fp32."""
    for number, sections in enumerate(ROWS.values()):
        trained = built(*sections)
        with torch.device("meta"):
            reduced = trained.encoder().numel() + sum(parameter.numel() for parameter in trained.readout.parameters())
        headers = 500
        assert 4 * reduced <= stored_bytes(trained, tmp_path / str(number)) <= 4 * reduced + headers
