"""Options of `ralf data check | index | clips | prepare`.  Progress goes to stderr."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]
Refusing = Callable[[Run], Run]
OK, NOT_FINE = 0, 1
KEPT_FRAMES = 32
"""Frames of a video to keep for training at the least."""


def data_commands(subparsers: Commands, refusing: Refusing) -> None:
    """Register `ralf data`."""
    parser = subparsers.add_parser("data", help="check, index and prepare datasets")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    check = add_command(
        verbs, "check", "counts against what is published, and every leak", refusing(_check)
    )
    check.add_argument("data", nargs="+", metavar="PATH", help="an index or any known layout")
    check.add_argument("--no-files", action="store_true", help="do not check that each file exists")
    index = add_command(verbs, "index", "write the table of what is there", refusing(_index))
    index.add_argument("data", nargs="+", metavar="PATH")
    index.add_argument("--out", type=Path, required=True, metavar="CSV")
    index.add_argument("--split", action="store_true", help="draw new splits by identity")
    index.add_argument("--val", type=float, default=0.1, help="share for validation")
    index.add_argument("--test", type=float, default=0.1, help="share for testing")
    index.add_argument("--only", action="append", default=[], metavar="FIELD=A,B")
    clips = add_command(verbs, "clips", "set stills in motion, real and forged, as encoded videos",
                 refusing(_clips))  # fmt: skip
    clips.add_argument("data", nargs="+", metavar="PATH")
    clips.add_argument("--out", type=Path, required=True, metavar="DIR")
    clips.add_argument("--split", default="val")
    clips.add_argument("--families", default="", metavar="A,B",
                       help="forgeries, in turn (all but the held-out one)")  # fmt: skip
    clips.add_argument("--renderers", nargs="*", type=Path, default=[], metavar="FILE",
                       help="files of `ralf forge fit`, in turn with the families")  # fmt: skip
    clips.add_argument("--crf", default="23,40", metavar="A,B", help="H.264's rates")
    clips.add_argument("--each", type=int, default=1, help="forged clips of a still and CRF")
    clips.add_argument("--seconds", type=float, default=1.3)
    clips.add_argument("--drift", action="store_true",
                       help="forge each frame anew, on landmarks that slip")  # fmt: skip
    clips.add_argument("--uploads", action="store_true",
                       help="one more clip of each, encoded by phone and platform")  # fmt: skip
    clips.add_argument("--limit", type=int, help="only so many stills")
    clips.add_argument("--only", action="append", default=[], metavar="FIELD=A,B")
    clips.add_argument("--workers", type=int, default=0, help="processes; 0 works in this one")
    crops = add_command(verbs, "crops", "make the pairs that a recipe with data.variants shows, "
                        "and keep them; goes on where it stopped", refusing(_crops))  # fmt: skip
    crops.add_argument("recipe", metavar="RECIPE")
    crops.add_argument("--data", nargs="+", required=True, metavar="PATH")
    crops.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="as `ralf train --crops`")  # fmt: skip
    crops.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="as `ralf train --set`")  # fmt: skip
    crops.add_argument("--workers", type=int, default=0, help="processes; 0 works in this one")
    prepare = add_command(verbs, "prepare", "cut faces out of videos; goes on where it stopped",
                   refusing(_prepare))  # fmt: skip
    prepare.add_argument("data", nargs="+", metavar="PATH")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR")
    prepare.add_argument("--recipe", default="ralf", help="whose input contract to follow")
    prepare.add_argument("--frames", type=int, help="frames of each video (the contract's, at "
                         f"least {KEPT_FRAMES})")  # fmt: skip
    prepare.add_argument("--workers", type=int, default=0, help="processes; 0 works in this one")
    prepare.add_argument("--device", default="cpu", help="where faces are found")
    prepare.add_argument("--png", action="store_true", help="store without loss")


def add_command(verbs: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    """A command whose help shows its defaults."""
    parser: argparse.ArgumentParser = verbs.add_parser(
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

    index = read_all(args.data).matching(args.only)
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


def _clips(args: argparse.Namespace) -> int:
    from ralf.train.data.layouts import read_all
    from ralf.train.forge.clips import INDEX, ClipOptions, make_clips
    from ralf.train.forge.families import FAMILIES
    from ralf.train.progress import progress
    from ralf.train.recipe import HELD_OUT

    seen = tuple(family for family in FAMILIES if family != HELD_OUT)
    options = ClipOptions(
        # Renderers alone, where they are given and no family is.
        families=listed(args.families) or (() if args.renderers else seen),
        renderers=tuple(args.renderers),
        crfs=tuple(int(crf) for crf in args.crf.split(",")),
        each=args.each,
        seconds=args.seconds,
        drift=args.drift,
        uploads=args.uploads,
    )
    with progress() as move:
        made = make_clips(
            read_all(args.data).matching(args.only),
            args.out,
            options,
            split=args.split,
            limit=args.limit,
            workers=args.workers,
            on_progress=move,
        )
    print(f"{len(made)} clips", file=sys.stderr)
    print(args.out / INDEX)
    return OK


def _crops(args: argparse.Namespace) -> int:
    from ralf.train.data.fill_crops import fill
    from ralf.train.data.layouts import read_all
    from ralf.train.progress import progress
    from ralf.train.recipe_text import RecipeError, override
    from ralf.train.recipes import named

    pairs = [change.partition("=") for change in args.set]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    recipe = override(named(args.recipe), {name: text for name, _, text in pairs})
    with progress() as move:
        folder = fill(read_all(args.data), recipe.data, args.out, args.workers, move)
    print(folder)
    return OK


def _prepare(args: argparse.Namespace) -> int:
    from ralf.train.data.layouts import read_all
    from ralf.train.data.prepare import INDEX, VIDEOS, prepare
    from ralf.train.progress import progress
    from ralf.train.recipes import named

    contract = named(args.recipe).data.input
    with progress() as move:
        made = prepare(
            read_all(args.data),
            args.out,
            contract,
            # A verdict may need one frame of a video; training draws other ones in each epoch.
            frames=args.frames or max(contract.sampling.max_frames, KEPT_FRAMES),
            workers=args.workers,
            device=args.device,
            quality=0 if args.png else 98,
            on_progress=lambda done, of, outcome: move(done, of, str(outcome)),
        )
    print(
        f"{len(made)} faces; what became of every file is in {args.out / VIDEOS}", file=sys.stderr
    )
    print(args.out / INDEX)
    return OK


def listed(text: str) -> tuple[str, ...]:
    """A,B as a tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
