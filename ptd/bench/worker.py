"""One side of a benchmark as a process of its own: ``python -m ptd.bench.worker FD``, told what to do over a pipe.

A request is ``(name, arguments)``: first ``ptd`` or ``peft`` to build the side, then the names of its methods. The
answer is ``("done", result)``, ``("refused", message)`` for a `UserError`, or ``("failed", traceback)``.
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


def build(name: str, arguments: tuple[Any, ...]) -> Any:
    """The side of this name."""
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
                side, result = build(name, arguments), None
            else:
                result = getattr(side, name)(*arguments)
            pipe.send(("done", result))
        except UserError as error:
            pipe.send(("refused", str(error)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


def main() -> None:
    """What a conductor starts."""
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    warnings.simplefilter("ignore")  # of one library about another; nobody here can act on them
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no result
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
