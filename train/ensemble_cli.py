"""`ralf ensemble`: several published models become one."""

import argparse
import sys
from pathlib import Path

from ralf.train.command import OK, Commands, parser_of


def ensemble_command(subparsers: Commands) -> None:
    """Register the command."""
    parser = parser_of(subparsers, "ensemble", "make one model of several: their mean", run)
    parser.add_argument("members", nargs="+", metavar="MODEL", help="name, name@version or path")
    parser.add_argument("--name", required=True, help="the ensemble's own name, as trio")
    parser.add_argument("--models", type=Path, help="where models lie: RALF_MODELS_DIR, or ours")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="calibrate the mean on this")
    parser.add_argument("--split", default="val", help="a split that chose nothing else")
    parser.add_argument(
        "--conditions", default="clean", metavar="A,B", help="wear put on both classes alike"
    )
    parser.add_argument("--families", default="", metavar="A,B", help="forgeries to blend")
    parser.add_argument("--fitted-on", default="", help="what it was fitted on, in words")
    parser.add_argument("--no-shift", action="store_true", help="fit the temperature alone")
    parser.add_argument("--promote", action="store_true", help="make it the current version")


def run(args: argparse.Namespace) -> int:
    """Publish the ensemble; its folder on stdout."""
    import torch

    from ralf.kernels.artifact import models_folder, resolve
    from ralf.kernels.registry import point_to
    from ralf.train.ensemble import drafted, publish_ensemble
    from ralf.train.publish_cli import calibrated_by

    models = models_folder(args.models)
    members = [resolve(models, spec) for spec in args.members]
    for member in members:
        if member.manifest.calibration.fitted_on == "nothing":
            print(
                f"ralf: {member.label} is not calibrated: its bare logits enter the mean",
                file=sys.stderr,
            )
    calibrated = None
    if args.data:
        manifest, network = drafted(members, args.name)
        with torch.inference_mode():
            calibrated = calibrated_by(network, manifest, args)
    artifact = publish_ensemble(members, args.name, models, calibrated)
    if args.promote:
        point_to(models, artifact.name, artifact.version)
    print(artifact.path)
    return OK
