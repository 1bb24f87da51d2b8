"""The pictures behind a verdict: the strongest faces of each track, and whole frames with all.

Crops are kept as they were scored, a bounded number per track.  Of the frame with a track's
strongest face a smaller copy is kept, so that a reader sees who is meant; few of these frames show
all tracks.

The residual is the network's own |x − rebuilt|, smoothed and drawn over the face in one colour.
The pipeline asks for it only where the model's manifest proves that it points at forgeries.  All
pictures of a verdict share one scale, so that a face with a weak residual looks weak beside one
with a strong residual.
"""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ralf.worker.contract import FaceInFrame, Picture, Track, WholeFrame

PER_TRACK = 5
JPEG_QUALITY = 85
FRAMES = 4
"""Whole frames in one verdict's evidence."""
LONG_SIDE = 800
"""Of a whole frame, in pixels: about 100 KB."""
WEAK = 8 / 255
"""Residuals that are all below this are not stretched to full colour: they show no finding."""
HEAT = np.array([230, 97, 1], np.float32)  # orange reads on every skin and to the colour-blind


@dataclass(frozen=True)
class KeptFace:
    """A crop to show beside the verdict."""

    track: int
    time_s: float
    logit: float
    crop: Tensor  # u8 [3, s, s]


@dataclass(frozen=True)
class KeptFrame:
    """A whole frame, made smaller."""

    time_ms: int
    width: int
    height: int
    jpeg: str

    @classmethod
    def of(cls, time_s: float, pixels: Tensor) -> "KeptFrame":
        """pixels: u8 [3, h, w]."""
        image = Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
        image.thumbnail((LONG_SIDE, LONG_SIDE))
        width, height = image.size
        return cls(round(time_s * 1000), width, height, jpeg(np.asarray(image)))


class StrongestFaces:
    """Keeps the few crops of each track that score highest, and the frame of the highest."""

    def __init__(self, per_track: int = PER_TRACK) -> None:
        self.per_track = per_track
        self._kept: dict[int, list[KeptFace]] = {}
        self._frames: dict[float, KeptFrame] = {}

    def add(
        self,
        tracks: NDArray[np.int64],
        times_s: NDArray[np.float64],
        logits: NDArray[np.float32],
        crops: Tensor,
        whole: Callable[[int], Tensor],
    ) -> None:
        """Take a chunk's crops; those that score higher replace the lowest that are kept.

        `whole` gives the frame of a row, u8 [3, h, w].
        """
        # The strongest first: once a track has its crops, all weaker ones are refused by a
        # comparison, and none is copied from the device in vain.
        for row in np.argsort(-logits, kind="stable"):
            track = int(tracks[row])
            if track < 0:
                continue
            kept = self._kept.setdefault(track, [])
            if len(kept) == self.per_track and logits[row] <= kept[-1].logit:
                continue
            # A copy, because a view would keep the whole chunk's crops in memory.
            crop = crops[row].to("cpu", copy=True)
            candidate = KeptFace(track, float(times_s[row]), float(logits[row]), crop)
            kept.append(candidate)
            kept.sort(key=lambda face: (-face.logit, face.time_s))
            del kept[self.per_track :]
            if kept[0] is candidate and candidate.time_s not in self._frames:
                self._frames[candidate.time_s] = KeptFrame.of(candidate.time_s, whole(int(row)))
        highest = {kept[0].time_s for kept in self._kept.values()}
        self._frames = {at: frame for at, frame in self._frames.items() if at in highest}

    def follow(self, track_of: Callable[[KeptFace], int]) -> None:
        """Put each crop to the track that its face has now, after faces were tracked anew."""
        faces = [face for kept in self._kept.values() for face in kept]
        self._kept = {}
        for face in sorted(faces, key=lambda face: (-face.logit, face.time_s)):
            moved = replace(face, track=track_of(face))
            kept = self._kept.setdefault(moved.track, [])
            kept += [moved] if len(kept) < self.per_track else []

    def of_tracks(self, tracks: Iterable[int]) -> list[KeptFace]:
        """The kept crops of these tracks, strongest first within each."""
        return [face for track in tracks for face in self._kept.get(track, [])]

    def frames(self, tracks: Sequence[Track]) -> tuple[WholeFrame, ...]:
        """Few frames that show these tracks: first the one that shows the most of them."""
        seen: dict[int, dict[str, FaceInFrame]] = {}
        for track in tracks:
            for sample in track.samples:
                face = FaceInFrame(track_id=track.track_id, box=sample.box, score=sample.score)
                seen.setdefault(sample.time_ms, {})[track.track_id] = face
        left = {frame.time_ms: frame for frame in self._frames.values()}
        missing = {track.track_id for track in tracks}
        chosen: list[KeptFrame] = []
        while left and len(chosen) < FRAMES:
            shows = {at: missing & seen.get(at, {}).keys() for at in left}
            best = max(left, key=lambda at: (len(shows[at]), _highest(seen.get(at, {})), -at))
            if not shows[best]:
                break
            missing -= shows[best]
            chosen.append(left.pop(best))
        return tuple(
            WholeFrame(**vars(frame), faces=tuple(seen[frame.time_ms].values()))
            for frame in sorted(chosen, key=lambda frame: frame.time_ms)
        )


def _highest(faces: dict[str, FaceInFrame]) -> float:
    return max((face.score for face in faces.values()), default=0.0)


def jpeg(image: NDArray[np.uint8]) -> str:
    """[h, w, 3] u8 → base64 JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def pictures(
    kept: list[KeptFace], names: dict[int, str], scores: list[float], residuals: Tensor | None
) -> tuple[Picture, ...]:
    """Faces with, where the network can explain, the residual drawn over them.

    residuals: [k, 3, s, s] in 0..1, one per kept crop.
    """
    heats = _heats(residuals) if residuals is not None and len(kept) else [None] * len(kept)
    made = []
    for one, score, heat in zip(kept, scores, heats, strict=True):
        face = one.crop.permute(1, 2, 0).contiguous().numpy()
        made.append(
            Picture(
                track_id=names[one.track],
                time_ms=round(one.time_s * 1000),
                score=score,
                face=jpeg(face),
                residual=None if heat is None else jpeg(_overlay(face, heat)),
            )
        )
    return tuple(made)


def _heats(residuals: Tensor) -> list[NDArray[np.float32]]:
    """Residuals as maps in 0..1 on one scale."""
    # Only pictures need it, and it takes a fifth of a second to import.
    from scipy.ndimage import gaussian_filter

    flat = residuals.detach().to(torch.float32).mean(1).numpy()  # [k, s, s]
    sigma = flat.shape[-1] / 64
    smooth = [gaussian_filter(one, sigma) for one in flat]
    # Not the maximum: one bright pixel would make all the others pale.
    top = max(WEAK, *(float(np.quantile(one, 0.995)) for one in smooth))
    return [np.clip(one / top, 0, 1).astype(np.float32) for one in smooth]


def _overlay(face: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    grey = face.astype(np.float32).mean(-1, keepdims=True)
    alpha = (heat[..., None] ** 1.5) * 0.85
    mixed: NDArray[np.uint8] = np.clip(grey * (1 - alpha) + HEAT * alpha, 0, 255).astype(np.uint8)
    return mixed
