"""What the commands of this room share: how one is registered, and how it refuses.

Exit codes: 0 done, 1 training diverged, 2 cannot be done as asked, 130 interrupted (and resumable).
"""

import argparse
import sys
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]
OK, DIVERGED, USAGE, INTERRUPTED = 0, 1, 2, 130


def refusing(run: Run) -> Run:
    """The command, its refusals as one line on stderr and an exit code."""

    def told(args: argparse.Namespace) -> int:
        from ralf.kernels.artifact import ArtifactError
        from ralf.kernels.engine import EngineError
        from ralf.train.loop.checkpoint import CheckpointError
        from ralf.train.loop.diverged import Diverged
        from ralf.train.loop.memory import keep_freed

        keep_freed()
        try:
            return run(args)
        except Diverged as error:
            print(f"ralf: {error}", file=sys.stderr)
            return DIVERGED
        # Recipes, indices, networks and calibration refuse by kinds of ValueError.
        except (ValueError, CheckpointError, ArtifactError, EngineError) as error:
            print(f"ralf: {error}", file=sys.stderr)
            return USAGE

    return told


def parser_of(subparsers: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=refusing(run))
    return parser
