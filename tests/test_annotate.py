"""`ralf scan --annotated`: the video again, with boxes where the verdict has them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ralf.__main__ import main
from ralf.worker.cli.annotate import BLUE, GREY, RED, _Path
from ralf.worker.contract import Box, Sample, Track
from ralf.worker.errors import TooManyPixels
from ralf.worker.media.probe import probe
from ralf.worker.settings import Settings
from tests.clips import decode_all, make_clip


@pytest.fixture(autouse=True)
def _eager_model(eager_models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RALF_MODELS_DIR", str(eager_models))
    monkeypatch.setenv("RALF_MODEL", "eager")
    monkeypatch.setenv("RALF_THREADS", "1")


def coloured(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a picture [3, h, w] has nearly this colour, bool [h, w]."""
    return (np.abs(pixels.transpose(1, 2, 0).astype(int) - colour) < 40).all(-1)


def test_every_frame_is_there_with_its_boxes(clip_of_two: Path, tmp_path: Path):
    """Same size, times and number; a red box around each of the two faces in each frame."""
    video = tmp_path / "out.mp4"
    assert 0 == main(["scan", str(clip_of_two), "--max-frames", "5", "--annotated", str(video)])
    before, after = (probe(path, Settings()) for path in (clip_of_two, video))

    assert ["out.mp4"] == [path.name for path in tmp_path.iterdir()]
    assert (before.width, before.height) == (after.width, after.height)
    assert np.allclose(before.times_s, after.times_s, atol=0.002)
    for shown in decode_all(video):
        red = coloured(shown.pixels, RED)
        assert red[:, :320].sum() > 500
        assert red[:, 320:].sum() > 500


def test_odd_and_faceless_videos_are_written_too(tmp_path: Path):
    """H.264 in 4:2:0 wants even sides: the last row and column are doubled."""
    clip = make_clip(tmp_path / "odd.mp4", 10, fps=10, pixel_format="yuv444p", size=(97, 65))
    videos = tmp_path / "videos"
    assert 0 == main(["scan", str(clip), "--annotated", f"{videos}/"])

    after = probe(videos / "odd.mp4.annotated.mp4", Settings())
    assert (98, 66, 10) == (after.width, after.height, after.frame_count)


def test_a_still_is_shown_for_a_second(tmp_path: Path, astronaut: np.ndarray):
    """A video of one frame would be over at once."""
    Image.fromarray(astronaut).save(tmp_path / "face.jpg")
    video = tmp_path / "face.mp4"
    assert 0 == main(["scan", str(tmp_path / "face.jpg"), "--annotated", str(video)])

    first, last = decode_all(video)
    assert coloured(first.pixels, RED).sum() > 200
    assert coloured(last.pixels, RED).sum() > 200


def test_a_video_is_not_written_over_its_source(clip_of_none: Path):
    """Exit 2, before any work."""
    with pytest.raises(SystemExit) as caught:
        main(["scan", str(clip_of_none), "--annotated", str(clip_of_none)])

    assert 2 == caught.value.code


def test_a_verdict_stands_where_its_video_cannot_be_written(
    clip_of_two: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """One document, exit 4; a forged verdict that was asked for still decides the exit code."""

    def refuse(*_: object) -> None:
        raise TooManyPixels("the whole clip is too long to draw on")

    monkeypatch.setattr("ralf.worker.cli.annotate.annotate", refuse)
    monkeypatch.setattr("ralf.worker.cli.scan.failed_on", lambda policy, _: int(bool(policy)))
    command = ["scan", str(clip_of_two), "--json", "--max-frames", "2"]
    command += ["--annotated", str(tmp_path / "out.mp4")]

    assert 4 == main(command)
    printed = capsys.readouterr()
    assert ["ralf.verdict/1"] == [json.loads(line)["schema"] for line in printed.out.splitlines()]
    assert "no video: too_many_pixels" in printed.err
    assert 1 == main([*command, "--fail-on", "forged"])


def test_a_box_moves_between_samples_and_ends_where_the_face_does():
    """Straight between neighbours, held for one interval at the ends, absent in a gap."""
    samples = tuple(
        Sample(
            time_ms=at,
            frame=at,
            box=Box(left=left, top=0.2, right=left + 0.1, bottom=0.4),
            face_px=50,
            confidence=1,
            score=0.5,
        )
        for at, left in ((1000, 0.1), (1100, 0.2), (3000, 0.6))
    )
    track = Track(
        track_id="t1",
        start_ms=1000,
        end_ms=3000,
        faces=3,
        score=0.5,
        score_max=0.5,
        decisive=True,
        samples=samples,
    )
    path = _Path.of(track, reach_ms=100)

    def left(time_ms: float) -> float | None:
        found = path.at(time_ms)
        return None if found is None else round(float(found[0][0]), 3)

    times = (880, 950, 1000, 1050, 1180, 2000, 2950, 3090, 3200)
    assert [None, 0.1, 0.1, 0.15, 0.2, None, 0.6, 0.6, None] == [left(t) for t in times]


def test_the_colours_differ_for_those_who_see_no_red():
    """By brightness or by blue; the score stands beside the box as a number anyway."""
    for one, other in ((RED, BLUE), (RED, GREY)):
        assert max(abs(np.subtract(one, other)[1:])) > 40
