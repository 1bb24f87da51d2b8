"""`ralf models …`: what is published, what is promoted, and the ways from one to the other.

Results go to stdout, errors and the gates' answers to stderr; 0 done, 1 a model that does not
verify or a gate that does not pass, 2 usage, 5 no such model, or no queue to ask what it pins.
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

Run = Callable[[argparse.Namespace], int]
FAILED, USAGE, INFRASTRUCTURE = 1, 2, 5


def models_commands(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add `models` and its verbs."""
    models = subparsers.add_parser("models", help="list, check, promote and roll back models")
    verbs = models.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Run, about: str, **argument: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about)
        if argument:
            parser.add_argument("model", **argument)
        parser.add_argument(
            "--models", metavar="DIR", help="folder of models (default: RALF_MODELS_DIR, or ours)"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=guarded(run))
        return parser

    spec = "NAME, NAME@VERSION or a path"
    verb("list", list_models, "what is published here, and what is promoted")
    verb("show", show_model, "one model's manifest", metavar="MODEL", help=spec)
    verify = verb(
        "verify", verify_model, "check hashes and golden logits", metavar="MODEL", help=spec
    )
    verify.add_argument("--device", default="cpu", help="where the golden crops run (%(default)s)")
    promote = verb(
        "promote", promote_model, "make a version current, gate by gate", metavar="NAME@VERSION"
    )
    promote.add_argument(
        "--force", action="store_true", help="past gates that refuse; the history keeps why"
    )
    verb("rollback", roll_back, "go back to the version promoted before", metavar="NAME")
    old = verb("gc", collect_old, "show which old versions may go; --apply removes", metavar="NAME")
    old.add_argument("--apply", action="store_true", help="remove what is shown")
    old.add_argument("--keep", type=int, default=3, help="newest versions that stay (%(default)s)")
    old.add_argument(
        "--recent", type=int, default=5, help="last promotions that stay (%(default)s)"
    )
    old.add_argument(
        "--spare", action="append", default=[], metavar="VERSION", help="stays too, repeatable"
    )
    old.add_argument(
        "--no-queue", action="store_true", help="do not ask Redis which versions jobs pin"
    )
    fresh = verb("untrained", make_untrained, "publish and promote weights that know nothing")
    fresh.add_argument("--base", type=int, default=16, help="channels (%(default)s)")
    fresh.add_argument("--blocks", type=int, default=4, help="blocks a stack (%(default)s)")
    fresh.add_argument("--size", type=int, default=256, help="side of a crop (%(default)s)")


def guarded(run: Run) -> Run:
    """The border: an error of ours becomes one line on stderr and an exit code."""

    def guard(args: argparse.Namespace) -> int:
        from ralf.kernels.artifact import ArtifactError, NotFound

        try:
            return run(args)
        except NotFound as error:
            print(f"ralf: {error}", file=sys.stderr)
            return INFRASTRUCTURE
        except ArtifactError as error:
            print(f"ralf: {error}", file=sys.stderr)
            return FAILED

    return guard


def folder(args: argparse.Namespace) -> Path:
    """Where models lie: the option, the environment, or those that come with the code."""
    from ralf.kernels.artifact import models_folder

    return models_folder(args.models)


def say(args: argparse.Namespace, document: dict[str, Any], line: str) -> None:
    """One result: JSON where asked, else a line."""
    print(json.dumps(document, ensure_ascii=False) if args.json else line)


def label_of(artifact: "Artifact") -> dict[str, Any]:
    """What a result says of a model."""
    return {
        "name": artifact.name,
        "version": artifact.version,
        "path": str(artifact.path),
        "untrained": artifact.manifest.untrained,
    }


def list_models(args: argparse.Namespace) -> int:
    """Every version, with its state; a damaged one is listed as damaged, and makes the exit 1."""
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
    """Manifest, engines and history, and the card unless JSON was asked for."""
    from ralf.kernels.artifact import resolve
    from ralf.kernels.plans import plans
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
        engine = load(artifact, args.device, golden_crops=1)
        error = check_golden(engine)
    except EngineError as failure:
        print(f"ralf: {failure}", file=sys.stderr)
        return FAILED
    budget = budget_of(artifact, engine.precision)
    found: dict[str, Any] = {"engine": engine.name, "precision": engine.precision}
    found |= {"device": engine.device, "plans": checked}
    say(
        args,
        label_of(artifact) | found | {"error": error, "budget": budget},
        f"{artifact.label}: files whole; {engine.name} {engine.precision} on {engine.device} "
        f"within {error:.6f} of the reference (budget {budget:.6f})",
    )
    return 0


def promote_model(args: argparse.Namespace) -> int:
    """Make NAME mean this version, if the gates agree or --force overrides them."""
    from ralf.kernels.registry import promote

    name, _, version = args.model.partition("@")
    if not version:
        print("ralf: promote takes NAME@VERSION; see: ralf models list", file=sys.stderr)
        return USAGE
    artifact, checks = promote(folder(args), name, version, force=args.force)
    for check in checks:
        print(check, file=sys.stderr)
    answers = {"gates": [asdict(check) for check in checks]}
    say(args, label_of(artifact) | answers, f"{artifact.name} is now {artifact.version}")
    return 0


def roll_back(args: argparse.Namespace) -> int:
    """Make NAME mean what it meant before."""
    from ralf.kernels.registry import rollback

    artifact = rollback(folder(args), args.model)
    say(args, label_of(artifact), f"{artifact.name} is back at {artifact.version}")
    return 0


def collect_old(args: argparse.Namespace) -> int:
    """What stays and why, what goes; it goes only with --apply."""
    from ralf.kernels.registry import collect

    spared = dict.fromkeys(args.spare, "spared by --spare")
    if not args.no_queue:
        spared |= pinned_in_queue(args)
    found = collect(
        folder(args), args.model, keep=args.keep, recent=args.recent, spared=spared,
        apply=args.apply,
    )  # fmt: skip
    if args.json:
        print(json.dumps([asdict(place) for place in found], ensure_ascii=False))
        return 0
    gone = "removed" if args.apply else "would go"
    for place in found:
        print(f"{args.model}@{place.version}  {place.bytes / 1e6:.1f} MB  {place.kept or gone}")
    if not args.apply and any(not place.kept for place in found):
        print("nothing was removed; --apply removes what would go", file=sys.stderr)
    return 0


def pinned_in_queue(args: argparse.Namespace) -> dict[str, str]:
    """Versions that jobs pin, by whoever assembled the command: this room knows no queue."""
    ask = getattr(args, "pinned", None)
    if ask is None:
        return {}
    try:
        pins: dict[str, str] = ask(args.model)
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
    say(args, label_of(artifact), f"{artifact.label}  {artifact.path}  (knows nothing)")
    return 0
