"""Measure the self-check at attach against the loading of a backbone: ``python benchmarks/attach_cost.py MODEL``.

Each measurement is a fresh process. It reports the seconds from its start (imports included) until a run could begin,
and how many of them pass in `ptd.inject.self_check`. Prints one JSON object per process, and their medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure(model: str, dtype: str) -> dict[str, float]:
    """Return the seconds until this process has its backbone (``loading``), and its parts ``check`` and ``attach``."""
    from ptd.config import backbone_config
    from ptd.distributed.ranks import Ranks
    from ptd.engine.setup import prepare
    from ptd.inject import attach
    from ptd.inject.self_check import SelfCheck

    spent = {"check": 0.0, "attach": 0.0}

    def timed(function: Any, key: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[key] += time.perf_counter() - begin

        return run

    for name in ("__init__", "read_plain", "run"):
        setattr(SelfCheck, name, timed(getattr(SelfCheck, name), "check"))
    attach.Attachment.__init__ = timed(attach.Attachment.__init__, "attach")  # type: ignore[method-assign]
    prepare(backbone_config({"path": model, "dtype": dtype}), Ranks.start())
    started = float(os.environ["PTD_STARTED"])
    return {"loading": time.time() - started, **spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a language model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(measure(asked.model, asked.dtype)))
        return
    found = []
    for _ in range(asked.times):
        command = [sys.executable, __file__, asked.model, "--dtype", asked.dtype, "--worker"]
        environment = os.environ | {"PTD_STARTED": str(time.time())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps({key: round(value, 3) for key, value in found[-1].items()}))
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    medians["check_percent_of_loading"] = 100 * medians["check"] / (medians["loading"] - medians["check"])
    print(json.dumps({key: round(value, 3) for key, value in medians.items()}))
    if asked.output is not None:
        from ptd.versions import versions

        result = {"model": Path(asked.model).name, "dtype": asked.dtype, "runs": found, "median": medians}
        asked.output.write_text(json.dumps({**result, "versions": versions()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
