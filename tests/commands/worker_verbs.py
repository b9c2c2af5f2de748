"""Run on ranks by test_verbs_on_ranks.py: run ``ptd`` with several command lines, as a user would type them.

    torchrun --nproc-per-node 2 worker_verbs.py COMMANDS.json FOLDER

The output of a rank goes to FOLDER/NAME.RANK, the share of the weights that it holds to FOLDER/parted.RANK. Nothing is
asserted here.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from ptd.cli import main
from ptd.distributed.ranks import Ranks
from ptd.runs.tuned import find_tuned


def parted(adapter: str, sharding: str, rank_file: Path) -> None:
    found = find_tuned(adapter, None, settings={"backbone": {"sharding": sharding}})
    tuned = found.load(found.start_ranks())
    parameters = list(tuned.prepared.model.parameters())
    whole = sum(parameter.ds_numel for parameter in parameters)
    rank_file.write_text(str(sum(parameter.ds_tensor.numel() for parameter in parameters) / whole))


def run(commands: dict[str, list[str]], folder: Path, rank: int) -> None:
    for name, arguments in commands.items():
        sys.argv = ["ptd", *arguments]
        with (folder / f"{name}.{rank}").open("w", encoding="utf-8") as file, redirect_stdout(file):
            try:
                main()
            except SystemExit as stop:
                if stop.code:
                    raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, target, rank = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(os.environ["RANK"])
    ranks = Ranks.start()  # one group for all commands: a second would find the addresses of the first in the store
    run(cases["commands"], target, rank)
    parted(cases["adapter"], "world", target / f"parted.{rank}")
    ranks.stop()
