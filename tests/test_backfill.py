"""`ralf backfill` against a real Redis and a worker: every row ends once, behind uploads."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ralf.__main__ import main
from ralf.worker.chaos import bodies
from ralf.worker.cli.ledger import End, Ledger, LedgerError
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.documents import a_failure, a_verdict
from tests.waiting import until
from tests.workers import ROOT, a_worker, as_environment, ended

HEAD = ["id", "uri", "tag", "old_label", "old_model"]


def a_manifest(path: Path, rows: int, **columns: str) -> Path:
    """So many rows, v0 to vN."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, HEAD)
        table.writeheader()
        for number in range(rows):
            uri = f"https://media.example/{number}.mp4"
            table.writerow({"id": f"v{number}", "uri": uri, **columns})
    return path


def start(manifest: Path, settings: Settings, *options: str) -> "subprocess.Popen[str]":
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ralf", "backfill", str(manifest), *options],
        env={**as_environment(settings, os.environ)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def waiting(store: Store) -> list[str]:
    """The ids of the backfill's queued jobs."""
    return [job.decode() for job in store.redis.zrange("ralf:waiting:backfill", 0, -1)]


def end_next(store: Store, outcome=None) -> str:
    """What a worker does with the next job; gives its id."""
    job_id = store.pop("backfill").decode()
    claim = store.begin(job_id, "w")
    store.end(claim, outcome or a_verdict(job_id=job_id))
    return job_id


def report_of(process: "subprocess.Popen[str]") -> dict:
    out, said = process.communicate(timeout=60)
    assert out, said
    return json.loads(out)


def test_an_archive_is_judged_again_by_a_real_worker(tmp_path, settings, store, capsys):
    """The report counts labels that changed, by model; the results hold every row."""
    # The worker's body for tests; the command's own submits the function of production.
    manifest = a_manifest(
        tmp_path / "m.csv", 12, old_label="likely_forged", old_model="ralf-small@aaaaaaaa"
    )
    submit = Store.submit
    with pytest.MonkeyPatch.context() as patch:
        name = bodies.PREFIX + "trivial"
        patch.setattr(
            Store, "submit", lambda self, jobs, **given: submit(self, jobs, function=name)
        )
        worker = a_worker(settings)
        try:
            written = ["--results", str(tmp_path / "r.csv"), "--report", str(tmp_path / "r.json")]
            code = main(["backfill", str(manifest), "--in-flight", "5", *written])
        finally:
            worker.terminate()
            ended(worker)
    report = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))

    assert code == 0
    assert (report["judged"], report["failed"], report["compared"]) == (12, {}, 12)
    assert report["changes"] == [
        {
            "old_model": "ralf-small@aaaaaaaa",
            "model": "none@none",
            "old_label": "likely_forged",
            "label": "no_faces",
            "rows": 12,
        }
    ]
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert {(row["id"], row["label"], row["changed"]) for row in rows} == {
        (f"v{n}", "no_faces", "yes") for n in range(12)
    }
    assert store.counts().waiting["backfill"] == store.counts().running["backfill"] == 0


def test_a_kill_at_any_moment_neither_loses_nor_doubles_a_rows_end(tmp_path, settings, store):
    """It is killed again and again while jobs end; each row has one job and one end."""
    manifest, jobs = a_manifest(tmp_path / "m.csv", 9), []
    for _ in range(3):
        process = start(manifest, settings, "--in-flight", "4")
        until(lambda: len(waiting(store)) >= 3)
        jobs += [end_next(store), end_next(store)]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        jobs.append(end_next(store))  # it ends while nobody looks
    process = start(manifest, settings, "--in-flight", "4")
    report = report_of(process)

    assert process.returncode == 0
    assert report["judged"] == 9
    assert len(set(jobs)) == 9
    assert len(store.redis.keys("ralf:token:default:backfill:*")) == 9  # no row had a second job
    with closing(sqlite3.connect(tmp_path / "m.csv.ledger")) as db:
        ends = db.execute("SELECT id, job_id FROM ends").fetchall()
    assert {row for row, _ in ends} == {f"v{n}" for n in range(9)}
    assert {job for _, job in ends} == set(jobs)


def test_no_more_jobs_than_asked_for_are_queued_and_what_ended_is_let_go(tmp_path, settings, store):
    """Redis holds a window of the archive, however long it is."""
    process, most = start(a_manifest(tmp_path / "m.csv", 30), settings, "--in-flight", "3"), 0
    for _ in range(30):
        until(lambda: waiting(store) or process.poll() is not None)
        most = max(most, len(waiting(store)))
        last = end_next(store)
    report = report_of(process)

    assert (process.returncode, report["judged"], most) == (0, 30, 3)
    assert 0 < store.redis.ttl(f"ralf:verdict:{last}") <= 600


