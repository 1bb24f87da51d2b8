"""A `ralf` that starts at once: a process that has imported all of it forks for each command.

    python -m tests.ready_ralf SOCKET          serve until killed
    program(folder, socket)                    write the program `ralf` that asks it

The documents' blocks run some twenty commands.  Each would import torch for seconds; here one
process has done so, and a fork of it runs the command with the caller's arguments, folder,
environment and files.  `serve`, which lives on, and python files given as `ralf FILE.py` too.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
if sys.argv[1:2] == ["serve"]:
    os.execv({python!r}, [{python!r}, "-m", "ralf", *sys.argv[1:]])
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as to:
    to.connect({place!r})
    socket.send_fds(to, [len(asked).to_bytes(4, "big")], [0, 1, 2])
    to.sendall(asked)
    answer = to.recv(1)
sys.exit(answer[0] if answer else 70)
"""


def program(folder: Path, place: Path) -> None:
    """Write the executable `ralf`."""
    folder.mkdir(exist_ok=True)
    (folder / "ralf").write_text(CLIENT.format(python=sys.executable, place=str(place)))
    (folder / "ralf").chmod(0o755)


def serve(place: str) -> None:
    """Fork for each command that comes."""
    # What a scan imports only when it runs.
    import ralf.kernels.engine_torch
    import ralf.worker.doctor
    import ralf.worker.media.mtcnn
    import ralf.worker.page.page
    import ralf.worker.runtime  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        while True:
            caller, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(caller)
            caller.close()


def _answer(caller: socket.socket) -> None:
    """Run the caller's command and tell its exit code; does not return."""
    code = 70
    try:
        head, files, _, _ = socket.recv_fds(caller, 4, 3)
        left, parts = int.from_bytes(head, "big"), b""
        while len(parts) < left:
            parts += caller.recv(1 << 16)
        words, folder, environment = json.loads(parts)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = _run(words)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        caller.sendall(bytes([code & 255]))
        os._exit(code & 255)


def _run(words: list[str]) -> int:
    from ralf.__main__ import main

    try:
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
            return 0
        return main(words) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


if __name__ == "__main__":
    serve(sys.argv[1])
