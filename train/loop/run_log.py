"""What a run reports while it trains: a line on stderr, a JSONL file, TensorBoard scalars.

The line is redrawn in place on a terminal, and printed every ten seconds elsewhere.  The JSONL file
and TensorBoard hold the same facts.  When a run goes on from a checkpoint, what was written after
that checkpoint is cut off first, so that each step stands there once.
"""

import json
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from ralf.kernels.atomic_files import replace_lines

LOG = "log.jsonl"
PRINT_S = 10.0
REDRAW_S = 0.2


class RunLog:
    """Writes facts into files of `run`, and words to `stream`; None for either writes nothing."""

    def __init__(self, run: Path | None, step: int, stream: TextIO | None) -> None:
        self._stream = stream
        self._line: Live | None = None
        if stream is not None and stream.isatty():
            # Drawn by the loop itself: a thread that draws would take time from the training.
            self._line = Live(console=Console(file=stream), auto_refresh=False, transient=True)
        self._shown_s = float("-inf")
        self._files: tuple[TextIO, SummaryWriter] | None = None
        if run is not None:
            # Steps after the last checkpoint are trained again, and would stand in the log twice.
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
        """The line that shows how far the run is."""
        now_s = time.monotonic()
        if now_s - self._shown_s < (REDRAW_S if self._line else PRINT_S):
            return
        self._shown_s = now_s
        if self._line is None:
            self.say(text)
            return
        self._line.start()
        # One line, cut at the terminal's width: a wrapped one could not be redrawn.
        self._line.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._line is not None:
            self._line.stop()
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Give the terminal back, and flush everything."""
        if self._line is not None:
            self._line.stop()
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
