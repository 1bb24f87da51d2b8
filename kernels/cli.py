"""`ralf models …`, `ralf build` and `ralf bench engine|dct|residual`: options and output.

Results go to stdout, errors and the answers of checks to stderr.  Exit codes: 0 done, 1 a model
that does not verify or a check that fails, 2 usage, 5 no such model, or no queue to ask which
versions its jobs pin.

`commands` is registered under the entry-point group `ralf.commands`; it adds parsers whose `run`
takes the parsed arguments and returns the exit code.  Commands import what they need when they run,
so that --help is instant.  `python -m ralf.kernels.cli` runs them without the service's libraries,
on a GPU host that has only torch.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ralf.kernels.artifact import Artifact
    from ralf.kernels.build import BuildRequest
    from ralf.kernels.plans import Measured, Plan

Run = Callable[[argparse.Namespace], int]
FAILED, USAGE, INFRASTRUCTURE = 1, 2, 5
SPEC = "NAME, NAME@VERSION or a folder; NAME alone is its promoted version"
DEVICE = "where the network runs: auto, cpu, cuda or cuda:N"


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows an option's default where there is one; the library's own shows None and False too."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        if says_nothing or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose help, and that of all its commands, shows defaults."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": Defaults, **options})


def commands(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add every command of this package but the benchmarks, which are verbs of `ralf bench`."""
    models_commands(subparsers)
    add_build(subparsers)


