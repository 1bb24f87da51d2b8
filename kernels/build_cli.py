"""`ralf build`: from a published model to plans, and to which engine is fastest here."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ralf.kernels.build import BuildRequest
    from ralf.kernels.plans import Measured, Plan

FAILED = 1


def add_build(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the command."""
    from ralf.kernels.models_cli import guarded

    parser = subparsers.add_parser(
        "build",
        help="build a model's TensorRT plan, check it, publish it",
        description="Builds a TensorRT plan of a model, checks it against the FP32 module, and "
        "publishes it beside the model; or refuses it and says why.",
    )
    parser.add_argument("model", metavar="ARTIFACT", help="NAME, NAME@VERSION or a path")
    parser.add_argument("--models", metavar="DIR", help="folder of models")
    parser.add_argument("--batch", default="1,8,64", metavar="N,…", help="batches (%(default)s)")
    parser.add_argument("--precision", default="fp16", help="fp16 or fp32; bf16 on a GPU")
    parser.add_argument(
        "--builder",
        choices=["torch-tensorrt", "rtx-aot"],
        help="torch-tensorrt needs a GPU; rtx-aot does not (default: by what is here)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--crops", type=int, metavar="N", help="random crops to decide on")
    parser.add_argument("--again", action="store_true", help="even if the plan is there")
    parser.add_argument(
        "--all",
        action="store_true",
        help="by every builder that is here; then time every engine and record the fastest",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=guarded(run_build))


def run_build(args: argparse.Namespace) -> int:
    """Build, and with --all time."""
    from ralf.kernels.artifact import resolve
    from ralf.kernels.build import BuildRequest, available, build
    from ralf.kernels.choose_engine import measure
    from ralf.kernels.engine import EngineError, pick_device
    from ralf.kernels.models_cli import folder

    try:
        buckets = tuple(int(batch) for batch in args.batch.split(","))
    except ValueError:
        print(f"ralf: --batch takes sizes as 1,8,64, got {args.batch!r}", file=sys.stderr)
        return 2
    artifact = resolve(folder(args), args.model)
    made: list[Plan] = []
    failed = 0
    fastest: Measured | None = None
    try:
        device = pick_device(args.device)
        order = BuildRequest(
            artifact, args.precision, buckets, device, crops=args.crops, again=args.again, say=note
        )
        builders = available() if args.all and not args.builder else [args.builder]
        for builder in builders:
            try:
                made.append(build(order, builder))
            except EngineError as error:
                # with --all one builder's failure must not hide what the others make
                failed += 1
                note(str(error))
        if args.all:
            fastest = measure(artifact, device, say=note)
    except EngineError as error:
        note(str(error))
        return FAILED
    report(args, order, made, fastest)
    return FAILED if failed else 0


def note(line: str) -> None:
    """Progress and complaints."""
    print(f"ralf: {line}", file=sys.stderr, flush=True)


def report(
    args: argparse.Namespace, order: "BuildRequest", made: "list[Plan]", fastest: "Measured | None"
) -> None:
    """What was made, on stdout."""
    if args.json:
        document = {
            "model": order.artifact.label,
            "plans": [plan.record.model_dump(mode="json", by_alias=True) for plan in made],
            "fastest": fastest and fastest.model_dump(mode="json"),
        }
        print(json.dumps(document, ensure_ascii=False))
        return
    for plan in made:
        error = plan.record.error
        print(
            f"{plan.key}  {plan.record.state}  {plan.record.size_bytes / 1e6:.1f} MB  "
            f"within {error.get('golden', 0):.4f} of the reference "
            f"(budget {error.get('budget', 0):.4f})"
        )
    if fastest:
        print(f"fastest here: {fastest.engine}, {fastest.faces_per_s[fastest.engine]} faces/s")
