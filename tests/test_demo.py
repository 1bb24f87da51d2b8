"""`make demo` with one clip and a tiny model: all its parts, as a person runs it."""

from pathlib import Path

import pytest

import demo.demo as shown
from demo.samples import Truth


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo leaves its pages."""
    monkeypatch.setattr(shown, "OUT", tmp_path)
    return tmp_path


def test_a_clip_goes_through_the_queue_to_its_page(
    out: Path,
    tiny_models: Path,
    clip_of_none: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Redis, worker, deliverer, receiver: a verdict, the same one pushed, and its page."""

    def one_clip(folder: Path) -> list[Truth]:
        folder.mkdir()
        (folder / "none.mp4").write_bytes(clip_of_none.read_bytes())
        return [Truth("none.mp4", "no_faces", 0, ())]

    monkeypatch.setattr(shown, "make_samples", one_clip)
    for name, value in {"MODELS_DIR": str(tiny_models), "MODEL": "tiny", "THREADS": "1"}.items():
        monkeypatch.setenv(f"RALF_{name}", value)

    assert shown.main() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "none.mp4" in line]
    assert rows[0][:4] == ["none.mp4", "no_faces", "–", "yes"]
    assert "<html" in (out / "none.mp4.html").read_text()


def test_without_its_model_it_says_what_is_missing(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Before anything is made or started."""
    monkeypatch.setenv("RALF_MODELS_DIR", str(tmp_path / "none"))

    assert shown.main() == 2
    assert "no model 'ralf-small'" in capsys.readouterr().err
    assert not list(out.iterdir())
