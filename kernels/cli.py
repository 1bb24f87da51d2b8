"""The commands of this room: `ralf models …` and `ralf build`.

`commands` adds parsers whose `run` takes the parsed arguments and returns the exit code.  Heavy
libraries are imported inside the commands, so that --help is instant.
"""

import argparse
from typing import Any

from ralf.kernels.build_cli import add_build
from ralf.kernels.models_cli import models_commands


def commands(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add every command of this room."""
    models_commands(subparsers)
    add_build(subparsers)
