"""Plans of the shipped model and of full RALF by every builder here; then all engines are timed.

    python bench/gpu/plans.py FOLDER [--device cuda|cpu] [--tiny]

One line of JSON a step.  A builder that fails is noted, and the next one runs.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from ralf.kernels import choose_engine
from ralf.kernels.artifact import SHIPPED, Artifact, publish, resolve
from ralf.kernels.build import BuildRequest, available, build
from ralf.kernels.untrained import publish_untrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models are put")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="only a tiny network: the rehearsal")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.folder.mkdir(parents=True, exist_ok=True)
    say(builders=available())
    for model in models(args.folder, tiny=args.tiny):
        for builder in available():
            build_one(model, builder, device)
        if device.type == "cuda":
            time_engines(model, device)


def models(folder: Path, *, tiny: bool) -> list[Artifact]:
    """Copies that plans may be added to."""
    if tiny:
        return [publish_untrained(folder, name="ralf", golden_crops=8, base=4, blocks=1, size=64)]
    shipped = resolve(SHIPPED, "ralf-small")
    files = {name: shipped.read(name) for name in shipped.manifest.files}
    full = publish_untrained(
        folder, name="ralf", golden_crops=8, base=32, blocks=8, backbone="xception", size=256
    )
    return [publish(folder, shipped.manifest, files), full]


def build_one(model: Artifact, builder: str, device: torch.device) -> None:
    """Build one plan and print its key, error and time."""
    start = time.perf_counter()
    try:
        made = build(BuildRequest(model, device=device, crops=32, say=to_stderr), builder)
    except Exception as error:  # noqa: BLE001 - the other builders must still run
        traceback.print_exc()
        say(model=model.label, builder=builder, failed=f"{type(error).__name__}: {error}"[:500])
        return
    say(
        model=model.label,
        builder=builder,
        key=str(made.key),
        s=round(time.perf_counter() - start, 1),
        error=made.record.error,
        verified={name: one.timing_ms for name, one in made.record.verifications.items()},
        options=made.record.options,
    )


def time_engines(model: Artifact, device: torch.device) -> None:
    """Every engine of the model in turns; the fastest is recorded beside it."""
    try:
        found = choose_engine.measure(model, device, say=to_stderr)
    except Exception as error:  # noqa: BLE001 - the next model must still be built
        traceback.print_exc()
        say(model=model.label, timing_failed=f"{type(error).__name__}: {error}"[:500])
        return
    say(model=model.label, fastest=found.model_dump())


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
