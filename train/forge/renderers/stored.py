"""A fitted renderer as one file, and every renderer by name.

The file is safetensors: weights in FP16, and in its header a JSON document with the renderer's
name, its options, and the record of its training: which data and split, steps, losses, minutes.
The SHA-256 of the file identifies what it draws.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ralf.kernels.atomic_files import flush_folder, write
from ralf.train.forge.renderers.autoencoder import Autoencoder
from ralf.train.forge.renderers.lip_sync import LipSync
from ralf.train.forge.renderers.reconstructor import ReconstructorRenderer
from ralf.train.forge.renderers.renderer import Renderer
from ralf.train.forge.renderers.restorer import Restorer
from ralf.train.recipe_text import RecipeError, from_json

SCHEMA = "ralf.renderer/1"
HEADER = "ralf"
KINDS: dict[str, type[Renderer]] = {
    each.name: each for each in (Autoencoder, Restorer, ReconstructorRenderer, LipSync)
}
"""Every renderer by its name, which is also the method of its forgeries."""
Record = dict[str, Any]


@dataclass(frozen=True)
class StoredRenderer:
    """A renderer read from its file."""

    renderer: Renderer
    record: Record
    sha256: str


def kind(name: str) -> type[Renderer]:
    """The renderer of that name."""
    if name not in KINDS:
        raise RecipeError(f"no renderer {name!r}; known: {', '.join(KINDS)}")
    return KINDS[name]


def save(path: Path, renderer: Renderer, record: Record) -> str:
    """Write the file, whole or not at all; its SHA-256."""
    document = {
        "schema": SCHEMA,
        "name": renderer.name,
        "options": renderer.options.model_dump(mode="json"),
        "record": record,
    }
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in renderer.state_dict().items()
    }
    data = safetensors.torch.save(weights, metadata={HEADER: json.dumps(document)})
    replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.new")
    staging.unlink(missing_ok=True)
    write(staging, data)
    staging.replace(path)
    flush_folder(path.parent)


def header(path: Path, schema: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON document in a file's header, and its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{path} cannot be read as {schema}: {error}") from error
    document = json.loads(text) if text else {}
    if document.get("schema") != schema:
        raise RecipeError(f"{path} should be {schema}, but its schema is {document.get('schema')}")
    return document, tensors


@lru_cache(maxsize=8)
def load(path: Path) -> StoredRenderer:
    """The renderer in a file, ready to forge on the CPU; a process reads each file once."""
    document, tensors = header(path, SCHEMA)
    of = kind(document["name"])
    renderer = of(from_json(json.dumps(document["options"]), of.Options))
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    try:
        renderer.load_state_dict(weights)
    except RuntimeError as error:
        raise RecipeError(f"{path} does not fit this version's {of.name}: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return StoredRenderer(renderer.eval().requires_grad_(False), document["record"], digest)
