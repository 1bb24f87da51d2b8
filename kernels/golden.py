"""Golden crops: how an engine proves that it runs the model that was published.

golden.npz holds u8 crops and what the FP32 reference says of them.  It is read without pickle,
hashed as read, and refused where an array has another shape or type than it should.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.atomic_files import Damaged

GOLDEN = "golden.npz"


@dataclass(frozen=True)
class Golden:
    """Crops and what the FP32 reference says of them."""

    crops: NDArray[np.uint8]  # [n, 3, s, s]
    logits: NDArray[np.float32]  # [n]

    def __post_init__(self) -> None:
        n = len(self.logits)
        square = self.crops.ndim == 4 and self.crops.shape[2] == self.crops.shape[3]
        if not square or self.crops.shape[:2] != (n, 3) or self.crops.dtype != np.uint8:
            raise Damaged(
                f"golden crops should be u8 [{n},3,s,s], got {self.crops.dtype} {self.crops.shape}"
            )
        if n == 0 or self.logits.shape != (n,) or not np.isfinite(self.logits).all():
            raise Damaged(f"golden logits should be finite [n ≥ 1], got {self.logits.shape}")

    def to_bytes(self) -> bytes:
        """golden.npz, the same bytes for the same arrays."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, crops=self.crops, logits=self.logits)
        return buffer.getvalue()


class Version(Protocol):
    """As much of an Artifact as is needed here."""

    @property
    def path(self) -> Path:
        """Its folder."""

    def read(self, name: str) -> bytes:
        """A file's bytes, hashed as read."""


def golden(artifact: Version) -> Golden:
    """The version's golden crops and logits."""
    try:
        with np.load(io.BytesIO(artifact.read(GOLDEN)), allow_pickle=False) as arrays:
            return Golden(arrays["crops"], arrays["logits"].astype(np.float32))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise Damaged(f"{artifact.path / GOLDEN} does not read: {error}") from error
