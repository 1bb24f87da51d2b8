"""A worker's folder goes with it, even after kill -9."""

import subprocess
import sys
from pathlib import Path

import pytest

from ralf.worker.errors import Infrastructure
from ralf.worker.service.work_dir import WorkDir, why_unusable

ROOT = Path(__file__).resolve().parent.parent


def test_a_closed_folder_is_gone(tmp_path: Path):
    """With what lay in it; it was for its owner only."""
    folder = WorkDir(tmp_path)
    (folder.path / "upload").write_bytes(b"x")
    mode = folder.path.stat().st_mode & 0o777
    folder.close()

    assert (mode, list(tmp_path.iterdir())) == (0o700, [])


def test_a_killed_owners_folder_goes_with_the_next_and_a_living_ones_stays(tmp_path: Path):
    """The lock tells them apart; a folder that is not ours is not touched."""
    code = (
        "import sys, time; from ralf.worker.service.work_dir import WorkDir\n"
        "own = WorkDir(sys.argv[1]); (own.path / 'upload').write_bytes(b'x')\n"
        "print(own.path, flush=True); time.sleep(600)"
    )
    (tmp_path / "ralf-of-somebody").mkdir()
    living = WorkDir(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        killed = Path(owner.stdout.readline().strip())
        during = WorkDir(tmp_path)
        assert (killed / "upload").exists()
        owner.kill()
    after = WorkDir(tmp_path)

    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"ralf-of-somebody", living.path.name, during.path.name, after.path.name}
    for folder in (living, during, after):
        folder.close()


def test_a_place_that_cannot_hold_a_socket_is_refused_by_name(tmp_path: Path):
    """Python's own word for it names neither the setting nor the limit."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()

    with pytest.raises(Infrastructure, match="RALF_WORK_DIR should be at most"):
        WorkDir(deep)
    with pytest.raises(Infrastructure, match="there is none at"):
        WorkDir(tmp_path / "gone")
    assert [deep] == list(tmp_path.iterdir())


def test_a_folder_that_takes_no_file_says_why(tmp_path: Path):
    """And one that does leaves nothing behind."""
    assert (why_unusable(tmp_path), list(tmp_path.iterdir())) == ("", [])
    assert "No such file" in why_unusable(tmp_path / "gone")
