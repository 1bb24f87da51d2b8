"""Options of `ralf forge fit | render`.  Progress goes to stderr, results to stdout."""

import argparse
import json
import sys
from pathlib import Path

from ralf.kernels.cli import DEVICE
from ralf.train.command_line import (
    DATA,
    INTERRUPTED,
    OK,
    WORKERS,
    Commands,
    add_command,
    changes_of,
    progress,
)


def forge_commands(subparsers: Commands) -> None:
    """Register `ralf forge`."""
    parser = subparsers.add_parser(
        "forge", help="train networks that draw forged faces (renderers), and let them draw"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    fit = add_command(verbs, "fit", "train a renderer on the authentic faces of the split "
                      "train; if stopped, the same command continues", _fit)  # fmt: skip
    fit.add_argument("name", metavar="RENDERER",
                     help="its kind: autoencoder, restorer, reconstructor or lip_sync")  # fmt: skip
    fit.add_argument("--data", nargs="+", required=True, metavar="PATH", help=DATA)
    fit.add_argument("--out", type=Path, required=True, metavar="FILE",
                     help="write the renderer to this safetensors file")  # fmt: skip
    fit.add_argument("--steps", type=int, metavar="N",
                     help="train N steps in all (default: what --print shows)")  # fmt: skip
    fit.add_argument("--minutes", type=float, metavar="N",
                     help="train N minutes at most, over all continuations (default: no limit)",
                     )  # fmt: skip
    fit.add_argument("--size", type=int, metavar="PX",
                     help="side of the pictures that it draws, in pixels (default: what --print "
                     "shows)")  # fmt: skip
    fit.add_argument("--seed", type=int, metavar="N",
                     help="seed of weights and batches (default: what --print shows)")  # fmt: skip
    fit.add_argument("--init", type=Path, metavar="PATH",
                     help="begin with the weights of this renderer's file; reconstructor also "
                     "takes the folder of a RALF's run (default: random weights)")  # fmt: skip
    fit.add_argument("--features", type=Path, metavar="FILE",
                     help="compare pictures by VGG16's features too, with the weights of this file "
                     "in torchvision's names (default: pixels only)")  # fmt: skip
    fit.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                     help="change an option that --print shows; may be given several times",
                     )  # fmt: skip
    fit.add_argument("--device", default="auto", help=DEVICE)
    fit.add_argument("--print", action="store_true", help="print all options and stop")
    render = add_command(verbs, "render", "forge each authentic face of a split; if stopped, the "
                         "same command continues", _render)  # fmt: skip
    render.add_argument("--data", nargs="+", required=True, metavar="PATH", help=DATA)
    render.add_argument("--with", dest="renderer", type=Path, required=True, metavar="FILE",
                        help="draw with this file of `ralf forge fit`")  # fmt: skip
    render.add_argument("--split", default="train", help="forge the authentic faces of this split")
    render.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="write pictures and their index into this folder")  # fmt: skip
    render.add_argument("--variants", type=int, default=1, metavar="N",
                        help="make N forgeries of each face")  # fmt: skip
    render.add_argument("--limit", type=int, metavar="N",
                        help="take only N authentic pictures (default: all)")  # fmt: skip
    render.add_argument("--workers", type=int, default=0, metavar="N", help=WORKERS)


def _fit(args: argparse.Namespace) -> int:
    from ralf.kernels.engine import pick_device
    from ralf.train.data.layouts import read_all
    from ralf.train.forge.renderers.fit import FitRequest, fit
    from ralf.train.forge.renderers.stored import kind
    from ralf.train.loop.loop import caught
    from ralf.train.losses.perceptual import perceptual
    from ralf.train.recipe_text import override, to_json

    changes = changes_of(args.set) | {
        name: str(value)
        for name in ("steps", "size", "seed")
        if (value := getattr(args, name)) is not None
    }
    options = override(kind(args.name).Options(), changes)
    if args.print:
        print(to_json(options))
        return OK
    with caught() as interrupt:
        request = FitRequest(
            name=args.name,
            options=options,
            out=args.out,
            minutes=args.minutes,
            device=pick_device(args.device),
            init=args.init,
            features=perceptual("vgg16", str(args.features)) if args.features else None,
            say=lambda text: print(f"ralf: {text}", file=sys.stderr, flush=True),
            interrupt=interrupt,
        )
        fitted = fit(read_all(args.data), request)
    facts = {name: value for name, value in fitted.record.items() if name != "losses"}
    last = fitted.record["losses"][-1:]
    print(json.dumps({"file": str(args.out), "ending": fitted.ending, "sha256": fitted.sha256,
                      **facts, "last": last[0] if last else None}))  # fmt: skip
    return INTERRUPTED if fitted.ending == "interrupted" else OK


def _render(args: argparse.Namespace) -> int:
    from ralf.train.data.layouts import read_all
    from ralf.train.forge.renderers.render import RenderRequest, render

    request = RenderRequest(
        renderer=args.renderer,
        split=args.split,
        out=args.out,
        variants=args.variants,
        limit=args.limit,
        workers=args.workers,
    )
    with progress() as move:
        made, path = render(read_all(args.data), request, on_progress=move)
    print(f"{len(made)} forged pictures", file=sys.stderr)
    print(path)
    return OK
