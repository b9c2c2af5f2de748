"""Run ``ptd`` without its ten seconds of imports: a server that has imported everything forks for each command.

``python warm.py SOCKET`` starts the server; `write_client` writes the program ``ptd`` that a shell finds in PATH. Each
command has its own arguments, environment, folder, standard streams and exit code. The server does not use autograd.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

MODULES = (
    *(f"commands.{name}" for name in ("train", "evaluate", "generate", "predict", "export", "plan", "init", "doctor")),
    *("inspection", "console", "launch"),
)
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    connection.shutdown(socket.SHUT_WR)
    sys.exit(int(connection.makefile().read() or 1))
"""


def write_client(path: Path, sock: Path) -> None:
    """Write the program that passes its command to the server at ``sock``."""
    path.write_text(CLIENT.format(python=sys.executable, path=str(sock)), encoding="utf-8")
    path.chmod(0o755)


def serve(path: str) -> None:
    """Run commands until killed; print a line when ready."""
    for name in MODULES:
        importlib.import_module(f"ptd.{name}")
    importlib.import_module("ptd.cli")
    importlib.import_module("transformers.models.llama.modeling_llama")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps child processes that have answered
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    arguments, folder, environment = json.loads(connection.makefile().read())
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os._exit(_run(arguments, folder, environment))
    _, status = os.waitpid(pid, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
    os._exit(0)


def _run(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    from ptd.cli import main

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ptd", *arguments]
    code: int | str | None = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    serve(sys.argv[1])
