"""Options of `ralf data check | index | clips | prepare`.  Progress goes to stderr."""

import argparse
import sys
from pathlib import Path

from ralf.train.command_line import (
    DATA,
    OK,
    ONLY,
    WORKERS,
    Commands,
    add_command,
    changes_of,
    listed,
    progress,
)

NOT_FINE = 1
KEPT_FRAMES = 32
"""Frames of a video to keep for training at the least."""


def data_commands(subparsers: Commands) -> None:
    """Register `ralf data`."""
    parser = subparsers.add_parser("data", help="check, list, split and prepare training data")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    check = add_command(
        verbs, "check", "compare counts with the published ones, and list missing files and "
        "people in two splits", _check,
    )  # fmt: skip
    check.add_argument("data", nargs="+", metavar="PATH", help=DATA)
    check.add_argument("--no-files", action="store_true", help="do not check that each file exists")
    index = add_command(verbs, "index", "write one table of all videos or pictures of the data",
                        _index)  # fmt: skip
    index.add_argument("data", nargs="+", metavar="PATH", help=DATA)
    index.add_argument("--out", type=Path, required=True, metavar="CSV", help="write this table")
    index.add_argument("--split", action="store_true",
                       help="divide the people into train, val and test anew")  # fmt: skip
    index.add_argument("--val", type=float, default=0.1, metavar="SHARE",
                       help="with --split, share of the people for val, 0 to 1")  # fmt: skip
    index.add_argument("--test", type=float, default=0.1, metavar="SHARE",
                       help="with --split, share of the people for test, 0 to 1")  # fmt: skip
    index.add_argument("--only", action="append", default=[], metavar="FIELD=A,B", help=ONLY)
    _add_clips(verbs)
    crops = add_command(verbs, "crops", "make and keep the pairs of crops that a recipe with "
                        "data.variants trains on; if stopped, the same command continues",
                        _crops)  # fmt: skip
    crops.add_argument("recipe", metavar="RECIPE", help="name of the recipe that will train")
    crops.add_argument("--data", nargs="+", required=True, metavar="PATH", help=DATA)
    crops.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="keep them in this folder, which `ralf train --crops` takes",
                       )  # fmt: skip
    crops.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="change a field of the recipe, as with `ralf train`; may be given "
                       "several times")  # fmt: skip
    crops.add_argument("--workers", type=int, default=0, metavar="N", help=WORKERS)
    prepare = add_command(verbs, "prepare", "cut the faces out of videos or pictures; if stopped, "
                          "the same command continues", _prepare)  # fmt: skip
    prepare.add_argument("data", nargs="+", metavar="PATH", help=DATA)
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR",
                         help="write faces and their index.csv into this folder")  # fmt: skip
    prepare.add_argument("--recipe", default="ralf", metavar="NAME",
                         help="find and cut faces as this recipe asks; name the one that you will "
                         "train")  # fmt: skip
    prepare.add_argument("--frames", type=int, metavar="N",
                         help="take N frames of each video (default: as many as the recipe judges, "
                         f"at least {KEPT_FRAMES})")  # fmt: skip
    prepare.add_argument("--workers", type=int, default=0, metavar="N", help=WORKERS)
    prepare.add_argument("--device", default="cpu", help="where faces are searched: auto, cpu, "
                         "cuda or cuda:N")  # fmt: skip
    prepare.add_argument("--png", action="store_true",
                         help="store faces as PNG, without loss (default: JPEG of quality 98)",
                         )  # fmt: skip


def _add_clips(verbs: Commands) -> None:
    clips = add_command(verbs, "clips", "make moving videos of still pictures, real and forged, to "
                        "calibrate and judge on", _clips)  # fmt: skip
    clips.add_argument("data", nargs="+", metavar="PATH", help=DATA)
    clips.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="write clips and their index.csv into this folder")  # fmt: skip
    clips.add_argument("--split", default="val", help="take the real pictures of this split")
    clips.add_argument("--families", default="", metavar="A,B",
                       help="forge with these families, in turn (default: all but the one held "
                       "out; with --renderers, none)")  # fmt: skip
    clips.add_argument("--renderers", nargs="*", type=Path, default=[], metavar="FILE",
                       help="forge with these files of `ralf forge fit` as well, in turn",
                       )  # fmt: skip
    clips.add_argument("--recipe", metavar="RECIPE",
                       help="find and forge faces as this recipe's data part says (default: as a "
                       "recipe does that changes nothing)")  # fmt: skip
    clips.add_argument("--crf", default="23,40", metavar="A,B",
                       help="encode each clip at these qualities of H.264, 0 (best) to 51",
                       )  # fmt: skip
    clips.add_argument("--each", type=int, default=1, metavar="N",
                       help="make N forged clips of each picture and quality")  # fmt: skip
    clips.add_argument("--seconds", type=float, default=1.3, help="length of a clip in seconds")
    clips.add_argument("--drift", action="store_true",
                       help="forge each frame anew, a little beside the last one, as tools that "
                       "work frame by frame do")  # fmt: skip
    clips.add_argument("--talk", action="store_true",
                       help="let the mouths move that a renderer of the kind lip_sync draws",
                       )  # fmt: skip
    clips.add_argument("--uploads", action="store_true",
                       help="make one more of each clip, encoded as by a phone and a platform",
                       )  # fmt: skip
    clips.add_argument("--limit", type=int, metavar="N", help="take only N pictures (default: all)")
    clips.add_argument("--only", action="append", default=[], metavar="FIELD=A,B", help=ONLY)
    clips.add_argument("--workers", type=int, default=0, metavar="N", help=WORKERS)


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
    from ralf.train.recipe import HELD_OUT
    from ralf.train.recipes import named

    seen = tuple(family for family in FAMILIES if family != HELD_OUT)
    options = ClipOptions(
        # Renderers alone, where they are given and no family is.
        families=listed(args.families) or (() if args.renderers else seen),
        renderers=tuple(args.renderers),
        crfs=tuple(int(crf) for crf in args.crf.split(",")),
        each=args.each,
        seconds=args.seconds,
        drift=args.drift,
        talk=args.talk,
        uploads=args.uploads,
    )
    with progress() as move:
        made = make_clips(
            read_all(args.data).matching(args.only),
            args.out,
            options,
            split=args.split,
            data=named(args.recipe).data if args.recipe else None,
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
    from ralf.train.recipe_text import override
    from ralf.train.recipes import named

    recipe = override(named(args.recipe), changes_of(args.set))
    with progress() as move:
        folder = fill(read_all(args.data), recipe.data, args.out, args.workers, move)
    print(folder)
    return OK


def _prepare(args: argparse.Namespace) -> int:
    from ralf.train.data.layouts import read_all
    from ralf.train.data.prepare import INDEX, VIDEOS, prepare
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
