"""`ralf.analyze`: a path or a URL in, a verdict out, in the caller's own process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

import ralf
from ralf.worker.errors import FetchDenied, UnreadableFile
from ralf.worker.runtime import Parts
from tests.web import Request, reply, serving


@pytest.fixture(autouse=True)
def tiny(tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The small model of the tests in place of the one that ships; logging as it was, after."""
    monkeypatch.setattr("ralf.worker.local._loaded", lambda *_: tiny_parts)
    was_configured, before = structlog.is_configured(), structlog.get_config()
    yield
    if was_configured:
        structlog.configure(**before)
    else:
        structlog.reset_defaults()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_judged(kind: type, clip_of_two: Path):
    """As text or as a Path."""
    verdict = ralf.analyze(kind(clip_of_two))

    assert 2 == len(verdict.tracks)
    assert verdict.job_id is None


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_that_is_not_there_is_a_job_error(kind: type, tmp_path: Path):
    """With the code that a job would end with, and the file's name."""
    with pytest.raises(UnreadableFile, match=r"absent\.mp4: No such file") as found:
        ralf.analyze(kind(tmp_path / "absent.mp4"))

    assert "unreadable_file" == found.value.code


def test_a_url_is_fetched_and_judged(clip_of_two: Path, monkeypatch: pytest.MonkeyPatch):
    """From a server on this machine, which the settings must allow."""

    def answer(request: Request) -> list[bytes | float]:
        return reply(200, clip_of_two.read_bytes(), ETag='"1"')

    with serving(answer) as web:
        with pytest.raises(FetchDenied):
            ralf.analyze(f"{web.url}/clip.mp4")
        monkeypatch.setenv("RALF_ALLOW_PRIVATE_ADDRESSES", "1")
        monkeypatch.setenv("RALF_FETCH_PORTS", str(web.port))
        fetched = ralf.analyze(f"{web.url}/clip.mp4")

    local = ralf.analyze(clip_of_two)
    assert (local.media, local.tracks) == (fetched.media, fetched.tracks)


def test_nothing_is_printed(clip_of_two: Path, tmp_path: Path):
    """The caller's stdout is the caller's: no log line, even while the model is loaded."""
    code = f"import ralf; print(ralf.analyze({str(clip_of_two)!r}).label)"
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RALF_")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(ralf.__file__).resolve().parent.parent,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )

    assert 1 == len(run.stdout.splitlines()), run.stdout
