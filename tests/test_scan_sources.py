"""What `ralf scan` takes besides files: folders, URLs and standard input; and --output-dir."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ralf.__main__ import main
from ralf.worker.cli.sources import sources
from ralf.worker.contract import Verdict
from tests.web import Request, reply, serving


@pytest.fixture(autouse=True)
def _tiny_model(tiny_models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RALF_MODELS_DIR", str(tiny_models))
    monkeypatch.setenv("RALF_MODEL", "tiny")
    monkeypatch.setenv("RALF_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path, clip_of_none: Path) -> Path:
    """Two clips of one name in two folders, among files that are none of ours."""
    root = tmp_path / "uploads"
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".trash").mkdir()
    for name in ("one.MP4", "b/deep/one.MP4", ".trash/old.mp4", ".hidden.mp4"):
        shutil.copy(clip_of_none, root / name)
    (root / "notes.txt").write_text("no video")
    (root / "loop").symlink_to(root)
    return root


def test_a_folder_is_its_videos_and_images_sorted(folder: Path, capsys: pytest.CaptureFixture[str]):
    """At any depth; hidden files, other files and linked folders are left out."""
    assert 0 == main(["scan", str(folder), "--json"])
    tags = [json.loads(line)["tag"] for line in capsys.readouterr().out.splitlines()]

    assert ["b/deep/one.MP4", "one.MP4"] == tags


def test_a_folder_without_a_video_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Not exit 0 with nothing on stdout."""
    assert 4 == main(["scan", str(tmp_path), "--json"])
    assert "unreadable_file" == json.loads(capsys.readouterr().out)["code"]


def test_every_verdict_and_page_lies_in_the_output_folder(
    folder: Path, clip_of_none: Path, tmp_path: Path
):
    """Those of one name are numbered; a file that cannot be judged leaves nothing."""
    bad, out = tmp_path / "bad.mp4", tmp_path / "made" / "out"
    bad.write_text("no video")

    assert 4 == main(["scan", str(folder), str(bad), "--output-dir", str(out)])
    names = ["one.MP4.2.html", "one.MP4.2.json", "one.MP4.html", "one.MP4.json"]
    assert names == sorted(path.name for path in out.iterdir())
    verdict = Verdict.model_validate_json((out / "one.MP4.2.json").read_text())
    assert ("one.MP4", "no_faces") == (verdict.tag, verdict.label)


def test_a_url_is_fetched_through_the_guard(
    clip_of_none: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A private address is refused unless allowed; the signature in the query is never shown."""

    def answer(request: Request) -> list[bytes | float]:
        return reply(200, clip_of_none.read_bytes() if "none" in request.path else b"no video")

    with serving(answer) as web:
        url = f"{web.url}/in/none.mp4?signature=s3cret"
        assert 4 == main(["scan", url, "--json"])
        denied = capsys.readouterr()
        monkeypatch.setenv("RALF_ALLOW_PRIVATE_ADDRESSES", "1")
        monkeypatch.setenv("RALF_FETCH_PORTS", str(web.port))
        assert 4 == main(["scan", url, f"{web.url}/bad.mp4", "--json"])
        judged, bad = map(json.loads, (seen := capsys.readouterr()).out.splitlines())

    assert "fetch_denied" == json.loads(denied.out)["code"]
    assert f"{web.url}/in/none.mp4" == judged["tag"]
    assert "container_unsupported" == bad["code"]
    assert "s3cret" not in "".join((*denied, *seen))
    assert "/tmp" not in bad["message"]


def test_standard_input_is_judged_and_capped(
    clip_of_none: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Its hash is the file's; more bytes than RALF_MAX_BYTES are refused, and nothing stays."""

    def piped(data: bytes) -> None:
        stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
        monkeypatch.setattr("sys.stdin", stdin)

    data = clip_of_none.read_bytes()
    piped(data)
    assert 0 == main(["scan", "-", "--json"])
    verdict = Verdict.model_validate_json(capsys.readouterr().out)
    assert ("stdin", len(data)) == (verdict.tag, verdict.media.size_bytes)

    piped(b"")
    assert 4 == main(["scan", "-"])
    assert "corrupt_media: standard input is empty" in capsys.readouterr().err

    monkeypatch.setenv("RALF_MAX_BYTES", str(len(data) - 1))
    piped(data)
    assert 4 == main(["scan", "-"])
    assert "too_large" in capsys.readouterr().err


def test_standard_input_twice_is_a_usage_error():
    """There is one."""
    with pytest.raises(SystemExit) as caught:
        main(["scan", "-", "-"])

    assert 2 == caught.value.code


@pytest.mark.parametrize(
    ("url", "shown", "name"),
    [
        (
            "https://me:pass@cdn.example/a/b%20c.mp4?sig=1#x",
            "https://cdn.example/a/b%20c.mp4",
            "b_c.mp4",
        ),
        ("S3://bucket/..%2F..%2Fetc", "s3://bucket/..%2F..%2Fetc", "etc"),
        ("https://cdn.example/", "https://cdn.example/", "cdn.example"),
        ("https://cdn.example/..", "https://cdn.example/..", "url"),
    ],
)
def test_a_url_is_shown_without_its_secrets_and_names_safe_files(url: str, shown: str, name: str):
    """Neither user nor query; no name leads out of the folder."""
    (source,) = sources([url])

    assert (shown, shown, name) == (source.shown, source.tag, source.file_name)
    assert "pass" not in repr(source)
