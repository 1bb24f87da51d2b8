"""HDR clips: the same faces as in the SDR clip that they were made from."""

from pathlib import Path

import numpy as np
import pytest

from ralf.worker.contract import Sampling
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.routing import refusal
from ralf.worker.media.tonemap import to_sdr
from ralf.worker.media.types import Clip
from ralf.worker.settings import Settings
from tests.clips import Image, make_clip, picture

PQ, HLG = 16, 18
WHITE = 203.0


def light_of(image: Image) -> np.ndarray:
    """Nits on a display, in BT.2020 primaries, by BT.1886, BT.2087 and BT.2408."""
    to_bt2020 = np.array(
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    return np.asarray(WHITE * ((image / 255.0) ** 2.4 @ to_bt2020.T))


def as_pq(image: Image) -> np.ndarray:
    """Code values 0 to 255, by the text of SMPTE ST 2084."""
    y = (light_of(image) / 10_000) ** 0.1593017578125
    return np.asarray(255 * ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375)


def as_hlg(image: Image) -> np.ndarray:
    """Code values 0 to 255, by the text of ITU-R BT.2100 for a display of 1000 nits."""
    display = light_of(image) / 1000
    luma = display @ [0.2627, 0.6780, 0.0593]
    scene = display * np.maximum(luma, 1e-9)[..., None] ** (1 / 1.2 - 1)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.asarray(255 * np.where(scene <= 1 / 12, np.sqrt(3 * scene), high))


@pytest.mark.parametrize(("transfer", "encode"), [(PQ, as_pq), (HLG, as_hlg)])
def test_an_hdr_clip_looks_as_the_sdr_clip_it_was_made_from(
    tmp_path: Path, transfer: int, encode: object
):
    """Up to the knee of the tone curve within a few levels, and brighter light a little darker."""
    images = [picture(number) for number in range(4)]
    path = make_clip(
        tmp_path / "clip.mp4",
        [encode(image) for image in images],  # type: ignore[operator]
        codec="libx265",
        pixel_format="yuv444p10le",
        matrix="bt2020",
        transfer=transfer,
        quality=0,
    )
    found = probe(path, Settings())
    frames = next(PyavDecoder(threads=1).decode([Clip(found, Sampling(max_frames=4))]))

    shown = frames.pixels.permute(0, 2, 3, 1).numpy().astype(int)
    apart = np.abs(shown - np.stack(images))
    knee = np.stack(images).max(-1) < 215
    assert apart[knee].mean() < 2
    assert np.quantile(apart, 0.99) < 30
    name = {PQ: "PQ", HLG: "HLG"}[transfer]
    assert found.warnings == (f"colour: {name} is HDR and was converted to SDR",)
    assert "HDR" in refusal(found, "cpu") or "codec" in refusal(found, "cpu")


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
def test_grey_stays_grey_and_brighter_stays_brighter(transfer: str):
    """From black to ten thousand nits, without a jump."""
    ramp = np.tile(np.arange(0, 65536, 8, np.uint16), (3, 1, 1))

    out = to_sdr(ramp, transfer, wide=True).astype(int)  # type: ignore[arg-type]

    assert np.ptp(out, axis=0).max() <= 1
    assert np.diff(out[0, 0]).min() >= 0
    assert (0, 255) == (out[0, 0, 0], out[0, 0, -1])


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """A band is only a bound of memory."""
    codes = np.random.default_rng(0).integers(0, 65536, (3, 50, 40)).astype(np.uint16)
    whole = to_sdr(codes, "HLG", wide=True)
    monkeypatch.setattr("ralf.worker.media.tonemap.BAND_PIXELS", 130)

    assert np.array_equal(whole, to_sdr(codes, "HLG", wide=True))
