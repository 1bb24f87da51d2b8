"""The command `ralf`, also as `python -m ralf`: the commands of all three rooms in one parser."""

import sys
from collections.abc import Sequence

from ralf.train.cli import commands as train
from ralf.worker.cli.main import main as run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return run(arguments, more=[train])


if __name__ == "__main__":
    sys.exit(main())
