"""`ralf bench engine`, `dct` and `residual`: their options.

Imports torch only when they run.  `python -m kernels.bench_cli` is the same without the service's
libraries, for a GPU host that has only torch.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

FAILED = 1


def add_benches(what: "argparse._SubParsersAction[Any]") -> None:
    """Add them to the verbs of `ralf bench`."""
    from ralf.kernels.models_cli import guarded

    engine = what.add_parser(
        "engine",
        help="every engine of a model against the papers' way of running it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    engine.add_argument("model", nargs="?", metavar="MODEL", help="NAME, NAME@VERSION or a path")
    engine.add_argument("--models", metavar="DIR", help="folder of models")
    engine.add_argument("--fresh", choices=["ralf", "ralf-small"], help="with fresh weights")
    engine.add_argument("--size", type=int, default=256, help="side of a crop, with --fresh")
    engine.add_argument("--build", action="store_true", help="build plans first")
    engine.add_argument("--compile", action="store_true", help="on a CPU, torch.compile as well")
    engine.add_argument("--batch", type=int, help="crops a call; 64 on a GPU, 4 on a CPU")
    engine.add_argument("--repeats", type=int, default=7)
    _device_and_out(engine)
    engine.set_defaults(run=guarded(_engine))
    dct = what.add_parser(
        "dct",
        help="the destructor, fused and by other ways",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    dct.add_argument("--size", type=int, default=256, help="side of a crop")
    dct.add_argument("--batch", type=int, help="crops; 64 on a GPU, 2 on a CPU")
    dct.add_argument("--repeats", type=int, default=21)
    dct.add_argument("--tilings", action="store_true", help="each listed tiling of the kernels")
    _device_and_out(dct)
    dct.set_defaults(run=guarded(_dct))
    residual = what.add_parser(
        "residual",
        help="a level of the reconstructor by the ways that might be faster",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    residual.add_argument("--channels", type=int, default=32)
    residual.add_argument("--size", type=int, default=256, help="side of a map")
    residual.add_argument("--blocks", type=int, default=8)
    residual.add_argument("--batch", type=int, help="maps; 64 on a GPU, 1 on a CPU")
    residual.add_argument("--repeats", type=int, default=7)
    residual.add_argument("--calls", type=int, default=3, help="calls a turn")
    _device_and_out(residual)
    residual.set_defaults(run=guarded(_residual))


def _device_and_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", metavar="DIR", help="keep the record there, as bench/ does")


def _engine(args: argparse.Namespace) -> int:
    from ralf.kernels.bench.engine import run_engine

    return _told(run_engine, args)


def _dct(args: argparse.Namespace) -> int:
    from ralf.kernels.bench.dct import run_dct

    return _told(run_dct, args)


def _residual(args: argparse.Namespace) -> int:
    from ralf.kernels.bench.residual import run_residual

    return _told(run_residual, args)


def _told(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    from ralf.kernels.engine import EngineError

    try:
        return run(args)
    except EngineError as error:
        print(f"ralf bench: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    alone = argparse.ArgumentParser(prog="python -m ralf.kernels.bench.cli", description=__doc__)
    add_benches(alone.add_subparsers(dest="what", required=True, metavar="WHAT"))
    arguments = alone.parse_args()
    sys.exit(arguments.run(arguments))
