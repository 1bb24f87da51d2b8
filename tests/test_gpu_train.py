"""What travels to a GPU machine without a registry, and what comes back: bench/gpu_train.sh."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.faces_on_disk import faces

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu_train.sh"


def typed(*words: str | Path, **settings: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHON": sys.executable, "REHEARSE": "1", **settings}
    return subprocess.run(
        [str(SCRIPT), *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_faces_travel_in_parts_and_arrive_whole(tmp_path: Path):
    """Cut at a size, joined there in their order, however many; a folder without a table does not
    go."""
    root = tmp_path / "portraits"
    faces(root)
    (root / "private").mkdir()
    assert 1 == typed("pack", tmp_path, GPU_PARTS=str(tmp_path / "none")).returncode
    parts, there = tmp_path / "parts", tmp_path / "there"
    said = typed("pack", root, GPU_PARTS=str(parts), PART_BYTES="30000")
    assert 0 == said.returncode, said.stderr
    assert len(list(parts.iterdir())) > 10 and "too large" not in said.stdout
    for part in parts.iterdir():
        assert 0 == typed("stash", there, part).returncode
    together = tmp_path / "all.tar"
    together.write_bytes(b"".join(p.read_bytes() for p in sorted((there / "parts").iterdir())))
    with tarfile.open(together) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    arrived = tmp_path / "unpacked" / "data" / "0"
    sent = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert sent == sorted(p.relative_to(arrived) for p in arrived.rglob("*") if p.is_file())
    assert all((root / path).read_bytes() == (arrived / path).read_bytes() for path in sent)
    assert not (arrived / "private").exists()


def test_a_chain_that_is_not_done_brings_no_version(tmp_path: Path):
    """The message says where its log is."""
    said = typed("bring", tmp_path, tmp_path / "models")

    assert 1 == said.returncode and "has no version.tgz: the chain was not done" in said.stderr
    assert not (tmp_path / "models").exists()
