"""EfficientNet-Lite (Tan and Le 2019), the backbone of the model that ships, without timm.

timm takes two seconds to import, because it brings torchvision and torch's compiler with it; these
networks need torch alone.  Names of layers and arithmetic are those of timm's
`tf_efficientnet_lite0` and `…_lite2`: the same weights give the same bits (a test compares them).
The padding is TensorFlow's "same", which adds an odd pixel at the right and at the bottom.

All sizes are one table, made wider and deeper: channels times the width, to the nearest multiple of
8; blocks of a stage times the depth, rounded up.  Stem, head, and the number of blocks in the first
and in the last stage stay.  Lite0 was trained on pictures of 224 px, Lite2 of 260.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 1280
"""The channels that it gives its classifier."""
EPSILON = 1e-3


class Stage(NamedTuple):
    """Blocks of one width, one after the other; the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    channels: int


class Scale(NamedTuple):
    """How much wider and deeper than Lite0 a size is."""

    width: float
    depth: float


SCALES = {
    "tf_efficientnet_lite0": Scale(1.0, 1.0),
    "tf_efficientnet_lite2": Scale(1.1, 1.2),
}
FIRST = 32
STAGES = (
    Stage(1, 3, 1, 16),
    Stage(2, 3, 2, 24),
    Stage(2, 5, 2, 40),
    Stage(3, 3, 2, 80),
    Stage(3, 5, 1, 112),
    Stage(4, 5, 2, 192),
    Stage(1, 3, 1, 320),
)
WIDER = 6
"""How many times as many channels a block has inside; the first stage's has no more."""


class SameConv(nn.Conv2d):
    """A convolution with stride whose output has the input's size over the stride, rounded up."""

    def forward(self, image: Tensor) -> Tensor:
        (height, width), stride = image.shape[-2:], self.stride[0]
        down, right = (_lacking(side, self.kernel_size[0], stride) for side in (height, width))
        padded = F.pad(image, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(padded, self.weight, None, self.stride, 0, 1, self.groups)


def _lacking(side: int, kernel: int, stride: int) -> int:
    return max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)


class Norm(nn.BatchNorm2d):
    """Batch norm, then ReLU6 where the layer is followed by one."""

    def __init__(self, channels: int, *, relu: bool = True) -> None:
        super().__init__(channels, eps=EPSILON)
        self.relu = relu

    def forward(self, features: Tensor) -> Tensor:
        normed = super().forward(features)
        return F.relu6(normed, inplace=True) if self.relu else normed


class Separable(nn.Module):
    """A depthwise convolution, then one across channels."""

    def __init__(self, before: int, stage: Stage) -> None:
        super().__init__()
        self.conv_dw = _conv(before, before, stage.kernel, stage.stride, groups=before)
        self.bn1 = Norm(before)
        self.conv_pw = _conv(before, stage.channels)
        self.bn2 = Norm(stage.channels, relu=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(features))))
        return out + features if out.shape == features.shape else out


class Inverted(nn.Module):
    """Many channels inside, few outside; what enters is added where the shape stays."""

    def __init__(self, before: int, stage: Stage) -> None:
        super().__init__()
        inside = before * WIDER
        self.conv_pw = _conv(before, inside)
        self.bn1 = Norm(inside)
        self.conv_dw = _conv(inside, inside, stage.kernel, stage.stride, groups=inside)
        self.bn2 = Norm(inside)
        self.conv_pwl = _conv(inside, stage.channels)
        self.bn3 = Norm(stage.channels, relu=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv_dw(self.bn1(self.conv_pw(features))))
        out = self.bn3(self.conv_pwl(out))
        return out + features if out.shape == features.shape else out


class EfficientNetLite(nn.Module):
    """The layers by timm's names; backbones.py cuts them and runs the parts."""

    def __init__(self, scale: Scale, *, channels: int = 3) -> None:
        super().__init__()
        self.num_features = WIDTH
        self.conv_stem = _conv(channels, FIRST, 3, 2)
        self.bn1 = Norm(FIRST)
        before, stages = FIRST, []
        for kind, stage in _stages(scale):
            stages.append(_blocks(kind, before, stage))
            before = stage.channels
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _conv(before, WIDTH)
        self.bn2 = Norm(WIDTH)
        self.global_pool = nn.Identity()
        self.classifier = nn.Linear(WIDTH, 1)
        for layer in self.modules():
            _fill(layer)


def _stages(scale: Scale) -> Iterator[tuple[type[Separable | Inverted], Stage]]:
    """The table at that size, and what its blocks are."""
    for stage in STAGES:
        fixed = stage in (STAGES[0], STAGES[-1])
        yield (
            Separable if stage is STAGES[0] else Inverted,
            stage._replace(
                blocks=stage.blocks if fixed else math.ceil(stage.blocks * scale.depth),
                channels=_rounded(stage.channels * scale.width),
            ),
        )


def _rounded(channels: float) -> int:
    """To the nearest multiple of 8, but not below nine tenths of what was asked."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def _blocks(kind: type[Separable | Inverted], before: int, stage: Stage) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for _ in range(stage.blocks):
        blocks.append(kind(before, stage))
        before, stage = stage.channels, stage._replace(stride=1)
    return nn.Sequential(*blocks)


def _conv(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return SameConv(before, after, kernel, stride, 0, groups=groups, bias=False)
    return nn.Conv2d(before, after, kernel, 1, kernel // 2, groups=groups, bias=False)


def _fill(layer: nn.Module) -> None:
    """Random weights as the authors drew them."""
    if isinstance(layer, nn.Conv2d):
        fan_out = layer.kernel_size[0] ** 2 * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out))
    elif isinstance(layer, nn.Linear):
        most = 1 / math.sqrt(layer.out_features)
        nn.init.uniform_(layer.weight, -most, most)
        nn.init.zeros_(layer.bias)
