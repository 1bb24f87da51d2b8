"""A forgery made frame by frame: landmarks slip, colours drift, mouths move.

A forger's tool finds the face anew in each frame, and joins its copy anew.  Its errors are smooth
over time with a little jitter on top.  `Drift` gives both for one clip: the face as the tool found
it in a frame, and how the copy's colour and opacity differ there.  Strength is drawn for each clip;
some hardly drift.  The same seed drifts alike.

`talking` gives the donors of a clip whose mouth is drawn anew in each frame: one person, whose
expression goes from one to another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ralf.train.forge.families import Portrait
from ralf.train.forge.landmarks import FaceGeometry, Points, applied, fit
from ralf.train.forge.mesh import MEAN, expression_of, mesh_of
from ralf.train.forge.pixels import Image, Pixels, to_u8
from ralf.train.forge.video import Motion

TURN = (16, 32)
"""Least and most frames from one expression to the next."""


@dataclass(frozen=True)
class Slip:
    """What is different about one frame's forgery."""

    face: FaceGeometry
    """The face as the forger's tool found it."""
    gain: NDArray[np.float32]
    """Of each colour channel of the copy."""
    opacity: float


class Drift:
    """The slips of one clip, frame after frame."""

    def __init__(self, rng: np.random.Generator, fps: float) -> None:
        self._rng, self._fps = rng, fps
        self._strength = float(np.exp(rng.normal(-0.2, 0.6)))
        self._jitter = float(rng.uniform(0, 0.3))
        self._bend, self._colour = Motion(rng, (2, 6)), Motion(rng, (4,))

    def slips(self, face: FaceGeometry, frames: int) -> Iterator[Slip]:
        """One for each frame."""
        for number in range(frames):
            time_s = number / self._fps
            bend = self._bend.at(time_s) + self._jitter * self._rng.normal(0, 1, (2, 6))
            colour = self._colour.at(time_s) + self._jitter * self._rng.normal(0, 1, 4)
            tint = 0.012 * colour[:3] + 0.02 * colour[3]
            yield Slip(
                _slipped(face, self._strength * bend),
                np.asarray(np.exp(self._strength * tint), np.float32),
                float(np.clip(1 - 0.06 * self._strength * (1 + colour[3]), 0.6, 1)),
            )


def _slipped(face: FaceGeometry, bend: NDArray[np.float64]) -> FaceGeometry:
    """The face, its points moved by a polynomial of the second degree; bend [2, 6] is its size."""
    middle, unit = face.five.mean(axis=0), face.eye_distance
    # Parts of the distance between the eyes: shift, then scale and turn, then curvature.
    size = np.array([0.018, 0.012, 0.012, 0.008, 0.008, 0.008])

    def at(points: Points) -> Points:
        x, y = ((points - middle) / unit).T
        terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y])
        return np.asarray(points + unit * ((bend * size) @ terms).T, np.float32)

    mesh = None if face.mesh is None else at(face.mesh)
    return FaceGeometry(at(face.box.reshape(2, 2)).reshape(4), at(face.five), mesh)


def joined(real: Image, forged: Image, mask: Pixels, slip: Slip) -> Image:
    """The forged picture in this frame's colours and opacity; outside the mask it is the real."""
    copy = forged.astype(np.float32)
    copy += copy * (slip.gain - 1) * mask[..., None]
    out = real + (copy - real) * np.float32(slip.opacity)
    # Where nothing was forged the two are the same, and so is what is between them.
    return to_u8(out)


def talking(donors: Sequence[Portrait], frames: int, rng: np.random.Generator) -> list[Portrait]:
    """The first donor in each frame: the expression is first its own, then the second donor's, and
    so on; the last one's stays.  Only the points move, not the picture."""
    shown = [expression_of(donor.face, rng) for donor in donors]
    reached = np.cumsum([0, *rng.integers(TURN[0], TURN[1] + 1, len(donors) - 1)])
    first = donors[0]
    place = fit(MEAN, mesh_of(first.face))
    said = []
    for number in range(frames):
        along = float(np.interp(number, reached, np.arange(len(donors))))
        before, share = int(along), along % 1
        after = min(before + 1, len(donors) - 1)
        # A jaw starts and stops gently.
        gone = np.float32(share * share * (3 - 2 * share))
        expression = shown[before] + gone * (shown[after] - shown[before])
        face = replace(first.face, mesh=applied(place, MEAN + expression))
        said.append(replace(first, face=face))
    return said
