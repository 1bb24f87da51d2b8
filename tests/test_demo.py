"""`make demo` with one clip and a tiny model: all its parts, as a person runs it."""

from functools import partial
from pathlib import Path

import pytest

import demo.demo as shown
from kernels.artifact import resolve
from kernels.untrained import publish_untrained
from train.samples import Truth
from worker.settings import Settings


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


def test_without_its_model_it_shows_one_that_knows_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And says so; a model that is there is used."""
    small = partial(publish_untrained, name="tiny", base=4, blocks=1, size=64, golden_crops=4)
    monkeypatch.setattr(shown, "publish_untrained", small)
    made = shown.with_model(Settings(models_dir=str(tmp_path / "none")))

    assert resolve(Path(made.models_dir), made.model).manifest.untrained
    assert shown.with_model(made) == made
