"""`ralf bench scan` and `find`: every way runs on the same frames, and the record tells it."""

import json
from pathlib import Path

import pytest

from ralf.__main__ import main
from tests.clips import make_clip, picture

THREADS = "1"


@pytest.fixture(autouse=True)
def _tiny_model(tiny_models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RALF_MODELS_DIR", str(tiny_models))
    monkeypatch.setenv("RALF_MODEL", "tiny")
    monkeypatch.setenv("RALF_THREADS", THREADS)


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """The record that the command prints."""
    assert 0 == main(["bench", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def test_the_walk_and_the_plain_way_are_timed_in_one_run(
    clip_of_two: Path, capsys: pytest.CaptureFixture[str]
):
    """Two faces in each of three frames, by both; the ratio is that of the two medians."""
    record = measured(capsys, "scan", clip_of_two, "--frames", 3, "--repeats", 1)
    plain, ours = (record["timings"][way]["median_s"] for way in ("plain", "ralf"))

    assert 6 == record["facts"]["faces"] == record["facts"]["plain_faces"]
    assert record["ratios"]["plain / ralf"] == pytest.approx(plain / ours, abs=0.01)
    assert record["conditions"]["precision"] in ("fp32", "bf16")
    assert {"cores", "processor", "torch", "commit"} <= record["machine"].keys()


def test_the_finders_are_timed_in_one_run(clip_of_two: Path, capsys: pytest.CaptureFixture[str]):
    """Ours, facenet-pytorch's at the same setting, and at its defaults."""
    record = measured(capsys, "find", clip_of_two, "--frames", 2, "--repeats", 1)

    assert {"ralf", "stock, same setting", "stock, defaults"} == record["timings"].keys()
    assert {"stock, same setting / ralf", "stock, defaults / ralf"} == record["ratios"].keys()
    assert 4 == record["facts"]["faces"] == record["facts"]["stock_faces"]
    assert 1.0 == record["facts"]["agreement"]


def test_a_clip_that_the_plain_way_cannot_read_whole_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Else it would look at fewer frames, and the ratio would lie."""
    long = make_clip(tmp_path / "long.mp4", [picture(0, 64, 48)] * 301)

    with pytest.raises(SystemExit) as caught:
        main(["bench", "scan", str(long)])

    assert 2 == caught.value.code
    assert "at most 300" in capsys.readouterr().err


@pytest.mark.dali
def test_the_decoders_are_timed_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A clip that DALI takes here and one that it does not; how far apart their pixels lie."""
    vp9 = make_clip(tmp_path / "a.webm", 24, codec="libvpx-vp9", gop=12, matrix="bt709")
    h264 = make_clip(tmp_path / "b.mp4", 24)
    record = measured(
        capsys,
        "decode",
        vp9,
        h264,
        "--frames",
        4,
        "--repeats",
        1,
        "--at-once",
        2,
        "--device",
        "cpu",
    )

    ways = {"a.webm: pyav", "b.mp4: pyav", "a.webm: dali", "a.webm: dali, 2 at once"}
    assert ways == record["timings"].keys()
    assert ["a.webm: pyav / dali, 2 at once"] == list(record["ratios"])
    facts = record["facts"]
    assert "the codec h264" == facts["b.mp4"]["dali_refuses"]
    assert (4, 20) == (facts["a.webm"]["wanted"], facts["a.webm"]["read"])
    assert 0 < facts["a.webm"]["levels_apart_mean"] < 0.5
    median = record["timings"]["a.webm: dali, 2 at once"]["median_s"]
    assert 2 * 20 / median == pytest.approx(facts["a.webm"]["dali, 2 at once_frames_s"], abs=0.1)
