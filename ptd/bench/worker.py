"""Run one side of a benchmark in a separate process: ``python -m ptd.bench.worker FD`` answers requests on a pipe.

A request is ``(name, arguments)``. The first name, ``ptd`` or ``peft``, builds the side; later names are its methods.
The answer is ``("done", result)``, ``("refused", message)`` for a `UserError`, or ``("failed", traceback)``.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

from ptd.types import UserError


def build_side(name: str, arguments: tuple[Any, ...]) -> Any:
    """Build the side with this name."""
    if name == "ptd":
        from ptd.bench.ptd_side import PtdSide

        return PtdSide(*arguments)
    from ptd.bench.peft_side import PeftSide

    return PeftSide(*arguments)


def serve(pipe: Connection) -> None:
    """Answer requests until the other end is closed."""
    side: Any = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if side is None:
                side, result = build_side(name, arguments), None
            else:
                result = getattr(side, name)(*arguments)
            pipe.send(("done", result))
        except UserError as error:
            pipe.send(("refused", str(error)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


def main() -> None:
    """Serve the process that started this one (`ptd.bench.players.Player`)."""
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    warnings.simplefilter("ignore")  # libraries warn about each other; users cannot act on that
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that what libraries print is not taken for a result
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
