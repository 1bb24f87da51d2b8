"""Classifier backbones: timm's networks, cut into a stem, the rest, and a one-logit head.

The cut is where RALF merges its guide: for Xception after conv1-bn1-relu-conv2-bn2-relu, for the
others after the first convolution with its norm and activation; all at half the input's size.
Inside the rest there is a second place, where FDFL merges: between Xception's entry and middle
flow, and in the others where a sixteenth of the input's size is first reached.

Initial weights come from a safetensors file in timm's names or from timm's hub.  They were
learnt on photographs, and RALF feeds the stem residuals: non-negative, near zero, and not
scaled, as in the paper.  Every stem's first convolution has no bias and a batch
norm behind it, which corrects scale and offset once its statistics are those of
residuals: so train with the norms in training mode, and never freeze the stem's statistics.

The only file that imports timm, and only when it builds one of timm's networks: that takes seconds.
tf_efficientnet_lite0, which the shipped model has, and …_lite2 are our own definitions
(efficientnet_lite.py).
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ralf.kernels.networks.efficientnet_lite import SCALES, EfficientNetLite

Pool = Literal["max", "mean"]


class NetworkError(ValueError):
    """A network cannot be built or filled as asked; the message says what is possible."""


class Family(NamedTuple):
    """How one of timm's networks is cut."""

    timm_name: str
    stem: tuple[str, ...]
    head: str
    middle: str
    """The first part of the middle flow."""
    channels: int
    """The channels of its input."""


class Features(NamedTuple):
    """The values that losses on features use."""

    embedding: Tensor  # [m, c] pooled, FP32
    logit: Tensor  # [m] of being forged, FP32


FAMILIES: dict[str, Family] = {
    "xception": Family(
        "legacy_xception", ("conv1", "bn1", "act1", "conv2", "bn2", "act2"), "fc", "block4", 728
    ),
    "resnet18": Family("resnet18", ("conv1", "bn1", "act1"), "fc", "layer4", 256),
    "resnet50": Family("resnet50", ("conv1", "bn1", "act1"), "fc", "layer4", 1024),
    "tf_efficientnet_lite0": Family(
        "tf_efficientnet_lite0", ("conv_stem", "bn1"), "classifier", "blocks.4", 80
    ),
    "tf_efficientnet_lite2": Family(
        "tf_efficientnet_lite2", ("conv_stem", "bn1"), "classifier", "blocks.4", 88
    ),
}


def family(backbone: str) -> Family:
    """How the named backbone is cut."""
    if backbone not in FAMILIES:
        raise NetworkError(f"backbone should be one of {', '.join(FAMILIES)}, got {backbone!r}")
    return FAMILIES[backbone]


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module's weights are in, and so its input must be."""
    return next(module.parameters()).dtype


def unit(crops: Tensor) -> Tensor:
    """u8 crops as FP32 of 0..1; floats are taken to be that already."""
    return crops.float() / 255 if crops.dtype == torch.uint8 else crops.float()


class Backbone(nn.Module):
    """stem → rest → global pooling → one logit.  Keys are timm's behind `stem.` and `rest.`."""

    def __init__(self, backbone: str, pool: Pool = "max") -> None:
        super().__init__()
        # Dimensions come from a manifest as they are, so the Literal protects nothing here.
        if pool not in ("max", "mean"):
            raise NetworkError(f"pool should be max or mean, got {pool!r}")
        self.family = family(backbone)
        self.pool = pool
        network = _fresh(self.family)
        parts = OrderedDict(network.named_children())
        self.head = nn.Linear(int(network.num_features), 1)
        # Both are ours, for the choice of pooling and one FP32 logit.
        for name in (self.family.head, "global_pool"):
            del parts[name]
        self.stem = nn.Sequential(OrderedDict((name, parts.pop(name)) for name in self.family.stem))
        self.rest = nn.Sequential(parts)

    @property
    def width(self) -> int:
        """The number of inputs of the head."""
        return self.head.in_features

    @property
    def cam_layer(self) -> nn.Module:
        """The last convolution before the pooling, whose maps Grad-CAM shows."""
        return [layer for layer in self.rest.modules() if isinstance(layer, nn.Conv2d)][-1]

    def classify(self, features: Tensor) -> Tensor:
        """The stem's (merged) features [B, c, h, w] → logits [B], the head in FP32."""
        return self.conclude(self.rest(features)).logit

    def conclude(self, maps: Tensor) -> Features:
        """The last maps [B, c, h, w], pooled and judged."""
        # A maximum is exact in any dtype; a mean summed in half precision is not.
        pooled = maps.amax((2, 3)) if self.pool == "max" else maps.float().mean((2, 3))
        logits: Tensor = self.head(pooled.to(dtype_of(self.head)))
        return Features(pooled.float(), logits.squeeze(1).float())

    def enter(self, features: Tensor) -> Tensor:
        """The rest up to the middle flow."""
        for name, part in self._parts():
            if name == self.family.middle:
                break
            features = part(features)
        return features

    def leave(self, features: Tensor) -> Tensor:
        """The rest from the middle flow on, to the last maps."""
        inside = False
        for name, part in self._parts():
            inside = inside or name == self.family.middle
            if inside:
                features = part(features)
        return features

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The rest's parts in order, those of a nested middle one by one."""
        nest, dot, _ = self.family.middle.partition(".")
        for name, part in self.rest.named_children():
            if dot and name == nest:
                yield from ((f"{name}.{inner}", each) for inner, each in part.named_children())
            else:
                yield name, part

    def forward(self, image: Tensor) -> Tensor:
        """Images [B, 3, h, w] as the stem wants them → logits [B]."""
        return self.classify(self.stem(image.to(dtype_of(self.stem))))


