"""`ralf fuzz`: the same mutants again, every outcome named or kept, a stopped run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from ralf.worker.chaos import fuzz, mutants
from ralf.worker.chaos.fuzz import Ledger, Outcome
from ralf.worker.cli.main import main
from ralf.worker.errors import RalfError
from ralf.worker.service import messages

pytestmark = pytest.mark.usefixtures("one_thread")


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """The ledger's lines after its first."""
    return [json.loads(line) for line in (folder / fuzz.LEDGER).read_text().splitlines()[1:]]


@pytest.mark.timeout(240)
def test_damaged_media_of_every_container_end_with_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In the real child with the real model; the run goes on where it was stopped."""
    folder = tmp_path / "fuzz"
    argv = ["fuzz", "--seed", "7", "--children", "1", "--folder", str(folder)]

    assert main([*argv, "--mutants", "30"]) == 0
    # As after a kill in the middle of a line.
    ledger = folder / fuzz.LEDGER
    ledger.write_text(ledger.read_text()[:-20])
    assert main([*argv, "--mutants", "60"]) == 0

    assert sorted(one["number"] for one in outcomes(folder)) == list(range(60))
    assert {one["original"] for one in outcomes(folder)} == set(mutants.originals())
    assert {"verdict", "corrupt_media"} <= {one["outcome"] for one in outcomes(folder)}
    table = capsys.readouterr().out
    assert "60 mutants, 31 of them now" in table
    assert "0 outcomes without a name" in table


def test_a_number_and_a_seed_give_the_same_mutant():
    """Every original is damaged in turn; nothing depends on what was made before."""
    files = mutants.originals()
    first = [mutants.mutant(files, 3, number) for number in range(200)]

    assert files == mutants.originals()
    assert first[150] == mutants.mutant(files, 3, 150) != mutants.mutant(files, 4, 150)
    assert {one.original for one in first} == set(files)
    assert sum(one.data != files[one.original] for one in first) > 190


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mpeg4.avi", "still.png", "long.ts"])
def test_the_parts_of_a_container_are_found(name: str):
    """Else half of the damage would be blind too."""
    data = mutants.originals()[name]
    found = mutants.parts(data)

    assert len(found) >= 3
    assert all(0 <= part.start < part.body <= part.end <= len(data) for part in found)


class Child:
    """A child process that answers each job in one way."""

    alive, ready, pid, load_error = True, True, 0, ""

    def __init__(self, answer: Any) -> None:
        self.answer, self.killed = answer, False

    def send(self, job: messages.Run) -> None:
        self.job = job

    def wait(self, _: float) -> Any:
        return self.answer(self.job)

    def kill(self) -> None:
        self.killed = True

    def detach(self) -> str:
        return "died of SIGSEGV"

    def last_output(self) -> str:
        return "Fatal Python error"


def failed(code: str, message: str = "IndexError: x") -> Any:
    """A child that fails its jobs."""
    return lambda job: [messages.Failed(job_id=job.job_id, code=code, message=message)]


@pytest.mark.parametrize(
    ("answer", "outcome", "named"),
    [
        (failed("corrupt_media"), "corrupt_media", True),
        (failed("decoder_crashed"), "decoder_crashed: IndexError", False),
        (failed("no_such_code"), "no_such_code: IndexError", False),
        (lambda job: None, "child died of SIGSEGV", False),
        (lambda job: [], "no answer within 0 s", False),
        (
            lambda job: [messages.Done(job_id=job.job_id, verdict="{}", evidence="{}")],
            "not a valid verdict",
            False,
        ),
    ],
)
def test_an_end_without_a_name_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Any, outcome: str, named: bool
):
    """A crash, a silence, an unknown code, a document that is no verdict."""
    judge = fuzz.Judge({})
    judge.close()
    monkeypatch.setattr(judge, "_child", Child(answer))
    made = mutants.Mutant(5, "a.mp4", "bits", b"x")
    found = Outcome(5, "a.mp4", "bits", judge._ask(fuzz._run_of(tmp_path / "a", made), 0)[0], 1)

    assert (found.outcome, found.named) == (outcome, named)


def test_a_mutant_that_takes_too_much_memory_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Its child is killed, whatever it answered."""
    judge = fuzz.Judge({})
    judge.close()
    child = Child(failed("corrupt_media"))
    monkeypatch.setattr(judge, "_child", child)
    peaks = iter([10**9, 10**9 + fuzz.MEMORY_BYTES, 10**9 + fuzz.MEMORY_BYTES + 1])
    monkeypatch.setattr(fuzz, "_peak_rss", lambda pid: next(peaks))
    job = fuzz._run_of(Path("/a"), mutants.Mutant(1, "a.mp4", "bits", b""))

    assert [judge._ask(job, 1.0)[0] for _ in range(3)] == ["corrupt_media"] * 2 + [
        "too much memory"
    ]
    assert child.killed


def test_an_unnamed_mutant_is_kept_and_a_folder_belongs_to_one_seed(tmp_path: Path):
    """What is found can be looked at, and is listed first with a mark."""
    made = mutants.Mutant(5, "a.mp4", "bits", b"bad")
    ledger = Ledger(tmp_path, 1)
    ledger.add(Outcome(4, "a.mp4", "bits", "verdict", 3), made)
    ledger.add(Outcome(5, "a.mp4", "bits", "child died of SIGSEGV", 9), made)
    ledger.close()

    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["000005-a.mp4"]
    assert "! child died of SIGSEGV" in fuzz.table(ledger.outcomes)
    again = Ledger(tmp_path, 1)
    again.close()
    assert [one.number for one in again.outcomes] == [4, 5]
    with pytest.raises(RalfError, match="belongs to the run"):
        Ledger(tmp_path, 2)