def models_commands(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add `models` and its verbs."""
    models = subparsers.add_parser("models", help="list, check, promote and roll back models")
    verbs = models.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Run, about: str, **argument: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + "."
        )
        if argument:
            parser.add_argument("model", **argument)
        parser.add_argument(
            "--models",
            metavar="DIR",
            help="folder of models (default: RALF_MODELS_DIR, else the one that ships with Ralf)",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        parser.set_defaults(run=guarded(run))
        return parser

    verb("list", list_models, "list all models and versions; * marks the promoted ones")
    verb(
        "show",
        show_model,
        "show a version's manifest, engines, history and card",
        metavar="MODEL",
        help=SPEC,
    )
    verify = verb(
        "verify",
        verify_model,
        "check a version's hashes, and its results on the stored golden crops",
        metavar="MODEL",
        help=SPEC,
    )
    verify.add_argument("--device", default="cpu", help=DEVICE)
    promote = verb(
        "promote",
        promote_model,
        "make a version the one in use, if it passes the checks",
        metavar="NAME@VERSION",
        help="the version; `ralf models list` shows all",
    )
    promote.add_argument(
        "--force",
        action="store_true",
        help="promote although a check fails; the history records which one",
    )
    verb(
        "rollback",
        roll_back,
        "go back to the version that was in use before",
        metavar="NAME",
        help="the model's name",
    )
    old = verb(
        "gc",
        collect_old,
        "list which old versions may be removed, and why the others stay",
        metavar="NAME",
        help="the model's name",
    )
    old.add_argument("--apply", action="store_true", help="remove the versions that may go")
    old.add_argument("--keep", type=int, default=3, metavar="N", help="keep the N newest versions")
    old.add_argument(
        "--recent",
        type=int,
        default=5,
        metavar="N",
        help="keep the versions of the last N promotions",
    )
    old.add_argument(
        "--spare",
        action="append",
        default=[],
        metavar="VERSION",
        help="keep this version too; may be given several times",
    )
    old.add_argument(
        "--no-queue",
        action="store_true",
        help="do not ask Redis which versions waiting jobs need",
    )
    fresh = verb("untrained", make_untrained, "publish and promote a model with random weights")
    fresh.add_argument("--base", type=int, default=16, metavar="N", help="channels of the network")
    fresh.add_argument("--blocks", type=int, default=4, metavar="N", help="blocks in each level")
    fresh.add_argument(
        "--size", type=int, default=256, metavar="PX", help="side of a crop in pixels"
    )


def guarded(run: Run) -> Run:
    """Turn an error of ours into one line on stderr and an exit code."""

    def run_guarded(args: argparse.Namespace) -> int:
        from ralf.kernels.artifact import ArtifactError, NotFound

        try:
            return run(args)
        except NotFound as error:
            print(f"ralf: {error}", file=sys.stderr)
            return INFRASTRUCTURE
        except ArtifactError as error:
            print(f"ralf: {error}", file=sys.stderr)
            return FAILED

    return run_guarded


def folder(args: argparse.Namespace) -> Path:
    """The folder of models: the option, the environment, or the one that comes with the code."""
    from ralf.kernels.artifact import models_folder

    return models_folder(args.models)


def print_result(args: argparse.Namespace, document: dict[str, Any], line: str) -> None:
    """Print one result: as JSON if asked for, else as a line."""
    print(json.dumps(document, ensure_ascii=False) if args.json else line)


def label_of(artifact: "Artifact") -> dict[str, Any]:
    """What every JSON result says about a model."""
    return {
        "name": artifact.name,
        "version": artifact.version,
        "path": str(artifact.path),
        "untrained": artifact.manifest.untrained,
    }


def list_models(args: argparse.Namespace) -> int:
    """Every version with its state; a damaged one makes the exit code 1."""
    from ralf.kernels.artifact import ArtifactError, names, open_artifact, promoted, versions

    root, rows = folder(args), []
    for name in names(root):
        current = promoted(root, name)
        for version in versions(root, name):
            row: dict[str, Any] = {"name": name, "version": version, "current": version == current}
            try:
                artifact = open_artifact(root / name / version)
                row |= {"state": "untrained" if artifact.manifest.untrained else "ok"}
            except ArtifactError as error:
                # A row like the others: one damaged version must not hide the rest.
                row |= {"state": "damaged", "reason": str(error)}
            rows.append(row)
    if args.json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        for row in rows:
            mark = "*" if row["current"] else " "
            reason = f"  {row['reason']}" if "reason" in row else ""
            print(f"{mark} {row['name']}@{row['version']}  {row['state']}{reason}")
        if not rows:
            print(f"no models in {root}", file=sys.stderr)
    return FAILED if any(row["state"] == "damaged" for row in rows) else 0


def show_model(args: argparse.Namespace) -> int:
    """Manifest, engines and history; the card too, unless JSON was asked for."""
    from ralf.kernels.artifact import resolve
    from ralf.kernels.plans import plans, refused
    from ralf.kernels.registry import events

    artifact = resolve(folder(args), args.model)
    document = artifact.manifest.model_dump(mode="json", by_alias=True)
    built = [{"key": str(plan.key), "state": plan.record.state} for plan in plans(artifact)]
    past = events(artifact.path.parent)
    mine = [asdict(event) for event in past if event.version == artifact.version]
    if args.json:
        facts = {"manifest": document, "engines": built, "history": mine}
        print(json.dumps(label_of(artifact) | facts, ensure_ascii=False))
        return 0
    print(f"{artifact.label}  {artifact.path}\n")
    print(json.dumps(document, indent=2, ensure_ascii=False))
    for plan in built:
        print(f"engine {plan['key']}  {plan['state']}")
    for reason in refused(artifact):
        print(f"refused: {reason}")
    for event in mine:
        print(f"{event['at'] or 'earlier'}  {event['kind']}  {event['remark']}".rstrip())
    print("\n" + artifact.read("card.md").decode())
    return 0


def verify_model(args: argparse.Namespace) -> int:
    """Hashes; on a GPU every plan that it can load; then every golden crop through the engine."""
    from ralf.kernels.artifact import resolve
    from ralf.kernels.choose_engine import load
    from ralf.kernels.engine import EngineError, budget_of, check_golden, pick_device

    artifact = resolve(folder(args), args.model)
    checked: list[str] = []
    try:
        place = pick_device(args.device)
        if place.type == "cuda":
            from ralf.kernels.verify import verify

            plans = verify(
                artifact, place, say=lambda line: print(f"ralf: {line}", file=sys.stderr)
            )
            checked = [str(plan.key) for plan in plans]
        # One crop while loading is enough: the next line checks all of them.
        engine = load(artifact, args.device, golden_crops=1)
        error = check_golden(engine)
    except EngineError as failure:
        print(f"ralf: {failure}", file=sys.stderr)
        return FAILED
    budget = budget_of(artifact, engine.precision)
    found: dict[str, Any] = {"engine": engine.name, "precision": engine.precision}
    found |= {"device": engine.device, "plans": checked}
    print_result(
        args,
        label_of(artifact) | found | {"error": error, "budget": budget},
        f"{artifact.label}: files whole; {engine.name} {engine.precision} on {engine.device} "
        f"within {error:.6f} of the reference (budget {budget:.6f})",
    )
    return 0


def promote_model(args: argparse.Namespace) -> int:
    """Promote a version if every check passes, or --force overrides those that fail."""
    from ralf.kernels.registry import promote

    # NAME alone would mean the version that is promoted already.
    name, _, version = args.model.partition("@")
    if not version:
        print("ralf: promote takes NAME@VERSION; see: ralf models list", file=sys.stderr)
        return USAGE
    artifact, checks = promote(folder(args), name, version, force=args.force)
    for check in checks:
        print(check, file=sys.stderr)
    answers = {"gates": [asdict(check) for check in checks]}
    print_result(args, label_of(artifact) | answers, f"{artifact.name} is now {artifact.version}")
    return 0


def roll_back(args: argparse.Namespace) -> int:
    """Promote the version that was promoted before the current one."""
    from ralf.kernels.registry import rollback

    artifact = rollback(folder(args), args.model)
    print_result(args, label_of(artifact), f"{artifact.name} is back at {artifact.version}")
    return 0


def collect_old(args: argparse.Namespace) -> int:
    """Show which old versions are kept, and why; remove the others only with --apply."""
    from ralf.kernels.registry import collect

    spared = dict.fromkeys(args.spare, "spared by --spare")
    if not args.no_queue:
        spared |= pinned_in_queue(args)
    found = collect(
        folder(args), args.model, keep=args.keep, recent=args.recent, spared=spared,
        apply=args.apply,
    )  # fmt: skip
    if args.json:
        print(json.dumps([asdict(each) for each in found], ensure_ascii=False))
        return 0
    gone = "removed" if args.apply else "would go"
    for each in found:
        print(f"{args.model}@{each.version}  {each.bytes / 1e6:.1f} MB  {each.kept or gone}")
    if not args.apply and any(not each.kept for each in found):
        print("nothing was removed; --apply removes what would go", file=sys.stderr)
    return 0


def pinned_in_queue(args: argparse.Namespace) -> dict[str, str]:
    """Versions that jobs pin; the service adds `pinned`, since kernels may not import its queue."""
    ask = getattr(args, "pinned", None)
    # `python -m ralf.kernels.cli` runs without the service's libraries, so nothing can be asked.
    if ask is None:
        return {}
    try:
        pins: dict[str, str] = ask(args.model)
    # No answer is not "no pins": without it, `--apply` could remove a version that a job waits for.
    except OSError as error:
        from ralf.kernels.artifact import NotFound

        raise NotFound(
            f"the queue does not say which versions its jobs pin: {error}; start it, or "
            "--no-queue where no job waits"
        ) from error
    return pins


def make_untrained(args: argparse.Namespace) -> int:
    """Publish and promote the model `untrained`."""
    from ralf.kernels.registry import point_to
    from ralf.kernels.untrained import publish_untrained

    root = folder(args)
    artifact = publish_untrained(root, base=args.base, blocks=args.blocks, size=args.size)
    point_to(root, artifact.name, artifact.version)
    print_result(args, label_of(artifact), f"{artifact.label}  {artifact.path}  (knows nothing)")
    return 0


# ralf build


def _models_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", metavar="DIR", help="take models from this folder instead of RALF_MODELS_DIR"
    )


def add_build(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add `build`."""
    parser = subparsers.add_parser(
        "build",
        help="build a model's TensorRT plan (a compiled network for GPUs)",
        description="Builds a TensorRT plan of a model, compares its results with those of the "
        "network in FP32, and writes it beside the model; a plan that differs too much is refused.",
    )
    parser.add_argument("model", metavar="MODEL", help=SPEC)
    _models_option(parser)
    parser.add_argument(
        "--batch", metavar="N,…", help="batch sizes of the plan, ascending (default: 1,8,64)"
    )
    parser.add_argument(
        "--precision",
        default="fp16",
        help="number format of the plan: fp16, fp32; on a GPU bf16, or fp8 (the wide levels of "
        "RALF's reconstructor; by rtx-aot)",
    )
    parser.add_argument(
        "--builder",
        choices=["torch-tensorrt", "rtx-aot"],
        help="torch-tensorrt needs a GPU, rtx-aot needs none (default: torch-tensorrt where "
        "--device is a GPU, else rtx-aot)",
    )
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument(
        "--crops",
        type=int,
        metavar="N",
        help="compare the plan on N random crops beside the golden ones (default: 64)",
    )
    parser.add_argument(
        "--again", action="store_true", help="build although such a plan is there already"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="build with every builder that this machine has, then measure all engines and record "
        "the fastest",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=guarded(run_build))


def run_build(args: argparse.Namespace) -> int:
    """`ralf build`: build plans, and with --all time every engine."""
    from ralf.kernels.artifact import resolve
    from ralf.kernels.batching import BUCKETS
    from ralf.kernels.build import BuildRequest, available, build
    from ralf.kernels.choose_engine import measure
    from ralf.kernels.engine import EngineError, pick_device

    try:
        buckets = tuple(map(int, args.batch.split(","))) if args.batch else BUCKETS
    except ValueError:
        print(f"ralf: --batch takes sizes as 1,8,64, got {args.batch!r}", file=sys.stderr)
        return 2
    artifact = resolve(folder(args), args.model)
    made: list[Plan] = []
    failed = 0
    fastest: Measured | None = None
    try:
        device = pick_device(args.device)
        request = BuildRequest(
            artifact,
            args.precision,
            buckets,
            device,
            crops=args.crops,
            again=args.again,
            say=note,
        )
        # None as the only builder: `build` then chooses by the device.
        builders = available() if args.all and not args.builder else [args.builder]
        for builder in builders:
            try:
                made.append(build(request, builder))
            except EngineError as error:
                # with --all one builder's failure must not hide what the others make
                failed += 1
                note(str(error))
        if args.all:
            fastest = measure(artifact, device, say=note)
    except EngineError as error:
        note(str(error))
        return FAILED
    print_plans(args, request, made, fastest)
    return FAILED if failed else 0


def note(line: str) -> None:
    """One line of progress, or an error, on stderr."""
    print(f"ralf: {line}", file=sys.stderr, flush=True)


def print_plans(
    args: argparse.Namespace,
    request: "BuildRequest",
    made: "list[Plan]",
    fastest: "Measured | None",
) -> None:
    """The plans that were built, on stdout."""
    if args.json:
        document = {
            "model": request.artifact.label,
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


# ralf bench


def add_benches(what: "argparse._SubParsersAction[Any]") -> None:
    """Add `engine`, `dct` and `residual` to the verbs of `ralf bench`."""
    engine = what.add_parser(
        "engine", help="compare a model's engines with the papers' way of running the network"
    )
    engine.add_argument("model", nargs="?", metavar="MODEL", help=SPEC)
    _models_option(engine)
    engine.add_argument(
        "--fresh", choices=["ralf", "ralf-small"], help="measure this network with random weights"
    )
    engine.add_argument(
        "--size", type=int, default=256, metavar="PX", help="with --fresh, side of a crop in pixels"
    )
    engine.add_argument(
        "--build", action="store_true", help="first build plans with every builder that is here"
    )
    engine.add_argument(
        "--compile", action="store_true", help="on a CPU, measure torch.compile as well"
    )
    engine.add_argument(
        "--batch", type=int, metavar="N", help="crops in a call (default: 64 on a GPU, 4 on a CPU)"
    )
    _repeats(engine, 7)
    _device_and_out(engine)
    engine.set_defaults(run=guarded(_engine))
    dct = what.add_parser("dct", help="compare the fused removal of frequencies with other ways")
    dct.add_argument("--size", type=int, default=256, metavar="PX", help="side of a crop in pixels")
    dct.add_argument(
        "--batch", type=int, metavar="N", help="crops in a call (default: 64 on a GPU, 2 on a CPU)"
    )
    _repeats(dct, 21)
    dct.add_argument(
        "--tilings", action="store_true", help="measure every listed tiling of the GPU kernels too"
    )
    _device_and_out(dct)
    dct.set_defaults(run=guarded(_dct))
    residual = what.add_parser(
        "residual", help="compare ways of computing one level of RALF's reconstructor"
    )
    residual.add_argument(
        "--channels", type=int, default=32, metavar="N", help="channels of the level"
    )
    residual.add_argument(
        "--size", type=int, default=256, metavar="PX", help="side of a feature map in pixels"
    )
    residual.add_argument("--blocks", type=int, default=8, metavar="N", help="blocks of the level")
    residual.add_argument(
        "--batch", type=int, metavar="N", help="maps in a call (default: 64 on a GPU, 1 on a CPU)"
    )
    _repeats(residual, 7)
    residual.add_argument(
        "--calls", type=int, default=3, metavar="N", help="make N calls in each measurement"
    )
    _device_and_out(residual)
    residual.set_defaults(run=guarded(_residual))


def _repeats(parser: argparse.ArgumentParser, times: int) -> None:
    parser.add_argument(
        "--repeats", type=int, default=times, metavar="N", help="measure each way N times"
    )


def _device_and_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument("--out", metavar="DIR", help="write the record into this folder as well")


def _engine(args: argparse.Namespace) -> int:
    from ralf.kernels.bench.engine import run_engine

    return _run_bench(run_engine, args)


def _dct(args: argparse.Namespace) -> int:
    from ralf.kernels.bench.dct import run_dct

    return _run_bench(run_dct, args)


def _residual(args: argparse.Namespace) -> int:
    from ralf.kernels.bench.residual import run_residual

    return _run_bench(run_residual, args)


def _run_bench(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    from ralf.kernels.engine import EngineError

    try:
        return run(args)
    except EngineError as error:
        print(f"ralf bench: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    alone: argparse.ArgumentParser = Parser(prog="python -m ralf.kernels.cli")
    rooms = alone.add_subparsers(required=True, metavar="COMMAND")
    commands(rooms)
    bench = rooms.add_parser("bench", help="measure speed, and print the record as JSON")
    add_benches(bench.add_subparsers(required=True, metavar="WHAT"))
    arguments = alone.parse_args()
    sys.exit(arguments.run(arguments))
