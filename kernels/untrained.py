"""A model with random weights: the real network, never trained, published like any other.

With it the whole pipeline can run before there is a trained model.  The seed is fixed, the batch
norms' statistics are those of its own golden patterns so that numbers stay in range, and its
manifest, its card and every verdict made with it say that it was never trained.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ralf.kernels.artifact import Artifact, publish
from ralf.kernels.engine_torch import pack
from ralf.kernels.manifest import InputContract, Manifest, Network
from ralf.kernels.networks import build

SEED = 20251120
CARD = """\
# {name}: untrained weights

**This model knows nothing.** Its weights are random numbers (seed {seed}) and were never shown a
face, authentic or forged. Its scores mean nothing. It exists so that the pipeline can be run,
measured and tested before a trained model is there.

- Network: {network}
- Trained on: nothing
- Measured accuracy: none; expect that of a coin
- Do not judge anybody's video with it
"""


def patterns(count: int, size: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Crops [count, 3, size, size] from the seed: in turn smooth, noisy, flat and striped."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    crops = np.empty((count, 3, size, size), np.uint8)
    for crop, kind in zip(crops, (k % 4 for k in range(count)), strict=True):
        frequency = random.uniform(0.5, 6, 3)
        phase = random.uniform(0, 6, 3)
        level = random.uniform(60, 190, 3)
        for plane in range(3):
            wave = np.sin(frequency[plane] * (x + 2 * y * frequency[0]) + phase[plane])
            image = level[plane] + 55 * wave
            if kind == 1:
                image = image + random.normal(0, 12, (size, size))
            elif kind == 2:
                image = np.full((size, size), level[plane])
            elif kind == 3:
                image = np.where(wave > 0, level[plane], 255 - level[plane])
            crop[plane] = np.clip(np.rint(image), 0, 255)
    return crops


def publish_untrained(
    models_dir: Path | str,
    *,
    name: str = "untrained",
    base: int = 16,
    blocks: int = 4,
    backbone: str = "tf_efficientnet_lite0",
    size: int = 256,
    golden_crops: int = 32,
    **further: Any,
) -> Artifact:
    """Publish (not promote) RALF of these and `further` dimensions, weights from the fixed seed."""
    dimensions: dict[str, Any] = {
        "base": base,
        "blocks": blocks,
        "backbone": backbone,
        "size": size,
    } | further
    crops = patterns(golden_crops, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = build("ralf", **dimensions)
        settle(network, crops[:8])
        with torch.no_grad():  # its scores stay near a coin's, as they should
            network.get_parameter("classifier.head.weight").mul_(0.1)
    draft = Manifest(
        name=name,
        network=Network(build="ralf", **dimensions),
        input=InputContract(size=size),
        files={},
        # Random weights amplify rounding more than learnt ones, and here no verdict hangs on it.
        error_budget={"logit": 0.25},
        trained={"recipe": "none", "seed": SEED},
        untrained=True,
    )
    manifest, files = pack(network, draft, crops)
    described = ", ".join(f"{key} {value}" for key, value in dimensions.items())
    card = CARD.format(name=name, seed=SEED, network=f"RALF, {described}")
    return publish(models_dir, manifest, {**files, "card.md": card.encode()})


@torch.no_grad()
def settle(network: nn.Module, crops: NDArray[np.uint8]) -> None:
    """Set the batch norms' statistics to those of the crops, so that activations keep in range."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # By default a running mean takes a tenth of a batch and keeps the rest of its initial
            # value.
            module.momentum = None  # the plain mean: this one batch's
    network.train()
    network(torch.from_numpy(crops))
    network.eval()
