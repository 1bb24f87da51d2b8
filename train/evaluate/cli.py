"""Options of `ralf evaluate` and `ralf figures`.

Tables go to stdout and, with --out, as JSON and CSV into a folder; progress goes to stderr.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ralf.kernels.cli import DEVICE
from ralf.train.command_line import (
    DATA,
    OK,
    ONLY,
    Commands,
    Move,
    add_command,
    listed,
    progress,
)

if TYPE_CHECKING:
    from ralf.train.data.index import Index
    from ralf.train.evaluate.judge import JudgedModel
    from ralf.train.evaluate.tables.table import TableOptions


def evaluate_commands(subparsers: Commands) -> None:
    """Register `ralf evaluate` and `ralf figures`."""
    parser = add_command(subparsers, "evaluate", "measure models on labelled data, print a table",
                  _evaluate)  # fmt: skip
    _add_shared(parser)
    parser.add_argument("--table", default="intra", metavar="NAME",
                        help="intra, cross, robustness, ablation, backbone, pooling, "
                        "false_positives, aggregation, card, detectors or residual; "
                        "docs/training.md says what each shows")  # fmt: skip
    parser.add_argument("--conditions", default="", metavar="A,B",
                        help="damage the pictures in these ways, such as blur:2,h264=40 (default: "
                        "the table's own)")  # fmt: skip
    parser.add_argument("--groups", action="append", default=[], type=Path, metavar="CSV",
                        help="for the table card, count errors by group of people: a CSV with the "
                        "column file and some of age, gender, region; may be given several times",
                        )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write the table (JSON, CSV) and each video's score into this folder",
                        )  # fmt: skip
    figures = add_command(subparsers, "figures", "show what models learnt, in pictures: one page "
                          "for each model", _figures)  # fmt: skip
    _add_shared(figures)
    figures.add_argument("--out", type=Path, required=True, metavar="DIR",
                         help="write the pages into this folder: ROC, reliability, mask, "
                         "spectrum, Grad-CAM, embedding")  # fmt: skip


def _add_shared(parser: argparse.ArgumentParser) -> None:
    """Which models are judged, and on what."""
    parser.add_argument("models", nargs="+", metavar="MODEL",
                        help="NAME, NAME@VERSION, or the folder of a version or a run",
                        )  # fmt: skip
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help=DATA)
    parser.add_argument("--split", default="test", help="judge the faces of this split")
    parser.add_argument("--families", default="", metavar="A,B",
                        help="make forgeries of the reals with these families, or with all "
                        "(default: judge those of --data)")  # fmt: skip
    parser.add_argument("--frames", type=int, metavar="N",
                        help="judge N frames of each video (default: as many as the model "
                        "judges)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N",
                        help="judge only N videos of each class (default: all)")  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=A,B", help=ONLY)
    parser.add_argument(
        "--models", dest="judged_in", type=Path, metavar="DIR",
        help="take models from this folder instead of RALF_MODELS_DIR",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help=f"{DEVICE}; the network runs in FP32")


def _asked(args: argparse.Namespace, move: Move) -> "tuple[list[JudgedModel], Index, TableOptions]":
    """The models, the data, and what is judged of it."""
    from ralf.kernels.artifact import models_folder
    from ralf.train.data.layouts import read_all
    from ralf.train.evaluate.judge import open_model
    from ralf.train.evaluate.tables.table import TableOptions, read_groups
    from ralf.train.forge.families import FAMILIES

    folder = models_folder(args.judged_in)
    models = [open_model(spec, folder, device=args.device) for spec in args.models]
    options = TableOptions(
        split=args.split,
        families=FAMILIES if args.families == "all" else listed(args.families),
        conditions=listed(getattr(args, "conditions", "")),
        frames=args.frames,
        limit=args.limit,
        groups=read_groups(getattr(args, "groups", ())),
        on_progress=move,
    )
    return models, read_all(args.data).matching(args.only), options


def _evaluate(args: argparse.Namespace) -> int:
    from ralf.train.evaluate.tables import table
    from ralf.train.evaluate.tables.table import write_table

    with progress() as move:
        models, index, options = _asked(args, move)
        made = table(args.table, models, index, options)
    print(made)
    if args.out is not None:
        write_table(made, args.table, models, args.out)
    return OK


def _figures(args: argparse.Namespace) -> int:
    from ralf.train.evaluate.page import write_pages

    with progress() as move:
        models, index, options = _asked(args, move)
        args.out.mkdir(parents=True, exist_ok=True)
        pages = write_pages(models, index, options, args.out)
    for page in pages:
        print(page)
    if len(pages) < len(models):
        print(
            f"ralf: {len(models) - len(pages)} models without a page: nothing is forged in split "
            f"{args.split}; name --families, or data with forgeries",
            file=sys.stderr,
        )
    return OK