def test_failed_rows_are_kept_and_retried_when_asked(tmp_path, settings, store, capsys):
    """Once for each time that it is asked; those that were judged stay as they are."""
    manifest = a_manifest(tmp_path / "m.csv", 2)
    process = start(manifest, settings)
    until(lambda: len(waiting(store)) == 2)
    end_next(store)
    end_next(store, a_failure(code="fetch_denied"))
    first = report_of(process)
    assert (process.returncode, first["failed"], first["judged"]) == (4, {"fetch_denied": 1}, 1)

    assert main(["backfill", str(manifest)]) == 4  # nothing is sent without the flag
    assert waiting(store) == []
    process = start(manifest, settings, "--retry-failed", "fetch_denied,job_timeout")
    until(lambda: len(waiting(store)) == 1)
    end_next(store)
    second = report_of(process)
    assert (process.returncode, second["failed"], second["judged"]) == (0, {}, 2)


def test_it_stops_at_once_when_asked_and_goes_on_later(tmp_path, settings, store):
    """What is queued stays queued, and is found again by its token."""
    manifest = a_manifest(tmp_path / "m.csv", 4)
    process = start(manifest, settings)
    until(lambda: len(waiting(store)) == 4)
    process.send_signal(signal.SIGINT)
    report = report_of(process)
    assert (process.returncode, report["complete"], report["judged"]) == (130, False, 0)

    for _ in range(4):
        end_next(store)
    process = start(manifest, settings)
    assert (report_of(process)["judged"], process.returncode) == (4, 0)


def test_a_row_that_no_job_can_be_made_of_ends_as_a_failure_and_repeats_count_once(
    tmp_path, settings, store, capsys
):
    """The others are judged."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,uri,tenant\na,,\nb,https://media.example/b,no spaces\n")
    code = main(["backfill", str(manifest)])
    report = json.loads(capsys.readouterr().out)

    assert (code, report["failed"]) == (4, {"invalid_request": 2})
    manifest.write_text("uri\nhttps://media.example/c\nhttps://media.example/c\n")
    process = start(manifest, settings, "--ledger", str(tmp_path / "other"))
    until(lambda: waiting(store))
    assert len(waiting(store)) == 1
    end_next(store)
    assert report_of(process)["judged"] == 1


def test_a_results_file_is_what_the_next_backfill_compares_with(tmp_path, settings, store):
    """--old; a second promotion is compared with the first."""
    manifest, results = a_manifest(tmp_path / "m.csv", 1), tmp_path / "r.csv"
    process = start(manifest, settings, "--results", str(results))
    until(lambda: waiting(store))
    end_next(store)
    report_of(process)
    process = start(manifest, settings, "--ledger", str(tmp_path / "2"), "--old", str(results))
    until(lambda: waiting(store))
    changed = a_verdict(label="inconclusive")
    end_next(store, changed)
    report = report_of(process)

    assert report["compared"] == report["changed"] == 1
    assert report["changes"][0]["old_label"] == a_verdict().label


@pytest.mark.parametrize(
    ("text", "said"),
    [("url\nx\n", "names the column uri, got url"), ("", "an empty file")],
)
def test_a_manifest_that_is_none_is_refused_before_anything_is_sent(
    tmp_path, settings, capsys, text, said
):
    """With what was expected and what came."""
    (tmp_path / "m.csv").write_text(text)
    assert main(["backfill", str(tmp_path / "m.csv")]) == 5
    assert said in capsys.readouterr().err


def test_a_ledger_serves_one_process_and_one_set_of_options(tmp_path):
    """Two at once, or another model in the middle, are errors that say what to do."""
    with closing(Ledger(tmp_path / "l", {"model": None})):
        with pytest.raises(LedgerError, match="is another backfill using it"):
            Ledger(tmp_path / "l", {"model": None})
    with pytest.raises(LedgerError, match="use the same options, or another ledger"):
        Ledger(tmp_path / "l", {"model": "other"})


def test_an_end_is_written_once(tmp_path):
    """A second one of the same row changes nothing, unless a retry was asked for."""
    end = End(id="a", uri="u", state="failed", attempt=1, code="job_timeout")
    with closing(Ledger(tmp_path / "l", {})) as ledger:
        assert (ledger.write([end]), ledger.write([end])) == ([end], [])
        assert ledger.ask_again(["fetch_failed"]) == 0
        assert (ledger.ask_again(), ledger.attempts(["a"])) == (1, {"a": ("again", 2)})
        assert ledger.write([end]) == []  # of the first attempt
        judged = replace(end, state="judged", attempt=2, code=None, label="no_faces")
        assert ledger.write([judged]) == [judged]
        assert ledger.counts() == {"judged": 1, "failed": 0, "again": 0, "changed": 0}
