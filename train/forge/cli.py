"""Options of `ralf forge fit | render`.  Progress goes to stderr, results to stdout."""

import argparse
import json
import sys
from pathlib import Path

from ralf.train.data.cli import Commands, Refusing, add_command

OK, INTERRUPTED = 0, 130


def forge_commands(subparsers: Commands, refusing: Refusing) -> None:
    """Register `ralf forge`."""
    parser = subparsers.add_parser("forge", help="train renderers of forged faces, and render")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    fit = add_command(verbs, "fit", "train a renderer on the train split's authentic faces; "
                      "the same command goes on", refusing(_fit))  # fmt: skip
    fit.add_argument("name", metavar="RENDERER", help="autoencoder, restorer, reconstructor, …")
    fit.add_argument("--data", nargs="+", required=True, metavar="PATH")
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="one safetensors file")
    fit.add_argument("--steps", type=int, help="steps in all (the renderer's)")
    fit.add_argument("--minutes", type=float, help="time box, over all commands")
    fit.add_argument("--size", type=int, help="side of what it draws, in pixels (the renderer's)")
    fit.add_argument("--seed", type=int, help="of weights and batches")
    fit.add_argument("--init", type=Path, metavar="PATH",
                     help="first weights: a renderer's file, or a run for some")  # fmt: skip
    fit.add_argument("--features", type=Path, metavar="FILE",
                     help="VGG16's weights with torchvision's names (without: none)")  # fmt: skip
    fit.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                     help="change an option of the renderer, repeatable")  # fmt: skip
    fit.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    fit.add_argument("--print", action="store_true", help="print the options and stop")
    render = add_command(verbs, "render", "forge each authentic face of a split; goes on where it "
                         "stopped", refusing(_render))  # fmt: skip
    render.add_argument("--data", nargs="+", required=True, metavar="PATH")
    render.add_argument("--with", dest="renderer", type=Path, required=True, metavar="FILE",
                        help="a file of `ralf forge fit`")  # fmt: skip
    render.add_argument("--split", default="train")
    render.add_argument("--out", type=Path, required=True, metavar="DIR")
    render.add_argument("--variants", type=int, default=1, help="forgeries of each face")
    render.add_argument("--limit", type=int, help="only so many authentic pictures")
    render.add_argument("--workers", type=int, default=0, help="processes; 0 works in this one")


def _fit(args: argparse.Namespace) -> int:
    from ralf.kernels.engine import pick_device
    from ralf.train.data.layouts import read_all
    from ralf.train.forge.renderers.fit import FitRequest, fit
    from ralf.train.forge.renderers.stored import kind
    from ralf.train.loop.loop import caught
    from ralf.train.losses.perceptual import perceptual
    from ralf.train.recipe_text import RecipeError, override, to_json

    pairs = [change.partition("=") for change in args.set]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise RecipeError(f"--set takes NAME=VALUE, not {bad[0]!r}")
    changes = {name: text for name, _, text in pairs}
    changes |= {
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
    from ralf.train.progress import progress

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
