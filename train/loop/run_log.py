"""What a run tells while it trains: a line on stderr, a JSONL file, TensorBoard scalars.

The line is redrawn in place on a terminal and printed every ten seconds elsewhere.  The JSONL file
and TensorBoard hold the same facts; when a run goes on from a checkpoint, what was written
after that checkpoint is cut off first, so that each step stands there once.
"""

import json
import time
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from ralf.kernels.atomic_files import replace_lines

LOG = "log.jsonl"
PRINT_S = 10.0
REDRAW_S = 0.2


class RunLog:
    """One run's telling: files into `run`, words onto `stream`; None for either is silence."""

    def __init__(self, run: Path | None, step: int, stream: TextIO | None) -> None:
        self._stream = stream
        self._told_s = float("-inf")
        self._drawn = False
        self._files: tuple[TextIO, SummaryWriter] | None = None
        if run is not None:
            _cut(run / LOG, step)
            board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
            self._files = ((run / LOG).open("a"), board)

    def record(self, event: str, step: int, facts: dict[str, float | int | str | None]) -> None:
        """One line of JSON, and each number as a scalar of TensorBoard."""
        if self._files is None:
            return
        log, board = self._files
        log.write(json.dumps({"event": event, "step": step, **facts}) + "\n")
        log.flush()
        for name, value in facts.items():
            if isinstance(value, int | float):
                board.add_scalar(f"{event}/{name}", value, step)

    def progress(self, text: str) -> None:
        """The live line."""
        if self._stream is None:
            return
        live = self._stream.isatty()
        now_s = time.monotonic()
        if now_s - self._told_s < (REDRAW_S if live else PRINT_S):
            return
        self._told_s = now_s
        self._drawn = live
        self._stream.write(f"\r\x1b[2K{text}" if live else f"{text}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._stream is None:
            return
        self._stream.write(f"\r\x1b[2K{text}\n" if self._drawn else f"{text}\n")
        self._drawn = False
        self._stream.flush()

    def close(self) -> None:
        """Flush everything."""
        for file in self._files or ():
            file.close()


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
