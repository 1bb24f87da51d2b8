"""Data and recipes for tests that train: made faces with visible forgeries, and tiny recipes."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ralf.train.recipe import Recipe
from ralf.train.recipe_text import override
from ralf.train.recipes import named

SIZE = 32
TINY = {
    "network.size": "32",
    "data.input.size": "32",
    "network.backbone": "tf_efficientnet_lite0",
    "init.backbone": "none",
    "data.batch": "8",
    "precision": "fp32",
}


@dataclass(frozen=True)
class MadeBatch:
    """A batch as ralf.train.data.batches makes them."""

    crops: Tensor
    forged: Tensor
    pair: Tensor
    family: Tensor
    ids: list[str]


class MadeBatches:
    """Pairs of a smooth picture and the same with a checkerboard; the batch number is the seed."""

    def __init__(self, faces: int = 8, an_epoch: int = 4, *, only: int | None = None) -> None:
        self.faces, self.an_epoch, self.only = faces, an_epoch, only

    def __len__(self) -> int:
        return self.an_epoch

    def __getitem__(self, number: int) -> MadeBatch:
        number = self.only if self.only is not None else number
        generator = torch.Generator().manual_seed(number)
        half = self.faces // 2
        coarse = torch.rand(half, 3, 4, 4, generator=generator)
        real = nn.functional.interpolate(coarse, size=SIZE, mode="bilinear") * 200 + 20
        grid = torch.arange(SIZE)
        board = ((grid[:, None] + grid[None, :]) % 2) * 24.0 - 12.0
        crops = torch.cat((real, real + board)).round().to(torch.uint8)
        rows = torch.arange(half)
        return MadeBatch(
            crops=crops,
            forged=torch.arange(self.faces) >= half,
            pair=torch.cat((torch.full((half,), -1), rows)),
            family=torch.cat((torch.full((half,), -1), rows % 2)),
            ids=[f"{number}/{row}" for row in range(self.faces)],
        )


class Halves:
    """The same batches cut in two between pairs: batch n becomes batches 2n and 2n + 1."""

    def __init__(self, whole: MadeBatches) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return 2 * len(self.whole)

    def __getitem__(self, number: int) -> MadeBatch:
        batch = self.whole[number // 2]
        quarter = len(batch.forged) // 4
        start = quarter * (number % 2)
        rows = torch.cat(
            (torch.arange(quarter) + start, torch.arange(quarter) + 2 * quarter + start)
        )
        return MadeBatch(
            crops=batch.crops[rows],
            forged=batch.forged[rows],
            pair=torch.cat((torch.full((quarter,), -1), torch.arange(quarter))),
            family=batch.family[rows],
            ids=[batch.ids[row] for row in rows],
        )


class StubTrace(NamedTuple):
    """The intermediate results of a RALF-like network."""

    image: Tensor
    destroyed: Tensor
    rebuilt: Tensor
    embedding: Tensor
    attention: Tensor
    logit: Tensor


class StubRalf(nn.Module):
    """RALF's structure in a few hundred weights, without batch norm: means split exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(SIZE, SIZE))
        self.encoder = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.decoder = nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)
        self.classifier = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
            nn.Linear(8, 1),
        )  # fmt: skip

    def trace(self, crops: Tensor) -> StubTrace:
        """As ralf.kernels.networks.ralf.Ralf.trace."""
        image = crops.float() / 255
        destroyed = image * self.mask.sigmoid()
        encoded = self.encoder(destroyed).relu()
        rebuilt = destroyed + self.decoder(encoded)
        logit = self.classifier((image - rebuilt).abs()).squeeze(1)
        return StubTrace(
            image, destroyed, rebuilt, encoded.mean((2, 3)), destroyed[:, :1], logit
        )  # fmt: skip

    def forward(self, crops: Tensor) -> Tensor:
        """Logits."""
        return self.trace(crops).logit


def tiny(name: str, **changes: str) -> Recipe:
    """The named recipe at 32 pixels, with random first weights, so that it trains in seconds."""
    recipe = named(name)
    if recipe.loss.kind == "ralf":
        changes = {"network.base": "4", "network.blocks": "1", "init.perceptual": "none"} | changes
    return override(recipe, TINY | {key.replace("__", "."): text for key, text in changes.items()})


def one_thread() -> None:
    """Use one torch thread, so that sums have one order on every machine."""
    torch.set_num_threads(1)


def environment() -> dict[str, str]:
    """The environment of processes that tests start."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def renamed(recipe: Recipe, name: str) -> Recipe:
    """The recipe under another name."""
    return recipe.replaced(name=name)