def stem_of(backbone: str, channels: int) -> nn.Sequential:
    """A backbone's stem with random weights, for pictures of so many channels."""
    cut = family(backbone)
    parts = OrderedDict(_fresh(cut, channels).named_children())
    return nn.Sequential(OrderedDict((name, parts[name]) for name in cut.stem))


def _fresh(chosen: Family, channels: int = 3) -> Any:
    """The whole network with random weights."""
    if chosen.timm_name in SCALES:
        return EfficientNetLite(SCALES[chosen.timm_name], channels=channels)
    import timm

    return timm.create_model(chosen.timm_name, pretrained=False, num_classes=1, in_chans=channels)


def lower_backbone(backbone: Backbone, dtype: torch.dtype) -> None:
    """Stem and rest in a smaller dtype; the head stays in FP32, since one logit costs nothing."""
    backbone.stem.to(dtype)
    backbone.rest.to(dtype)


def load_backbone(
    backbone: Backbone, weights: Path | str | None = None, pretrained: bool = False
) -> tuple[str, ...]:
    """Fill the backbone from a file, or from timm's hub; the names left as they were (the head).

    A file's head is taken when it, too, has one output.  Anything else that is missing, unknown
    or of another shape is an error: a half-loaded backbone would train badly without any message.
    """
    if weights is None and not pretrained:
        raise NetworkError(
            "no initial weights: give a safetensors file in timm's names, or ask for timm's own"
        )
    source = _from_file(Path(weights)) if weights is not None else _from_hub(backbone.family)
    where = weights if weights is not None else f"timm's {backbone.family.timm_name}"
    mine = backbone.state_dict()
    filled = {_own_name(backbone, name): tensor for name, tensor in source.items()}
    # A head for ImageNet's thousand classes.
    if filled.get("head.weight", mine["head.weight"]).shape != mine["head.weight"].shape:
        filled = {name: t for name, t in filled.items() if not name.startswith("head.")}
    # Counters of batches seen: some files leave them out, and nothing at inference reads them.
    left = sorted(n for n in mine.keys() - filled.keys() if "num_batches" not in n)
    missing = [n for n in left if not n.startswith("head.")]
    unknown = sorted(filled.keys() - mine.keys())
    shapes = [n for n in filled.keys() & mine.keys() if filled[n].shape != mine[n].shape]
    if missing or unknown or shapes:
        raise NetworkError(
            f"{where} is not {backbone.family.timm_name}: missing {missing[:3]}, "
            f"unknown {unknown[:3]}, of another shape {sorted(shapes)[:3]}"
        )
    # Our own values stand in for the counters and the head, which a file may lack.
    backbone.load_state_dict({**mine, **{n: t.to(mine[n].dtype) for n, t in filled.items()}})
    return tuple(left)


def _own_name(backbone: Backbone, timms: str) -> str:
    first, _, last = timms.partition(".")
    if first == backbone.family.head:
        return f"head.{last}"
    return f"{'stem' if first in backbone.family.stem else 'rest'}.{timms}"


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NetworkError(f"no weights at {path}; expected a safetensors file in timm's names")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _from_hub(chosen: Family) -> dict[str, Tensor]:
    import timm

    try:
        tensors: dict[str, Tensor] = timm.create_model(
            chosen.timm_name, pretrained=True
        ).state_dict()
    except (OSError, RuntimeError) as error:  # no network, or the hub refuses
        raise NetworkError(
            f"timm could not fetch the weights of {chosen.timm_name} ({error}); "
            "fetch them where there is a network and give the safetensors file instead"
        ) from error
    return tensors
