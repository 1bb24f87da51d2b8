"""HDR pictures (PQ and HLG) as SDR, because the model was trained and calibrated on SDR.

    code values → light on the display → BT.709 primaries → tone curve → BT.709 code values

White in SDR is put at 203 nits, the reference white of ITU-R BT.2408, so that a face has the
brightness that it would have in an SDR recording.  Up to KNEE of that white nothing changes but
the encoding; brighter light is compressed by a Möbius curve, up to PEAK_NITS.  The same maths as
FFmpeg's  zscale=t=linear:npl=203, zscale=p=bt709, tonemap=mobius:param=0.75, zscale=t=bt709:
PQ test pictures differ by 2 levels of 255 on average, by 16 at most in colours that are nearly
black; grey HLG is the same, and for colours BT.2100 is followed, where zscale approximates.

A frame is converted in bands of rows that stay in a core's cache: 27 ms of one core for a 1080p
frame of PQ, 37 ms of HLG.
"""

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Transfer = Literal["PQ", "HLG"]
Floats = NDArray[np.float32]

WHITE_NITS = 203.0
PEAK_NITS = 1000.0
"""Of HLG by its standard; most PQ clips are mastered for it, and brighter light is clipped."""
KNEE = 0.75
BAND_PIXELS = 2**15
GAMMA = 2.4
"""Of an SDR display, ITU-R BT.1886."""
LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
"""Of BT.2020."""
TO_BT709 = np.array(
    [
        [1.6604910, -0.5876411, -0.0728499],
        [-0.1245505, 1.1328999, -0.0083494],
        [-0.0181508, -0.1005789, 1.1187297],
    ],
    np.float32,
)
"""From BT.2020 primaries, in linear light."""


def to_sdr(codes: NDArray[np.uint16], transfer: Transfer, *, wide: bool) -> NDArray[np.uint8]:
    """Full-range R′G′B′ [3, h, w] in 16 bits → SDR [3, h, w]; `wide`: in BT.2020 primaries."""
    _, height, width = codes.shape
    out = np.empty(codes.shape, np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for first in range(0, height, rows):
        band = slice(first, first + rows)
        # Every code has its place in the table; `clip` only spares a check and a copy.
        light = np.take(_light(transfer), codes[:, band].reshape(3, -1), mode="clip")
        if transfer == "HLG":
            # BT.2100: a display brightens a pixel by its own luma, not each colour by itself.
            # 0.2 is BT.2100's system gamma of 1.2 less one, for a display of 1000 nits.
            light *= (LUMA @ light) ** np.float32(0.2) * np.float32(PEAK_NITS / WHITE_NITS)
        if wide:
            light = TO_BT709 @ light
        _compress(light)
        out[:, band] = _encoded(light).reshape(3, -1, width)
    return out


@cache
def _light(transfer: Transfer) -> Floats:
    """The light of each code value: for PQ relative to SDR white, for HLG in the scene, 0 to 1."""
    code = np.arange(65536) / 65535
    if transfer == "PQ":  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = code ** (1 / m2)
        light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * 10_000 / WHITE_NITS
    else:  # ARIB STD-B67
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return light.astype(np.float32)


def _compress(light: Floats) -> None:
    """The tone curve in place, on the brightest of red, green and blue, so that hues stay."""
    peak = PEAK_NITS / WHITE_NITS
    a = -(KNEE**2) * (peak - 1) / (KNEE**2 - 2 * KNEE + peak)
    b = (KNEE**2 - 2 * KNEE * peak + peak) / (peak - 1)
    scale = (b * b + 2 * b * KNEE + KNEE**2) / (b - a)
    # At the knee the curve's factor is 1, and so it is below.  To compute it for all pixels is
    # cheaper than to pick those above.
    x = np.maximum(np.maximum(light[0], light[1]), light[2])
    np.maximum(x, np.float32(KNEE), out=x)
    factor = (x + np.float32(a)) / ((x + np.float32(b)) * x)
    light *= factor * np.float32(scale)


@cache
def _codes() -> NDArray[np.uint8]:
    """The BT.709 code value of each of 65,536 steps of light."""
    return np.asarray((np.arange(65536) / 65535) ** (1 / GAMMA) * 255 + 0.5).astype(np.uint8)


def _encoded(light: Floats) -> NDArray[np.uint8]:
    """Light relative to white (overwritten) → code values; a table is faster than powers."""
    np.clip(light, 0, 1, out=light)
    light *= np.float32(65535)
    light += np.float32(0.5)
    return np.take(_codes(), light.astype(np.uint16), mode="clip")
