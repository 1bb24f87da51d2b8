"""`ralf scan --live`: a stream judged in this process, whatever the source and the scorer do."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from ralf.__main__ import main
from ralf.worker.cli import scan_live
from ralf.worker.errors import CorruptMedia
from tests.clips import face_clip
from tests.test_live import a_clip, sending
from tests.waiting import until


@pytest.fixture(autouse=True)
def work(eager_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for segments; a model that calls nearly all faces forged."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setenv("RALF_MODELS_DIR", str(eager_models))
    monkeypatch.setenv("RALF_MODEL", "eager")
    monkeypatch.setenv("RALF_THREADS", "1")
    monkeypatch.setenv("RALF_WORK_DIR", str(folder))
    return folder


def scan(source: object, *options: str) -> int:
    return main(["scan", "--live", str(source), "--segment", "1", *options])


def verdicts(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def reading() -> bool:
    """Whether the source is still read."""
    return any(thread.name == "live" for thread in threading.enumerate())


def test_faces_are_followed_across_segments_and_a_forged_stream_fails(
    tmp_path, work, astronaut, capsys
):
    """One rolling verdict a segment; --fail-on is about the last one."""
    clip = tmp_path / "c.ts"
    face_clip(clip, [astronaut], 3.0, size=(640, 360), fps=10, face_height=0.6, gop=10)

    assert scan(clip, "--json", "--fail-on", "forged") == 1
    shown = verdicts(capsys.readouterr().out)
    assert [one["segments"] for one in shown] == [1, 2, 3]
    assert [one["complete"] for one in shown] == [False, False, True]
    assert shown[-1]["label"] == "likely_forged"
    assert max(len(track["segments"]) for track in shown[-1]["tracks"]) == 3
    assert not list(work.iterdir())


def test_a_source_that_breaks_off_is_opened_again_until_ctrl_c(tmp_path, work, monkeypatch, capsys):
    """Numbers and clock go on; the open segment is judged too, and is the last one."""
    body, hold = a_clip(tmp_path / "c.ts", 50).read_bytes(), threading.Event()
    show = scan_live.show

    def show_and_stop(verdict, **how):
        show(verdict, **how)
        if verdict.segments == 3:
            os.kill(os.getpid(), signal.SIGINT)
            hold.set()

    monkeypatch.setattr(scan_live, "show", show_and_stop)
    with sending(body, body, hold=hold) as url:
        code = scan(url, "--json")
    out, said = capsys.readouterr()

    assert code == 0
    assert [one["segments"] for one in verdicts(out)] == [1, 2, 3, 4]
    assert verdicts(out)[-1]["complete"]
    assert "opened again in 1 s" in said
    assert not list(work.iterdir())


def test_segments_are_dropped_when_judging_is_too_slow(tmp_path, work, monkeypatch, capsys):
    """It is said, the verdict lists them as missing, and the disk holds few files meanwhile."""
    analyze, most = scan_live.analyze, []

    def slowly(path, parts, **how):
        until(lambda: not reading())
        most.append(len(list(Path(path).parent.iterdir())))
        return analyze(path, parts, **how)

    monkeypatch.setattr(scan_live, "analyze", slowly)
    clip = a_clip(tmp_path / "c.ts", 150)
    assert scan(clip, "--json", "--lag", "drop", "--keep", "1") == 0
    out, said = capsys.readouterr()
    last = verdicts(out)[-1]
    missing = sum(gap["last"] - gap["first"] + 1 for gap in last["missing"])

    assert missing + last["segments"] == 6 and missing >= 4
    assert not last["complete"]
    assert f"{missing} segments were dropped" in said
    assert max(most) <= 2
    assert not list(work.iterdir())


def test_a_second_ctrl_c_waits_for_no_segment(tmp_path, work, monkeypatch, capsys):
    """Not even for the one that is being judged."""

    def pressed_twice(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the walk went on")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(scan_live, "analyze", pressed_twice)
    assert scan(a_clip(tmp_path / "c.ts")) == 130
    until(lambda: not reading())
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_segment_without_a_verdict_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """It is listed with its code; where no segment has a verdict the exit code says so."""
    analyze, clip = scan_live.analyze, a_clip(tmp_path / "c.ts")

    def broken(path, parts, **how):
        if bad in Path(path).name:
            raise CorruptMedia(f"cannot read {path}")
        return analyze(path, parts, **how)

    monkeypatch.setattr(scan_live, "analyze", broken)
    bad = "00000001"
    assert scan(clip, "--json") == 0
    out, said = capsys.readouterr()
    bad = "live"
    assert scan(clip) == 4

    assert verdicts(out)[-1]["failed"] == [{"number": 1, "code": "corrupt_media"}]
    assert verdicts(out)[-1]["complete"]
    assert "segment 1 has no verdict: corrupt_media: cannot read its file" in said
    assert "no segment was judged" in capsys.readouterr().err


def test_a_camera_that_cannot_be_read_is_refused_at_once(monkeypatch, capsys):
    """Which cameras there are, or that PyAV cannot read any."""
    assert scan("/dev/video987") == 4
    assert "there is no camera /dev/video987; cameras here: " in capsys.readouterr().err

    monkeypatch.setattr("ralf.worker.media.live.av.formats_available", {"mp4"})
    assert scan("/dev/video987") == 4
    assert "this build of PyAV has no v4l2" in capsys.readouterr().err


def test_a_source_that_cannot_be_read_is_bad_media(tmp_path, capsys):
    """A file that is not there, or an address that FFmpeg is not asked for."""
    assert scan(tmp_path / "none.mp4") == 4
    assert "none.mp4" in capsys.readouterr().err
    assert scan("ftp://host/a.mp4") == 4
    assert "should begin with" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["other.mp4"], ["--report", "page.html"]])
def test_options_about_whole_files_are_refused(more, capsys):
    """Nothing is read."""
    with pytest.raises(SystemExit) as caught:
        scan("tcp://127.0.0.1:1", *more)
    assert caught.value.code == 2
