"""A classifier backbone alone on the plain crop, scaled to −1..1: the baseline for the others."""

import torch
from torch import Tensor, nn

from ralf.kernels.networks.backbones import Backbone, Features, Pool, dtype_of, lower_backbone, unit


class Classifier(nn.Module):
    """The detector; its dimensions are what the manifest's `network` holds."""

    def __init__(self, *, backbone: str = "xception", size: int = 256, pool: Pool = "max") -> None:
        super().__init__()
        self.size = size
        self.backbone = Backbone(backbone, pool)

    def trace(self, crops: Tensor) -> Features:
        """Crops u8, or floats of 0..1, [m, 3, s, s] RGB, and what losses read."""
        stem = self.backbone.stem
        return self.backbone.conclude(
            self.backbone.rest(stem((unit(crops) * 2 - 1).to(dtype_of(stem))))
        )

    def forward(self, crops: Tensor) -> Tensor:
        """Crops u8, or floats of 0..1, [m, 3, s, s] RGB → logits [m] of being forged."""
        return self.trace(crops).logit

    def lower(self, dtype: torch.dtype) -> "Classifier":
        """The convolutions in a smaller dtype; what must stay exact stays in FP32."""
        lower_backbone(self.backbone, dtype)
        return self

    @property
    def cam_layer(self) -> nn.Module:
        """Where Grad-CAM looks."""
        return self.backbone.cam_layer
