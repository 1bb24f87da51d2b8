"""The three small networks of MTCNN (Zhang et al. 2016), with the weights facenet-pytorch carries.

P-Net slides over a picture and proposes places where a face may be; R-Net judges each place again
at 24×24 and rejects most; O-Net judges the rest at 48×48 and adds five landmarks.
worker/media/mtcnn.py chains them; the pictures of one call here have one size.

Each network gives the *logit* of a face rather than two probabilities: the softmax of two numbers
is the sigmoid of their difference.  Inputs are RGB, float, (u8 − 127.5) / 128, as in training.

Two things are changed for speed and give the same numbers.  First layers of 10 and 28 channels are
widened by channels of zeros to 16 and 32, which are a multiple of what vector units and tensor
cores compute at once.  Max pooling on a CPU is a maximum of strided slices: torch's own kernel is
five times slower here.

The weights are read from the installed facenet-pytorch 2.5.3 (MIT) without importing the package,
as tensors only: nothing in the files is executed.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Net = Literal["pnet", "rnet", "onet"]


class WeightsMissing(RuntimeError):
    """The package that carries the finder's weights is not installed, or not whole."""


def _column_first(x: Tensor) -> Tensor:
    """[m,c,h,w] → [m, w·h·c]: the order in which the dense layers' weights were trained."""
    return x.permute(0, 3, 2, 1).flatten(1)


def _face_logit(pair: Tensor) -> Tensor:
    """[m,2,…] scores of (no face, face) → [m,…] logit of P(face)."""
    return pair[:, 1] - pair[:, 0]


def _pooled(x: Tensor, window: int) -> Tensor:
    """Largest of each window × window cells, 2 apart; a window cut off at the end counts too."""
    if x.is_cuda:
        return F.max_pool2d(x, window, 2, ceil_mode=True)
    for dim in (2, 3):
        count = (x.shape[dim] - window + 1) // 2 + 1
        first, *others = (x.narrow(dim, i, x.shape[dim] - i) for i in range(window))
        index = (slice(None),) * dim + (slice(None, None, 2),)
        # A copy: the maxima are written into it, and the view is the caller's tensor.
        best = first[index].narrow(dim, 0, count).clone()
        for other in others:
            cells = other[index]
            part = best.narrow(dim, 0, min(count, cells.shape[dim]))
            torch.maximum(part, cells.narrow(dim, 0, part.shape[dim]), out=part)
        x = best
    return x


class PNet(nn.Module):
    """Proposals: each output cell judges the 12×12 window that starts at twice its place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3)
        self.prelu1 = nn.PReLU(16)
        self.conv2 = nn.Conv2d(16, 16, 3)
        self.prelu2 = nn.PReLU(16)
        self.conv3 = nn.Conv2d(16, 32, 3)
        self.prelu3 = nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n,3,h,w] → logit [n,h',w'], box offsets [n,4,h',w'] in units of the window."""
        x = _pooled(self.prelu1(self.conv1(x)), 2)
        x = self.prelu2(self.conv2(x))
        x = self.prelu3(self.conv3(x)).permute(0, 2, 3, 1)
        # Both 1×1 convolutions as one product: torch's kernel for two channels out is a slow one.
        # They stay two layers, because the weights' file has them under two names.
        last = [dict(layer.named_parameters()) for layer in (self.conv4_1, self.conv4_2)]
        weight = torch.cat([layer["weight"] for layer in last]).flatten(1)
        both = F.linear(x, weight, torch.cat([layer["bias"] for layer in last])).permute(0, 3, 1, 2)
        return _face_logit(both[:, :2]), both[:, 2:]


class RNet(nn.Module):
    """Refinement at 24×24."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.prelu1 = nn.PReLU(32)
        self.conv2 = nn.Conv2d(32, 48, 3)
        self.prelu2 = nn.PReLU(48)
        self.conv3 = nn.Conv2d(48, 64, 2)
        self.prelu3 = nn.PReLU(64)
        self.dense4 = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[m,3,24,24] → logit [m], box offsets [m,4] in units of the box."""
        x = _pooled(self.prelu1(self.conv1(x)), 3)
        x = _pooled(self.prelu2(self.conv2(x)), 3)
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(_column_first(x)))
        return _face_logit(self.dense5_1(x)), self.dense5_2(x)


class ONet(nn.Module):
    """The final judgement at 48×48, with landmarks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.prelu1 = nn.PReLU(32)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.prelu2 = nn.PReLU(64)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.prelu3 = nn.PReLU(64)
        self.conv4 = nn.Conv2d(64, 128, 2)
        self.prelu4 = nn.PReLU(128)
        self.dense5 = nn.Linear(1152, 256)
        self.prelu5 = nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[m,3,48,48] → logit [m], box offsets [m,4], landmarks [m,5,2] as fractions of the box."""
        x = _pooled(self.prelu1(self.conv1(x)), 3)
        x = _pooled(self.prelu2(self.conv2(x)), 3)
        x = _pooled(self.prelu3(self.conv3(x)), 2)
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(_column_first(x)))
        points = self.dense6_3(x).unflatten(1, (2, 5)).transpose(1, 2)  # five x, then five y
        return _face_logit(self.dense6_1(x)), self.dense6_2(x), points


class Cascade(NamedTuple):
    """The three networks in the order in which they run."""

    pnet: PNet
    rnet: RNet
    onet: ONet


def weights_path(net: Net) -> Path:
    """Where facenet-pytorch keeps one network's weights; the package itself is not imported."""
    spec = find_spec("facenet_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise WeightsMissing(
            "the face finder's weights come with facenet-pytorch, which is not installed; "
            "run: pip install facenet-pytorch==2.5.3"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / f"{net}.pt"
    if not path.is_file():
        raise WeightsMissing(
            f"facenet-pytorch is installed but {path.name} is not in its data folder; "
            "run: pip install --force-reinstall --no-deps facenet-pytorch==2.5.3"
        )
    return path


def pretrained(device: str | torch.device = "cpu") -> Cascade:
    """The cascade with its weights, ready to infer: FP32, channels-last, no gradients."""
    cascade = Cascade(PNet(), RNet(), ONet())
    files: tuple[Net, Net, Net] = ("pnet", "rnet", "onet")
    for net, network in zip(files, cascade, strict=True):
        weights = torch.load(weights_path(net), map_location="cpu", weights_only=True)
        network.load_state_dict(
            {key: _widened(weights[key], wanted) for key, wanted in network.state_dict().items()}
        )
        network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cascade


def _widened(weight: Tensor, wanted: Tensor) -> Tensor:
    """A weight with zeros for the channels that were added."""
    # A channel without weights and bias stays zero through its PReLU, so no sum changes.
    wider = torch.zeros_like(wanted)
    wider[tuple(slice(length) for length in weight.shape)] = weight
    return wider
