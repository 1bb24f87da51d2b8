"""What a run tells while it trains: a line on stderr, a JSONL file, TensorBoard scalars.

The line is redrawn in place on a terminal and printed every ten seconds elsewhere.  The JSONL file
and TensorBoard hold the same facts; when a run goes on from a checkpoint, what was written
after that checkpoint is cut off first, so that each step stands there once.
"""

import json
import sys
import time
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from kernels.disk import replace_lines

LOG = "log.jsonl"
PRINT_S = 10.0
REDRAW_S = 0.2


class Journal:
    """One run's telling; with quiet=True nothing is told (the processes after the first)."""

    def __init__(self, run: Path, step: int, *, quiet: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._told_s = 0.0
        self._drawn = False
        if quiet:
            return
        _cut(run / LOG, step)
        self._log = (run / LOG).open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step)

    def record(self, event: str, step: int, facts: dict[str, float | int | str | None]) -> None:
        """One line of JSON, and each number as a scalar of TensorBoard."""
        if self._quiet:
            return
        line = {"event": event, "step": step, **facts}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        for name, value in facts.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{event}/{name}", value, step)

    def progress(self, text: str) -> None:
        """The live line."""
        if self._quiet:
            return
        live = self._stream.isatty()
        now = time.monotonic()
        if now - self._told_s < (REDRAW_S if live else PRINT_S):
            return
        self._told_s = now
        self._drawn = live
        self._stream.write(f"\r\x1b[2K{text}" if live else f"{text}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        self._stream.write(f"\r\x1b[2K{text}\n" if self._drawn else f"{text}\n")
        self._drawn = False
        self._stream.flush()

    def close(self) -> None:
        """Flush everything."""
        if not self._quiet:
            self._log.close()
            self._board.close()


def _cut(path: Path, step: int) -> None:
    """Take out lines after the step, and a last line that a kill cut in two."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    replace_lines(path, kept)
