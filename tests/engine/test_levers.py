"""No lever changes the result: the losses of a short run with each lever equal those of a run without levers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.utils import counters

from ptd.commands.train import train
from ptd.config import parse_config
from ptd.inject.last_layer import Tail
from ptd.inject.output_layer import OutputLayer
from ptd.runs.metrics_log import read_records
from ptd.types import Reporter

EAGER = ("tail", "loss", "joined")
STEPS = 20
TOLERANCE = 1e-6
"""Relative tolerance: sums in fp32 have another order, over 20 optimizer steps."""


class Graphs(Reporter):
    """Records after each step how many graphs torch.compile has made."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        if task == "train":
            self.after.append(counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def losses_of(backbone_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(reporter: Reporter | None = None, levers: tuple[str, ...] = (), **backbone: Any) -> list[float]:
        folder = tmp_path_factory.mktemp("run")
        attention = "joined" if "joined" in levers else "merge"
        config = {
            "backbone": {"path": str(backbone_dir), "attention": attention, **backbone},
            "method": {"name": "prefix", "num_virtual_tokens": 4},
            "data": {"train": str(rows_file), "max_length": 64},
            "train": {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1},
            "output_dir": str(folder / "out"),
        }
        with pytest.MonkeyPatch.context() as patch:
            if "tail" not in levers:
                patch.setattr(Tail, "begin", lambda self, tokens, kept: None)
            if "loss" not in levers:
                patch.setattr(OutputLayer, "fuses", False)
            train(parse_config(config), reporter=reporter or Reporter())
        return [record["loss"] for record in read_records(folder / "out") if "loss" in record]

    return run


@pytest.fixture(scope="module")
def plain(losses_of: Any) -> list[float]:
    losses: list[float] = losses_of()
    assert len(losses) == STEPS
    assert losses[-1] < 0.98 * losses[0]
    return losses


@pytest.mark.parametrize("levers", [("tail",), ("loss",), ("joined",), EAGER], ids="+".join)
def test_losses_with_levers(losses_of: Any, plain: list[float], levers: tuple[str, ...]) -> None:
    losses = losses_of(levers=levers)
    if levers != ("tail",):  # fewer rows may round alike; tests/inject/test_last_layer.py counts them
        assert losses != plain, "the lever is there"
    assert losses == pytest.approx(plain, rel=TOLERANCE)


def test_losses_with_recomputed_layers(losses_of: Any, plain: list[float]) -> None:
    losses = losses_of(levers=EAGER, gradient_checkpointing=True)
    assert losses == pytest.approx(plain, rel=TOLERANCE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # from inductor and dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_losses_with_compiled_layers(losses_of: Any, plain: list[float]) -> None:
    """The steps have different lengths, and no step after the sixth compiles another graph."""
    graphs = Graphs()
    losses = losses_of(graphs, levers=EAGER, compile=True)
    assert losses == pytest.approx(plain, rel=TOLERANCE)
    assert graphs.after[0] > 0
    assert graphs.after[5:] == [graphs.after[5]] * (STEPS - 5)
