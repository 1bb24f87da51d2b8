"""A run's state in one file: written whole or not at all, and resumed bit for bit.

One safetensors file holds every tensor (network, moving average, loss, moments of each optimiser);
a JSON document in its header holds the rest: recipe, step, random states of every process, best
figure so far, hash of the data, commit.  No pickle is written and none is read.  A checkpoint is
replaced atomically: at any moment the old file or the new one is there, and whole.

It refuses a file that is incomplete or was written by another program, tensors that do not fit the
network, and a run whose recipe or data is not the one asked for: it names what differs.
"""

import base64
import json
import random
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ralf.kernels.atomic_files import flush_folder, write
from ralf.train.recipe import Recipe
from ralf.train.recipe_text import differences, from_json, to_json

SCHEMA = "ralf.checkpoint/1"
LAST, BEST = "last.safetensors", "best.safetensors"
HEADER = "ralf"


STORED_AS = {"validations_since_best": "looks_since_best", "validated_step": "looked_step"}
"""Fields of State that are called otherwise in the file: runs of every version have those names."""
OURS = {stored: name for name, stored in STORED_AS.items()}


class CheckpointError(Exception):
    """A checkpoint cannot be read, or is not of the run asked for."""


@dataclass(frozen=True)
class State:
    """Where a run is, tensors apart."""

    step: int = 0
    """Optimiser steps done; the next batch follows from it."""
    faces: int = 0
    seconds: float = 0.0
    """Time spent training, over all commands."""
    best: float | None = None
    """The best validation figure so far, higher is better."""
    best_step: int = 0
    validations_since_best: int = 0
    validated_step: int = 0
    """The step of the last validation."""
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    recipe: Recipe
    state: State
    tensors: dict[str, Tensor]
    random: tuple[str, ...]
    """Random states, one a process."""
    optimisers: dict[str, Any]
    """The optimisers' scalars; their tensors lie in `tensors`."""
    data_sha256: str
    commit: str | None
    metrics: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        start = f"{prefix}."
        return {
            name[len(start) :]: tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a new file, flush it to disk, and rename it over the old one."""
    document = {
        "schema": SCHEMA,
        "recipe": json.loads(to_json(checkpoint.recipe)),
        "state": {
            STORED_AS.get(name, name): value for name, value in asdict(checkpoint.state).items()
        },
        "random": list(checkpoint.random),
        "optimisers": checkpoint.optimisers,
        "data_sha256": checkpoint.data_sha256,
        "commit": checkpoint.commit,
        "metrics": checkpoint.metrics,
    }
    # Channels-last tensors and views are copied into plain order; values stay what they are.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in _apart(checkpoint)}
    data = safetensors.torch.save(plain, metadata={HEADER: json.dumps(document)})
    staging = path.with_name(f".{path.name}.new")
    staging.unlink(missing_ok=True)
    write(staging, data)
    staging.replace(path)
    # The rename itself is on disk only when the folder is.
    flush_folder(path.parent)


def _state(stored: Mapping[str, Any]) -> State:
    return State(**{OURS.get(name, name): value for name, value in stored.items()})


def _apart(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    """Tensors that share memory are cloned: safetensors refuses shared ones."""
    seen: set[int] = set()
    apart: list[tuple[str, Tensor]] = []
    for name, tensor in checkpoint.tensors.items():
        where = tensor.untyped_storage().data_ptr()
        apart.append((name, tensor.clone() if where in seen else tensor))
        seen.add(where)
    return apart


def load(path: Path) -> Checkpoint:
    """Read a checkpoint back."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} does not read as a checkpoint: {error}") from error
    if header is None:
        raise CheckpointError(f"{path} holds tensors but is no checkpoint of ours")
    document = json.loads(header)
    if document.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is {document.get('schema')!r}, expected {SCHEMA!r}")
    return Checkpoint(
        recipe=from_json(json.dumps(document["recipe"]), Recipe),
        state=_state(document["state"]),
        tensors=tensors,
        random=tuple(document["random"]),
        optimisers=document["optimisers"],
        data_sha256=document["data_sha256"],
        commit=document["commit"],
        metrics=document["metrics"],
    )


def judged(run: Path) -> Path:
    """The checkpoint to publish: the best by validation, else the last."""
    for name in (BEST, LAST):
        if (run / name).is_file():
            return run / name
    raise CheckpointError(f"no {BEST} and no {LAST} in {run}: is it a folder of `ralf train`?")


def has_checkpoint(run: Path) -> bool:
    """Whether the folder holds weights that could be published."""
    return any((run / name).is_file() for name in (BEST, LAST))


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """The judged weights: the moving average where the file has one beside the network."""
    # BEST holds the judged weights as its network; LAST holds both.
    return checkpoint.part("average") or checkpoint.part("network")


def refuse_another_run(found: Checkpoint, recipe: Recipe, data_sha256: str, world: int) -> None:
    """Only the same recipe on the same data by as many processes goes on from a checkpoint."""
    if changed := differences(found.recipe, recipe):
        raise CheckpointError(
            "this run was started with another recipe (stored → asked): "
            + "; ".join(changed)
            + "; name another folder, or ask for what is stored"
        )
    if found.data_sha256 != data_sha256:
        raise CheckpointError(
            f"this run was started on data {found.data_sha256[:12]}…, not {data_sha256[:12]}…: "
            "name another folder for other data"
        )
    if len(found.random) != world:
        raise CheckpointError(
            f"this run was started with {len(found.random)} processes, not {world}: its batches "
            "would be others; go on with as many"
        )


def pack_optimiser(name: str, chosen: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """An optimiser's tensors under its name, and its scalars as JSON."""
    state = chosen.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, moments in state["state"].items():
        for key, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"state": scalars, "param_groups": state["param_groups"]}


def unpack_optimiser(
    chosen: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Any
) -> None:
    """Put back what pack_optimiser returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    for index, values in plain["state"].items():
        state.setdefault(int(index), {}).update(values)
    # Tensors first, then scalars: together they are what state_dict() gave.
    chosen.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def random_state(device: torch.device) -> str:
    """Every random state of this process, as text."""
    state = np.random.get_state()
    assert isinstance(state, tuple)  # a dict only where legacy=False is asked for
    kind, keys, position, has_gauss, gauss = state
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return json.dumps(
        {
            "python": random.getstate(),
            "numpy": [kind, _text(keys), int(position), int(has_gauss), float(gauss)],
            "torch": _text(torch.get_rng_state().numpy()),
            "cuda": None if on_device is None else _text(on_device.cpu().numpy()),
        }
    )


def set_random_state(text: str, device: torch.device) -> None:
    """Draw on from where random_state was taken."""
    state = json.loads(text)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, _array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)), device)


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _array(text: str, kind: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).copy()


def commit() -> str | None:
    """The commit this code is at, "+" behind it where files differ; None outside of git."""
    root = Path(__file__).resolve().parent.parent.parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()
