"""RALF's own reconstructor as a forger: a face without some frequencies, rebuilt by the network.

    face ─▶ DCT ─▶ a ring or a ramp of frequencies weakened ─▶ inverse DCT ─▶ reconstructor ─▶ paste

It is trained to restore what was weakened, in authentic faces, which is also RALF's pre-training;
or its weights come from a RALF detector (`--init RUN_OR_VERSION`, with that network's base and
blocks).  What it rebuilds is a neural face of the same person.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ralf.kernels.dct import dct2, idct2
from ralf.kernels.networks.reconstructor import Reconstructor
from ralf.train.forge.families import ForgeryTask, Joined
from ralf.train.forge.renderers.aligned import Alignment, FaceBatch, crop_pixels, crop_tensor
from ralf.train.forge.renderers.paste import paste
from ralf.train.forge.renderers.renderer import Drawn, Renderer, RendererOptions, patches
from ralf.train.loop.initial_weights import trained_weights
from ralf.train.recipe import Count
from ralf.train.recipe_text import RecipeError

PART = "reconstructor."
"""What RALF calls its reconstructor."""


class ReconstructorOptions(RendererOptions):
    """The reconstructor's choices."""

    size: Annotated[int, Field(ge=32, multiple_of=16)] = 64
    """Side of the patches of faces that it is trained on; it draws faces of any size."""
    base: Annotated[int, Field(ge=4, multiple_of=2)] = 16
    blocks: Count = 2
    critic: Annotated[float, Field(ge=0)] = 0.01


class ReconstructorRenderer(Renderer):
    """The reconstructor and the frequencies that are taken from it."""

    name = "reconstructor"
    Options = ReconstructorOptions
    options: ReconstructorOptions
    kept: Tensor
    """What is left of everything, the mean too, as the network expects it.  A detector's mask is
    about ½ everywhere: given a whole face, its reconstructor would draw one twice as bright."""

    def __init__(self, options: RendererOptions) -> None:
        super().__init__(options)
        assert isinstance(options, ReconstructorOptions)
        self.options = options
        self.network = Reconstructor(options.base, options.blocks)
        self.register_buffer("kept", torch.ones(()))

    @property
    def side(self) -> int:
        """Faces in about the resolution in which they are pasted."""
        return max(176, self.options.size)

    def begin_from(self, path: Path) -> bool:
        """The reconstructor of a run's or a version's RALF."""
        if not path.is_dir():
            return False
        network, weights = trained_weights(path)
        found = {
            name.removeprefix(PART): tensor
            for name, tensor in weights.items()
            if name.startswith(PART)
        }
        if not found:
            raise RecipeError(f"{path} holds {network.build}: no reconstructor in it")
        try:
            self.network.load_state_dict(found)
        except RuntimeError as error:
            sizes = {name: network.dimensions.get(name) for name in ("base", "blocks")}
            raise RecipeError(f"{path} has another reconstructor: --set its {sizes}") from error
        if "mask" in weights:
            self.kept.fill_(weights["mask"].float().sigmoid().mean())
        return True

    def draw(self, batch: FaceBatch, generator: torch.Generator, progress: float) -> Drawn:
        """Patches rebuilt from weakened ones."""
        wanted = patches(batch.crops, self.options.size, generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        masks = np.stack([weakening(self.options.size, rng) for _ in range(len(wanted))])
        destroyed = self.kept * weakened(wanted, torch.from_numpy(masks).to(wanted.device))
        return Drawn(self.network(destroyed).image, wanted)

    def make(self, task: ForgeryTask) -> Joined:
        """The face weakened and rebuilt, in the picture's own resolution."""
        alignment = Alignment.native(task.face, multiple=4)
        mask = torch.from_numpy(weakening(alignment.size, task.rng))
        seen = crop_tensor(alignment.cut(task.image))
        drawn = crop_pixels(self.network(self.kept * weakened(seen, mask[None])).image)
        # A detector's reconstructor greys the skin: left so, the tint alone would tell.
        return paste(task.image, task.face, alignment, drawn, task.rng)


def weakening(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """How much of each frequency is left, [s, s]: a ring is taken, or all above a ramp is.

    Frequencies are parts of the highest one, so a mask means the same for a patch and a face.
    """
    place = np.arange(side, dtype=np.float32) / side
    height = np.hypot(place[:, None], place[None, :])
    taken = rng.uniform(0.5, 1.0)
    # Uniform in the logarithm: a face has most of its energy far down.
    start = float(np.exp(rng.uniform(np.log(0.04), np.log(0.5))))
    if rng.random() < 0.5:
        inside = (height >= start) & (height < start * rng.uniform(1.5, 3))
        left = 1 - taken * inside
    else:
        left = 1 - taken * np.clip((height - start) / rng.uniform(0.02, 0.3), 0, 1)
    left[0, 0] = 1  # the mean
    return np.asarray(left, np.float32)


def weakened(faces: Tensor, masks: Tensor) -> Tensor:
    """Faces [m, 3, s, s] with each frequency multiplied by its mask's entry, [m, s, s]."""
    with torch.autocast(faces.device.type, enabled=False):
        # Centred, as the destructor does it: the mean would take most of the precision.
        out: Tensor = idct2(dct2(faces.float() - 0.5) * masks[:, None]) + 0.5
    return out
