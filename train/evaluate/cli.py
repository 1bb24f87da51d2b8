"""Options of `ralf evaluate`.

Tables go to stdout and, with --out, as JSON, CSV and pages into a folder; progress goes to stderr.
"""

import argparse
import sys
from pathlib import Path

from ralf.train.data.cli import OK, Commands, Refusing, add_command, listed


def evaluate_commands(subparsers: Commands, refusing: Refusing) -> None:
    """Register `ralf evaluate`."""
    parser = add_command(subparsers, "evaluate", "judge models on data: the paper's tables",
                  refusing(_evaluate))  # fmt: skip
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, folder, or run")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--table", default="intra", metavar="NAME",
                        help="intra, cross, robustness, ablation, backbone, pooling, "
                        "false_positives, aggregation, card, detectors, residual")  # fmt: skip
    parser.add_argument("--split", default="test")
    parser.add_argument("--families", default="", metavar="A,B",
                        help="forgeries to blend from the reals, or all")  # fmt: skip
    parser.add_argument("--conditions", default="", metavar="A,B", help="as blur:2,h264=40")
    parser.add_argument("--frames", type=int, help="frames of each video (the model's own)")
    parser.add_argument("--limit", type=int, help="only so many videos of each class")
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument(
        "--models", dest="judged_in", type=Path, metavar="DIR", help="where models lie"
    )
    parser.add_argument("--device", default="cpu", help="FP32 either way")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="table.json, videos.csv; for intra a page each too")  # fmt: skip


def _evaluate(args: argparse.Namespace) -> int:
    from ralf.kernels.artifact import models_folder
    from ralf.train.data.index import parse_fields
    from ralf.train.data.layouts import read_all
    from ralf.train.evaluate.judge import open_model
    from ralf.train.evaluate.page import write_pages
    from ralf.train.evaluate.tables import table
    from ralf.train.evaluate.tables.table import TableOptions, write_table
    from ralf.train.forge.families import FAMILIES
    from ralf.train.progress import progress

    folder = models_folder(args.judged_in)
    models = [open_model(spec, folder, device=args.device) for spec in args.models]
    index = read_all(args.data).where(**parse_fields(args.only))
    with progress() as move:
        options = TableOptions(
            split=args.split,
            families=FAMILIES if args.families == "all" else listed(args.families),
            conditions=listed(args.conditions),
            frames=args.frames,
            limit=args.limit,
            on_progress=move,
        )
        made = table(args.table, models, index, options)
    print(made)
    if args.out is not None:
        write_table(made, args.table, models, args.out)
        if args.table == "intra":  # pages score all once more, which a larger table cannot afford
            for page in write_pages(models, index, options, args.out):
                print(page, file=sys.stderr)
    return OK
