"""Run on two ranks by test_preflight.py: the results of the checks before a run, one line of JSON per rank.

torchrun --nproc-per-node 2 worker_preflight.py BACKBONE OTHER_BACKBONE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptd.config import backbone_config, parse_config
from ptd.distributed import preflight
from ptd.distributed.ranks import Ranks
from ptd.engine.setup import prepare
from ptd.types import UserError


def said(check: Callable[[], Any]) -> str:
    try:
        check()
    except UserError as error:
        return str(error)
    return "fine"


def main(backbone: str, other: str, folder: Path) -> None:
    preflight.PATIENCE = 2.0
    ranks = Ranks.start()
    run = {"backbone": {"path": "x"}, "method": {"name": "prefix"}, "data": {"train": "x"}, "output_dir": "out"}
    own = {**run, "train": {"learning_rate": 0.1 + ranks.rank}}
    nvme = {"path": "x", "sharding": "world", "offload": "nvme", "offload_folder": f"disk{ranks.rank}"}
    found = {
        "same run": said(lambda: preflight.check_same_config(parse_config(run), ranks)),
        "other run": said(lambda: preflight.check_same_config(parse_config(own), ranks)),
        "other disk": said(lambda: preflight.check_same_config(parse_config({**run, "backbone": nvme}), ranks)),
        "shared": said(lambda: preflight.check_output(folder / "new" / "out", ranks)),
    }
    own_folder = folder / str(ranks.rank)
    own_folder.mkdir()
    os.chdir(own_folder)
    found["not shared"] = said(lambda: preflight.check_output(Path("out"), ranks))
    found["left"] = " ".join(path.name for path in [*folder.glob(".*"), *own_folder.iterdir()])
    path = backbone if ranks.is_main else other
    found["other weights"] = said(lambda: prepare(backbone_config({"path": path}), ranks))
    (folder / f"said.{ranks.rank}").write_text(json.dumps(found))
    ranks.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
