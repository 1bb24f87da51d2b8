"""Which way up a decoded picture is, and what its numbers mean as colours.

The policy is `by_tag_untagged_601`: a tagged matrix and range are followed, and an untagged picture
is BT.601 limited, whatever its size.  Formats that are full range by name (yuvj) are read as such.
Matrices that swscale does not have are read as BT.601, with a warning.  HDR pictures become SDR by
tonemap.py.

Nothing here imports av; it reads attributes of frames that its callers decoded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralf.worker.media.tonemap import Transfer

# FFmpeg's AVColorSpace by number: its name here, and swscale's number for the same matrix.
_MATRICES: dict[int, tuple[str, int]] = {
    0: ("rgb", 0),
    1: ("bt709", 1),
    4: ("fcc", 4),
    5: ("bt601", 5),
    6: ("bt601", 5),
    7: ("smpte240m", 7),
    9: ("bt2020", 9),
    10: ("bt2020", 9),  # constant luminance: the nearest that swscale has
}
# Unspecified and reserved.
_UNTAGGED = {2, 3}
_BT601 = 5
_UNKNOWN = {8: "ycgco", 11: "smpte2085", 14: "ictcp", 15: "ipt", 16: "ycgco-re", 17: "ycgco-ro"}
_HDR: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
_BT2020 = 9
_LIMITED, FULL = 1, 2
_LUMA: dict[str, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}
"""The shares of red and of blue in luma, which define a matrix."""


@dataclass(frozen=True)
class Colour:
    """The matrix and range of a picture, as swscale numbers them."""

    matrix: int
    range: int


def colour_of(frame: Any) -> Colour:
    """The policy, for one frame."""
    matrix = _MATRICES.get(frame.colorspace, ("", _BT601))[1]
    return Colour(matrix, FULL if _is_full(frame) else _LIMITED)


def hdr_of(frame: Any) -> tuple[Transfer, bool] | None:
    """The transfer of an HDR picture and whether its primaries are BT.2020; None for SDR."""
    transfer = _HDR.get(frame.color_trc)
    if transfer is None:
        return None
    # Phones tag the matrix more reliably than the primaries.
    return transfer, _BT2020 in (frame.color_primaries, frame.colorspace)


def _is_full(frame: Any) -> bool:
    return bool(frame.color_range == FULL) or str(frame.format.name).startswith("yuvj")


def describe_colour(frame: Any) -> tuple[str, str, list[str]]:
    """Names of matrix and range as tagged, and warnings where a picture is not shown as meant."""
    notes = []
    number = frame.colorspace
    if number in _MATRICES:
        space = _MATRICES[number][0]
    elif number in _UNTAGGED:
        space = "unspecified"
    else:
        space = _UNKNOWN.get(number, f"matrix {number}")
        notes.append(f"colour: the matrix {space} is not known here and is read as BT.601")
    if number == 10:
        notes.append("colour: BT.2020 constant luminance is read as non-constant")
    if frame.color_trc in _HDR:
        notes.append(f"colour: {_HDR[frame.color_trc]} is HDR and was converted to SDR")
    if _is_full(frame):
        return space, "pc", notes
    return space, "tv" if frame.color_range == _LIMITED else "unspecified", notes


def from_bt601(space: str) -> NDArray[np.float64] | None:
    """The matrix [3, 3] from RGB made with BT.601 to RGB made as tagged; None where they are equal.

    For decoders that have no other matrix.  The range cancels out, because it stretches YCbCr
    equally for both.  Values that the first conversion clipped at 0 or 255 are lost.
    """
    if space not in _LUMA or space == "bt601":
        return None
    return np.asarray(_to_rgb(*_LUMA[space]) @ np.linalg.inv(_to_rgb(*_LUMA["bt601"])))


def _to_rgb(red: float, blue: float) -> NDArray[np.float64]:
    """Y in 0..1 and Cb, Cr in ±½ to RGB."""
    green = 1 - red - blue
    to_red, to_blue = 2 - 2 * red, 2 - 2 * blue
    return np.array(
        [
            [1, 0, to_red],
            [1, -to_blue * blue / green, -to_red * red / green],
            [1, to_blue, 0],
        ]
    )


def turn(frame: Any) -> tuple[int, bool]:
    """Quarter turns counter-clockwise to apply, and whether to mirror left and right after.

    The display matrix maps (x, y) to (a·x + c·y, b·x + d·y), in 16.16 fixed point, y downwards.
    Angles between the quarters go to the nearest.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    # Nine numbers, a b u, c d v, x y w; only the first two of the first two rows turn a picture.
    matrix = np.frombuffer(bytes(data), dtype=np.int32).astype(np.float64)
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    if a * d - b * c == 0:
        return 0, False
    mirrored = bool(a * d - b * c < 0)
    if mirrored:
        a, c = -a, -c  # undo the mirror, which comes last: x' → -x'
    return round(float(np.arctan2(-b, a)) / (np.pi / 2)) % 4, mirrored
