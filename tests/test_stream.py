"""`ralf stream` against a real Redis: segments of one session, in order, through any end."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ralf.__main__ import main
from ralf.worker.chaos import bodies
from ralf.worker.client import connect
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import a_verdict
from tests.test_live import a_clip, sending
from tests.waiting import until
from tests.workers import ROOT, a_worker, as_environment, ended


def start(source: str, settings: Settings, folder: Path, *options: str) -> "subprocess.Popen[str]":
    """The command as a process of its own."""
    words = ["stream", source, "--session", "s", "--dir", str(folder), "--segment", "1", "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "ralf", *words, *options],
        env=as_environment(settings, os.environ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_next(store: Store) -> int:
    """What a worker does with the next job; gives the segment's number."""
    until(lambda: store.redis.llen("rq:queue:ralf-default"))
    claim = store.begin(store.pop("default").decode(), "w")
    store.end(claim, a_verdict(job_id=claim.job_id))
    return claim.job.session.number


def test_a_stream_becomes_one_session_with_a_rolling_verdict(tmp_path, settings, capsys):
    """Through a real worker; the files are gone at the end."""
    clip, folder, submit = a_clip(tmp_path / "c.ts", 75), tmp_path / "segments", Store.submit
    with pytest.MonkeyPatch.context() as patch:
        name = bodies.PREFIX + "trivial"
        patch.setattr(Store, "submit", lambda self, jobs: submit(self, jobs, function=name))
        worker = a_worker(settings)
        try:
            words = ["--session", "live-1", "--dir", str(folder), "--segment", "1", "--json"]
            code = main(["stream", str(clip), *words])
        finally:
            worker.terminate()
            ended(worker)
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert code == 0
    assert (verdicts[-1]["segments"], verdicts[-1]["complete"]) == (3, True)
    assert [one["revision"] for one in verdicts] == sorted({one["revision"] for one in verdicts})
    assert [path.name for path in folder.iterdir()] == ["live-1.json"]


def test_a_killed_stream_goes_on_with_its_numbers(tmp_path, settings, store):
    """Whatever the kill left on the disk is sent; no number is used twice."""
    body, hold, folder = (
        a_clip(tmp_path / "c.ts", 100).read_bytes(),
        threading.Event(),
        tmp_path / "f",
    )
    with sending(body, body, hold=hold) as url:
        process = start(url, settings, folder, "--in-flight", "2", "--keep", "9")
        seen = [end_next(store)]
        until(lambda: len(list(folder.glob("s-*.mp4"))) >= 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start(url, settings, folder, "--in-flight", "2", "--keep", "9")
        seen += [end_next(store) for _ in range(5)]
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            if store.redis.llen("rq:queue:ralf-default"):
                seen.append(end_next(store))
            hold.set()
        out, said = process.communicate()
    with_client = connect(settings.redis_url)
    verdict = with_client.session("s")
    with_client.close()

    assert process.returncode == 0, said
    assert seen == sorted(set(seen))
    assert verdict.complete and not verdict.repeated
    assert json.loads(out.splitlines()[-1])["complete"]


def test_a_folder_that_does_not_know_the_session_is_refused(tmp_path, settings, store, capsys):
    """Its numbers would be used twice."""
    clip = a_clip(tmp_path / "c.ts", 25)
    process = start(str(clip), settings, tmp_path / "one")
    end_next(store)
    process.communicate(timeout=60)
    code = main(["stream", str(clip), "--session", "s", "--dir", str(tmp_path / "two")])

    assert code == 5
    assert "name its folder with --dir" in capsys.readouterr().err
