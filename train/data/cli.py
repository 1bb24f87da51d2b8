"""`ralf data check | index | clips | prepare` and `ralf evaluate`: what is there, how good a model.

Tables go to stdout and, with --out, as JSON, CSV and pages into a folder; progress to stderr.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ralf.train.data.index import Index
    from ralf.train.evaluate.judge import Judge
    from ralf.train.evaluate.tables import Ask

Commands = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]
Refusing = Callable[[Run], Run]
OK, NOT_FINE = 0, 1


def data_commands(subparsers: Commands, refusing: Refusing) -> None:
    """Register `ralf data`."""
    parser = subparsers.add_parser("data", help="look at, index and prepare datasets")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    check = _add(
        verbs, "check", "counts against what is published, and every leak", refusing(_check)
    )
    check.add_argument("data", nargs="+", metavar="PATH", help="an index or any known layout")
    check.add_argument("--no-files", action="store_true", help="do not look for each file")
    index = _add(verbs, "index", "write the table of what is there", refusing(_index))
    index.add_argument("data", nargs="+", metavar="PATH")
    index.add_argument("--out", type=Path, required=True, metavar="CSV")
    index.add_argument("--split", action="store_true", help="draw new splits by identity")
    index.add_argument("--val", type=float, default=0.1, help="share for validation")
    index.add_argument("--test", type=float, default=0.1, help="share for testing")
    index.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE")
    clips = _add(verbs, "clips", "set stills in motion, real and forged, as encoded videos",
                 refusing(_clips))  # fmt: skip
    clips.add_argument("data", nargs="+", metavar="PATH")
    clips.add_argument("--out", type=Path, required=True, metavar="DIR")
    clips.add_argument("--split", default="val")
    clips.add_argument("--families", default="", metavar="A,B",
                       help="forgeries, in turn (all but the held-out one)")  # fmt: skip
    clips.add_argument("--crf", default="23,40", metavar="A,B", help="H.264's rates")
    clips.add_argument("--each", type=int, default=1, help="forged clips of a still and CRF")
    clips.add_argument("--seconds", type=float, default=1.3)
    clips.add_argument("--limit", type=int, help="only so many stills")
    clips.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE")
    clips.add_argument("--workers", type=int, default=0, help="processes; 0 works in this one")
    prepare = _add(verbs, "prepare", "cut faces out of videos; goes on where it stopped",
                   refusing(_prepare))  # fmt: skip
    prepare.add_argument("data", nargs="+", metavar="PATH")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR")
    prepare.add_argument("--recipe", default="ralf", help="whose input contract to follow")
    prepare.add_argument("--frames", type=int, help="frames of each video (the contract's)")
    prepare.add_argument("--workers", type=int, default=0, help="processes; 0 works in this one")
    prepare.add_argument("--device", default="cpu", help="where faces are found")
    prepare.add_argument("--png", action="store_true", help="store without loss")


def evaluate_commands(subparsers: Commands, refusing: Refusing) -> None:
    """Register `ralf evaluate`."""
    parser = _add(subparsers, "evaluate", "judge models on data: the paper's tables",
                  refusing(_evaluate))  # fmt: skip
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, folder, or run")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--table", default="intra", metavar="NAME",
                        help="intra, cross, robustness, ablation, backbone, pooling, "
                        "false_positives, aggregation, card, detectors")  # fmt: skip
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


def _add(verbs: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _check(args: argparse.Namespace) -> int:
    from ralf.train.data.check import check
    from ralf.train.data.layouts import read_all

    found = check(read_all(args.data), files=not args.no_files)
    print(found)
    return OK if found.fine else NOT_FINE


def _index(args: argparse.Namespace) -> int:
    from ralf.train.data.check import refuse_leaks
    from ralf.train.data.index import split_by_identity
    from ralf.train.data.layouts import read_all

    index = read_all(args.data).where(**_only(args.only))
    if args.split:
        index = split_by_identity(index, val=args.val, test=args.test)
    for leak in refuse_leaks(index, allowed=True)[:10]:
        print(f"leak: {leak}", file=sys.stderr)
    for note in index.notes:
        print(f"note: {note}", file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.parent.resolve() != index.root.resolve():
        index = index.elsewhere(args.out.parent)
    print(index.save(args.out))
    return OK


def _only(pairs: list[str]) -> dict[str, object]:
    """FIELD=VALUE, the value typed as the field."""
    from dataclasses import fields

    from ralf.train.data.index import Row

    whole = {field.name for field in fields(Row) if field.type in (int, "int")}
    known = {field.name for field in fields(Row)}
    wanted: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--only takes FIELD=VALUE with a field of {sorted(known)}: {pair!r}")
        wanted[name] = int(value) if name in whole else value
    return wanted


def _clips(args: argparse.Namespace) -> int:
    from ralf.train.data.layouts import read_all
    from ralf.train.forge.clips import INDEX, Wanted, make_clips
    from ralf.train.forge.families import FAMILIES
    from ralf.train.recipe import HELD_OUT

    seen = tuple(family for family in FAMILIES if family != HELD_OUT)
    bar = _Bar()
    made = make_clips(
        read_all(args.data).where(**_only(args.only)),
        args.out,
        Wanted(
            families=tuple(filter(None, args.families.split(","))) or seen,
            crfs=tuple(int(crf) for crf in args.crf.split(",")),
            each=args.each,
            seconds=args.seconds,
        ),
        split=args.split, limit=args.limit, workers=args.workers, watch=bar.move,
    )  # fmt: skip
    bar.end()
    print(f"{len(made)} clips", file=sys.stderr)
    print(args.out / INDEX)
    return OK


def _prepare(args: argparse.Namespace) -> int:
    from ralf.train.data.layouts import read_all
    from ralf.train.data.prepare import INDEX, VIDEOS, prepare
    from ralf.train.recipes import named

    bar = _Bar()
    made = prepare(
        read_all(args.data), args.out, named(args.recipe).data.input,
        frames=args.frames, workers=args.workers, device=args.device,
        quality=0 if args.png else 98,
        watch=lambda done, of, outcome: bar.move(
            done, of, f"{outcome.path}: {outcome.kept} faces {outcome.reason}".rstrip()
        ),
    )  # fmt: skip
    bar.end()
    print(f"{len(made)} faces; every file's end is in {args.out / VIDEOS}", file=sys.stderr)
    print(args.out / INDEX)
    return OK


def _evaluate(args: argparse.Namespace) -> int:

    from ralf.kernels.artifact import models_folder
    from ralf.train.data.layouts import read_all
    from ralf.train.evaluate.judge import judge_of, write_videos
    from ralf.train.evaluate.tables import Ask, table
    from ralf.train.forge.families import FAMILIES

    models = models_folder(args.judged_in)
    judges = [judge_of(spec, models, device=args.device) for spec in args.models]
    index = read_all(args.data).where(**_only(args.only))
    families = FAMILIES if args.families == "all" else tuple(filter(None, args.families.split(",")))
    bar = _Bar()
    ask = Ask(
        split=args.split,
        families=tuple(families),
        conditions=tuple(filter(None, args.conditions.split(","))),
        frames=args.frames,
        limit=args.limit,
        watch=bar.move,
    )
    made = table(args.table, judges, index, ask)
    bar.end()
    print(made)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        made.save(args.out / f"{args.table}.json")
        for judge in judges:
            own = [each for each in made.results if each.model == judge.name]
            write_videos(args.out / f"{judge.name}-{args.table}.csv", judge, own)
        if args.table == "intra":  # it scores all once more, which the larger tables cannot afford
            _pages(args, judges, index, ask)
    return OK


def _pages(args: argparse.Namespace, judges: "list[Judge]", index: "Index", ask: "Ask") -> None:
    """A page of figures for each model on the whole split."""
    from ralf.train.evaluate.judge import examples_for, result, score
    from ralf.train.evaluate.page import report

    for judge in judges:
        examples = examples_for(
            judge, index, ask.split, families=ask.families, frames=ask.frames, limit=ask.limit
        )
        found = result(judge, score(judge, examples), "clean", ask.replicates)
        if found.frames.forged > 0:
            print(report(judge, examples, found, args.out / f"{judge.name}.html"), file=sys.stderr)


class _Bar:
    """How far, on stderr: redrawn on a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def move(self, done: int, of: int, what: str = "") -> None:
        share = f"{done}/{of}"
        if self._live:
            filled = "█" * (20 * done // max(of, 1))
            print(f"\r\x1b[2K{filled:<20} {share} {what[:80]}", end="", file=sys.stderr, flush=True)
        elif done == of or done % max(1, of // 20) == 0:
            print(f"{share} {what}".rstrip(), file=sys.stderr)

    def end(self) -> None:
        if self._live:
            print(file=sys.stderr)
