"""Where the parts of a face are: regions as polygons, from a 468-point mesh or from five points.

With a mesh a region is the hull of the mesh's own points.  With five points (eyes, nose tip,
mouth corners, as every face finder gives them) a mean face is fitted to them by the best affine
map.  Over 1,743 portraits its outline is within 0.06 eye distances (median) of the mesh's.  Points
are in pixels, x before y; left and right are the picture's.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull

Points = NDArray[np.float32]
Region = Literal["face", "inner", "lower", "mouth", "eyes", "nose"]

# The mean face: origin between the eyes, one unit from eye to eye, y down.
FIVE = np.array([[-0.5, 0], [0.5, 0], [0, 0.6], [-0.48, 1.03], [0.48, 1.03]], np.float32)
_OVAL = [(0, -0.79), (0.54, -0.74), (0.92, -0.51), (1.06, -0.15), (1.07, 0.31), (1.03, 0.79)]
_OVAL += [(0.86, 1.25), (0.6, 1.54), (0.35, 1.72), (0, 1.8)]
_LIPS = [(0.47, 1.02), (0.36, 0.97), (0.14, 0.93), (0.35, 1.15), (0.13, 1.27)]
_NOSE = [
    (0, -0.03),
    (0.16, 0.09),
    (0.15, 0.26),
    (0.28, 0.46),
    (0.34, 0.58),
    (0.29, 0.69),
    (0, 0.75),
]
_EYE = [(0.7, 0.02), (0.62, 0.05), (0.48, 0.07), (0.33, 0.05), (0.27, 0.04), (0.51, -0.05)]
_BROW = [(0.87, -0.19), (0.63, -0.31), (0.22, -0.28), (0.42, -0.22), (0.73, -0.2)]

# The same parts in MediaPipe's topology of 468 points.
_MESH_LIPS = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40]
_EYE_CORNERS = ((33, 133), (362, 263))
_NOSE_TIP = 4
_MESH_NOSE = [168, 245, 174, 209, 129, 98, 97, 2, 326, 327, 358, 429, 399, 465]
_MESH_EYES = (
    [33, 163, 145, 154, 133, 157, 159, 161, 70, 63, 105, 66, 107],
    [263, 390, 374, 381, 362, 384, 386, 388, 300, 293, 334, 296, 336],
)
MOUTH_CORNERS, UPPER_LIP, LOWER_LIP, CHIN = (61, 291), 0, 17, 152


@dataclass(frozen=True)
class FaceGeometry:
    """One face in an image: its box, five points, and the mesh where one is known."""

    box: Points  # [4] x0 y0 x1 y1
    five: Points  # [5, 2] left eye, right eye, nose, left and right mouth corner
    mesh: Points | None = field(default=None, repr=False)  # [468, 2]

    def __post_init__(self) -> None:
        if self.box.shape != (4,) or self.five.shape != (5, 2):
            raise ValueError(f"box [4] and five [5,2], got {self.box.shape} {self.five.shape}")
        if self.mesh is not None and self.mesh.shape != (468, 2):
            raise ValueError(f"a mesh has 468 points, got {self.mesh.shape}")

    @property
    def consistent(self) -> bool:
        """Whether the mesh lies on the face that the five points are of.

        A mesh finder now and then takes an ear or a hat for a face: 3 times in 9,185 pictures that
        end at the face, never in 1,743 portraits.
        """
        if self.mesh is None:
            return True
        apart = np.linalg.norm(five_of_mesh(self.mesh) - self.five, axis=1).max()
        return bool(apart < 0.8 * self.eye_distance)

    def by_mesh(self) -> "FaceGeometry":
        """Box and five points as the face finder gives them on a wide picture, from the mesh.

        On a picture that ends at the face the finder's own are too large, too high and scattered.
        """
        if self.mesh is None:
            return self
        low, high = self.mesh.min(axis=0), self.mesh.max(axis=0)
        # Medians over 1,743 portraits: the finder's box against the mesh's extent.
        middle = (low + high) / 2 + np.array([-0.01, -0.07], np.float32) * (high - low)
        reach = (high - low) * np.array([0.98, 1.14], np.float32) / 2
        box = np.concatenate([middle - reach, middle + reach])
        return FaceGeometry(np.asarray(box, np.float32), five_of_mesh(self.mesh), self.mesh)

    @property
    def eye_distance(self) -> float:
        """The unit of all changes to the face; at least a quarter of the box's width.

        In a profile the eyes are nearly above each other, and their distance alone would be 0.
        """
        apart = float(np.linalg.norm(self.five[1] - self.five[0]))
        return max(apart, float(self.box[2] - self.box[0]) / 4, 1.0)

    def scaled(self, x: float, y: float, left: float = 0, top: float = 0) -> "FaceGeometry":
        """The face in an image cut at (left, top) and then scaled by x and y."""
        scale, shift = np.array([x, y], np.float32), np.array([left, top], np.float32)
        mesh = None if self.mesh is None else (self.mesh - shift) * scale
        box = ((self.box.reshape(2, 2) - shift) * scale).reshape(4)
        return FaceGeometry(box, (self.five - shift) * scale, mesh)

    def moved(self, bend: NDArray[np.float32]) -> "FaceGeometry":
        """The face after a remap in which each pixel came from `bend` [h, w, 2] away."""

        def at(points: Points) -> Points:
            now = points
            for _ in range(3):  # solves x = p − bend(x) by iteration; three steps are enough
                x, y = np.rint(now).astype(int).T
                inside = bend[y.clip(0, bend.shape[0] - 1), x.clip(0, bend.shape[1] - 1)]
                now = points - inside
            return np.asarray(now, np.float32)

        mesh = None if self.mesh is None else at(self.mesh)
        corners = at(self.box.reshape(2, 2)).reshape(4)
        return FaceGeometry(corners, at(self.five), mesh)

    def flipped(self, width: int) -> "FaceGeometry":
        """The face in the mirrored image, without a mesh: its numbering is not mirrored."""
        mirror = np.array([width - 1, 0], np.float32)
        five = np.abs(mirror - self.five)[[1, 0, 2, 4, 3]]
        left, top, right, bottom = self.box
        box = np.array([width - 1 - right, top, width - 1 - left, bottom], np.float32)
        return FaceGeometry(box, five, None)

    def outline(self, region: Region) -> list[Points]:
        """The region's convex polygons; two for the eyes, one for the rest."""
        if self.mesh is not None:
            return [hull(part) for part in _of_mesh(self.mesh, region)]
        place = fit(FIVE, self.five)
        return [hull(applied(place, part)) for part in _of_mean(region)]

    def controls(self) -> Points:
        """A few points that fix the whole face in a warp: the five, and the outline."""
        if self.mesh is not None:
            ring = hull(self.mesh)
            step = max(1, len(ring) // 12)
            return np.concatenate([self.five, ring[::step]]).astype(np.float32)
        rim = np.array([*_OVAL, *((-x, y) for x, y in _OVAL[1:-1])], np.float32)
        return np.concatenate([self.five, applied(fit(FIVE, self.five), rim)]).astype(np.float32)


def five_of_mesh(mesh: Points) -> Points:
    """The five points of a mesh: middles of the eyes, tip of the nose, corners of the mouth."""
    eyes = [mesh[list(corners)].mean(axis=0) for corners in _EYE_CORNERS]
    return np.stack([*eyes, mesh[_NOSE_TIP], *mesh[list(MOUTH_CORNERS)]])


def _both(half: list[tuple[float, float]]) -> Points:
    """A half of the mean face and its mirror image."""
    return np.array([*half, *((-x, y) for x, y in half)], np.float32)


def _of_mean(region: Region) -> list[Points]:
    """The region's points on the mean face."""
    right = np.array([*_EYE, *_BROW], np.float32)
    parts: dict[Region, list[Points]] = {
        "face": [_both(_OVAL)],
        "inner": [np.concatenate([_both(_BROW), _both(_LIPS), _both(_NOSE)])],
        "lower": [_both([p for p in _OVAL if p[1] > 0.5] + [(0.34, 0.55)])],
        "mouth": [_both(_LIPS)],
        "eyes": [right, right * np.array([-1, 1], np.float32)],
        "nose": [_both(_NOSE)],
    }
    return parts[region]


def _of_mesh(mesh: Points, region: Region) -> list[Points]:
    """The region's points on a mesh."""
    eyes = [mesh[part] for part in _MESH_EYES]
    lips, nose = mesh[_MESH_LIPS], mesh[_MESH_NOSE]
    if region == "eyes":
        return eyes
    if region == "lower":
        # Down from the nose's base, along the face's own axis, so a tilted head is cut right.
        axis = mesh[CHIN] - mesh[168]
        below = (mesh - mesh[2]) @ axis > 0
        return [np.asarray(mesh[below], np.float32)]
    whole = {"face": mesh, "inner": np.concatenate([*eyes, lips, nose])}
    return [{**whole, "mouth": lips, "nose": nose}[region]]


def hull(points: Points) -> Points:
    return np.asarray(points[ConvexHull(points).vertices], np.float32)


def fit(source: Points, target: Points) -> Points:
    """The affine map [3, 2] that takes source to target with least squared error."""
    lifted = np.concatenate([source, np.ones((len(source), 1), np.float32)], axis=1)
    return np.asarray(np.linalg.lstsq(lifted, target, rcond=None)[0], np.float32)


def applied(place: Points, points: Points) -> Points:
    return np.asarray(points @ place[:2] + place[2], np.float32)


def fill(polygons: list[Points], height: int, width: int) -> NDArray[np.float32]:
    """1 inside the polygons and 0 outside, [h, w]."""
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        pen.polygon([(float(x), float(y)) for x, y in polygon], fill=255)
    return np.asarray(canvas, np.float32) / np.float32(255)


def grown(polygon: Points, factor: float) -> Points:
    """The polygon enlarged about its middle, the mean of its corners."""
    return _enlarged(polygon, factor, polygon.mean(axis=0))


def grown_steadily(polygon: Points, factor: float) -> Points:
    """The polygon enlarged about the middle of its extent.

    A hull that moves a little may have other corners, and the mean of its corners then jumps.
    """
    return _enlarged(polygon, factor, (polygon.min(axis=0) + polygon.max(axis=0)) / 2)


def _enlarged(polygon: Points, factor: float, middle: Points) -> Points:
    return np.asarray(middle + (polygon - middle) * factor, np.float32)
