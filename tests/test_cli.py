"""The command line: results on stdout, the rest on stderr, and the exit codes of the design."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ralf.__main__ import main
from ralf.worker.cli import scan as scan_module
from ralf.worker.contract import Verdict
from tests.documents import a_track, a_verdict
from tests.hostile import REFUSED


def scan(*arguments: object) -> int:
    """`ralf scan` in this process."""
    return main(["scan", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _tiny_model(tiny_models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RALF_MODELS_DIR", str(tiny_models))
    monkeypatch.setenv("RALF_MODEL", "tiny")
    monkeypatch.setenv("RALF_THREADS", "1")


def test_scan_prints_the_contracts_json(clip_of_none: Path, capsys: pytest.CaptureFixture[str]):
    """One document a file, nothing else on stdout."""
    code = scan(clip_of_none, "--json")
    out = capsys.readouterr().out

    assert 0 == code
    assert "no_faces" == Verdict.model_validate_json(out).label


def test_scan_prints_a_table_for_people(clip_of_two: Path, capsys: pytest.CaptureFixture[str]):
    """The verdict's word, each face, each warning."""
    code = scan(clip_of_two, "--max-frames", 4)
    out = capsys.readouterr().out

    assert 0 == code
    assert "two.mp4" in out
    assert "t1" in out
    assert "t2" in out
    assert "untrained_model" in out


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (0.93123, "score 0.93  (forged at 0.80, 5 % false-alarm threshold)"),
        (0.7996, "score 0.7996  (forged at 0.8000, 5 % false-alarm threshold)"),
    ],
)
def test_scores_and_threshold_are_printed_as_the_page_has_them(
    score: float, shown: str, capsys: pytest.CaptureFixture[str]
):
    """Two digits, or as many as tell the side; the threshold in words, in place of its name."""
    scan_module.print_verdict(
        "a.mp4", a_verdict([a_track([score] * 3)], score=score), as_json=False
    )
    first, _, _, track, *_ = capsys.readouterr().out.splitlines()

    assert first.endswith(shown)
    assert shown.split()[1] in track.split()


def test_fail_on_forged_turns_the_verdict_into_the_exit_code(clip_of_two: Path, eager_models: Path):
    """1 for a forged verdict, and only when asked."""
    eager = ["--models", eager_models, "--model", "eager", "--max-frames", 4]

    assert 0 == scan(clip_of_two, *eager)
    assert 1 == scan(clip_of_two, *eager, "--fail-on", "forged")


def test_an_untrained_model_calls_nobody_forged(
    clip_of_two: Path, capsys: pytest.CaptureFixture[str]
):
    """Its score decides nothing, whatever it is."""
    code = scan(clip_of_two, "--max-frames", 4, "--fail-on", "forged", "--json")
    verdict = Verdict.model_validate_json(capsys.readouterr().out)

    assert 0 == code
    assert "inconclusive" == verdict.label
    assert "never trained" in verdict.reason


def test_fail_on_inconclusive_counts_a_clip_without_faces(clip_of_none: Path):
    """What is not likely_authentic is not passed."""
    assert 1 == scan(clip_of_none, "--fail-on", "inconclusive")
    assert 0 == scan(clip_of_none, "--fail-on", "forged")


def test_a_bad_file_exits_4_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its named error is on stderr, no page is half-written."""
    bad = tmp_path / "bad.mp4"
    bad.write_text("not a video at all, but long enough to be read as something")
    code = scan(bad, "--report", tmp_path / "page.html")
    captured = capsys.readouterr()

    assert 4 == code
    assert "container_unsupported" in captured.err or "corrupt_media" in captured.err
    assert "" == captured.out
    assert ["bad.mp4"] == [entry.name for entry in tmp_path.iterdir()]


def test_every_bad_file_of_the_list_is_named_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One run over all of them: each its own code on stderr, and no page, no file, for any."""
    named, files = [], []
    for number, (ending, make, error) in enumerate(REFUSED.values()):
        path = make(tmp_path / f"clip{number}.{ending}")
        files.append(path)
        named.append(f"ralf: {path}: {error.code}: ")
    before = sorted(tmp_path.rglob("*"))
    pages = tmp_path.with_name("pages of the bad")

    assert 4 == scan(*files, "--report", pages)

    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert "" == said.out
    assert [] == [
        want for want in named if sum(line.startswith(want) for line in lines) != named.count(want)
    ]
    assert before == sorted(tmp_path.rglob("*"))
    assert [] == list(pages.iterdir())


def test_one_bad_file_does_not_stop_the_others(
    tmp_path: Path, clip_of_none: Path, capsys: pytest.CaptureFixture[str]
):
    """Each has its line of JSON; the code is the worst that happened."""
    missing = tmp_path / "missing.mp4"
    code = scan(missing, clip_of_none, "--json")
    captured = capsys.readouterr()
    failed, judged = map(json.loads, captured.out.splitlines())

    assert 4 == code
    assert "no_faces" == judged["label"]
    assert {
        "schema": "ralf.scan_error/1",
        "file": str(missing),
        "code": "unreadable_file",
        "message": f"cannot read {missing}: No such file or directory",
    } == failed
    assert "unreadable_file" in captured.err


def test_a_forged_file_is_not_hidden_by_a_bad_one(
    tmp_path: Path, clip_of_two: Path, clip_of_none: Path, eager_models: Path
):
    """With --fail-on 1 comes before 4, in either order; without it nothing is 1."""
    missing = tmp_path / "missing.mp4"
    eager = ["--models", eager_models, "--model", "eager", "--max-frames", 4]

    assert 1 == scan(clip_of_two, missing, *eager, "--fail-on", "forged")
    assert 1 == scan(missing, clip_of_two, *eager, "--fail-on", "forged")
    assert 4 == scan(missing, clip_of_none, *eager, "--fail-on", "forged")
    assert 4 == scan(clip_of_two, missing, *eager)


def test_no_name_is_cut_where_nobody_sees_a_terminal(
    tmp_path: Path, clip_of_two: Path, capsys: pytest.CaptureFixture[str]
):
    """A path of 300 characters, and each track on one line."""
    long = tmp_path / ("a" * 100) / ("b c " * 40) / "clip.mp4"
    long.parent.mkdir(parents=True)
    shutil.copy(clip_of_two, long)

    assert 0 == scan(long, "--max-frames", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{long}: ")
    assert 2 == sum(line.split()[:1] in (["t1"], ["t2"]) for line in lines)
    assert all(len(line) < 1000 for line in lines)


def test_a_terminal_sees_that_it_starts(
    clip_of_none: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Loading takes seconds: a line says so, and gives way; --quiet has none."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    assert 0 == scan(clip_of_none)
    assert capsys.readouterr().err.startswith("ralf: loading the model …\r\x1b[K")
    assert 0 == scan(clip_of_none, "--quiet")
    assert "" == capsys.readouterr().err


def test_a_page_is_written_for_each_file(tmp_path: Path, clip_of_none: Path):
    """Into a folder that is made when it is not there."""
    folder = tmp_path / "pages"
    code = scan(clip_of_none, clip_of_none, "--report", folder)

    assert 0 == code
    assert ["none.mp4.html"] == [entry.name for entry in folder.iterdir()]
    assert "<!doctype html>" in (folder / "none.mp4.html").read_text().lower()


def test_files_of_one_name_keep_their_own_pages(tmp_path: Path, clip_of_none: Path):
    """From two folders into one: neither page is written over."""
    other = tmp_path / clip_of_none.name
    shutil.copy(clip_of_none, other)
    folder = tmp_path / "pages"

    assert 0 == scan(clip_of_none, other, "--report", folder)
    assert ["none.mp4.2.html", "none.mp4.html"] == sorted(page.name for page in folder.iterdir())


def test_a_verdict_says_which_file_it_speaks_of(
    tmp_path: Path, clip_of_none: Path, capsys: pytest.CaptureFixture[str]
):
    """Also where the name is no text, and where it looks like markup."""
    odd = tmp_path / os.fsdecode(b"[b] \xff\x1b[2J.mp4")
    shutil.copy(clip_of_none, odd)

    assert 0 == scan(odd, "--json", "--report", tmp_path / "page.html")
    tag = Verdict.model_validate_json(capsys.readouterr().out).tag
    assert "[b] \ufffd\ufffd[2J.mp4" == tag
    assert f"<title>No faces · {tag}</title>" in (tmp_path / "page.html").read_text()
    assert 0 == scan(odd)
    assert tag in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sampling", "often"],
        ["--sampling", "fps"],
        ["--sampling", "fps:0"],
        ["--sampling", "uniform:3"],
        ["--max-frames", "0"],
        ["--max-frames", "100000"],
        ["--min-face", "0"],
        ["--min-face", "5000"],
        ["--device", "gpu"],
        ["--device", "cuda:x"],
    ],
)
def test_nonsense_is_a_usage_error(clip_of_none: Path, arguments: list[str]):
    """Exit 2, before any file is opened."""
    with pytest.raises(SystemExit) as caught:
        scan(clip_of_none, *arguments)

    assert 2 == caught.value.code


def test_a_page_in_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path, clip_of_none: Path):
    """Said before the work, not after it."""
    with pytest.raises(SystemExit) as caught:
        scan(clip_of_none, "--report", tmp_path / "nowhere" / "page.html")

    assert 2 == caught.value.code


@pytest.mark.parametrize("place", ["none.mp4", "none.mp4/pages/", "./none.mp4"])
def test_a_page_never_takes_a_files_place(
    tmp_path: Path, clip_of_none: Path, place: str, monkeypatch: pytest.MonkeyPatch
):
    """Neither the clip's own, nor a folder's."""
    shutil.copy(clip_of_none, tmp_path / "none.mp4")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        scan("none.mp4", "--report", place)

    assert 2 == caught.value.code
    assert clip_of_none.read_bytes() == (tmp_path / "none.mp4").read_bytes()


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (KeyboardInterrupt(), (130, "ralf: interrupted")),
        (OSError(28, "No space left on device"), (5, "ralf: [Errno 28] No space left")),
        (ZeroDivisionError("a fault of ours"), (5, "Traceback")),
    ],
)
def test_no_accident_looks_like_a_forged_verdict(
    clip_of_none: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    ending: tuple[int, str],
):
    """1 is kept for --fail-on, also where Python itself would exit with it."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ralf.worker.cli.scan.analyze", fail)

    code, said = ending
    assert code == scan(clip_of_none)
    assert capsys.readouterr().err.startswith(said)


def test_an_error_in_ralf_itself_does_not_stop_the_other_files(
    clip_of_none: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The first file meets a bug; the second gets its verdict, and the exit code says 5."""
    analyze, calls = scan_module.analyze, []

    def fail_once(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise IndexError("list index out of range")
        return analyze(*given, **options)

    monkeypatch.setattr(scan_module, "analyze", fail_once)

    code = scan(clip_of_none, clip_of_none, "--json")
    said = capsys.readouterr()

    assert 5 == code
    failed, judged = map(json.loads, said.out.splitlines())
    assert ("internal_error", "no_faces") == (failed["code"], judged["label"])
    assert "an error in Ralf itself: list index out of range" in said.err


def test_a_missing_model_is_infrastructure(clip_of_none: Path, capsys: pytest.CaptureFixture[str]):
    """Exit 5, with what was sought and what is there."""
    code = scan(clip_of_none, "--model", "nobody")
    err = capsys.readouterr().err

    assert 5 == code
    assert "nobody" in err
    assert "tiny" in err


def test_an_unknown_setting_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, clip_of_none: Path, capsys: pytest.CaptureFixture[str]
):
    """A typo in the environment cannot hide."""
    monkeypatch.setenv("RALF_MODLE", "x")
    code = scan(clip_of_none)

    assert 2 == code
    assert "RALF_MODLE" in capsys.readouterr().err


def test_asking_for_a_gpu_that_is_not_there_is_infrastructure(
    clip_of_none: Path, capsys: pytest.CaptureFixture[str]
):
    """Never a silent fall to the CPU."""
    import torch

    device = "cuda:99" if torch.cuda.is_available() else "cuda"

    assert 5 == scan(clip_of_none, "--device", device)
    assert device in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback(clip_of_none: Path):
    """`ralf scan … | head -0` ends quietly."""
    run = subprocess.run(
        f"{sys.executable} -m ralf scan {clip_of_none} --json | head -c 0",
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ.copy(),
    )

    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", ["status nothing", "janitor --once", "quarantine list"])
def test_a_command_without_redis_says_what_to_do(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Exit 5 and the cure."""
    monkeypatch.setenv("RALF_REDIS_URL", "redis://127.0.0.1:1/0")

    assert 5 == main(command.split())
    assert "RALF_REDIS_URL" in capsys.readouterr().err


def test_the_shell_completes_commands_options_and_files(tmp_path: Path):
    """A real bash reads the printed script and completes three beginnings."""
    (tmp_path / "clip of mine.mp4").touch()
    printed = subprocess.run(
        [sys.executable, "-m", "ralf", "--print-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "ralf.bash").write_text(printed.stdout)
    typed = [["ralf", "sc"], ["ralf", "scan", "--out"], ["ralf", "scan", "clip"]]
    script = "source ralf.bash; function_name=$(complete -p ralf | sed 's/.*-F //; s/ .*//')\n"
    for words in typed:
        script += f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        script += f'$function_name ralf {words[-1]} {words[-2]}; echo "${{COMPREPLY[*]}}"\n'
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)

    assert ["scan", "--output-dir", "clip of mine.mp4"] == [
        line.strip() for line in run.stdout.splitlines()
    ], run.stderr


def test_completion_without_its_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It is an optional extra."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "zsh"])

    assert 5 == caught.value.code
    assert "[completion]" in capsys.readouterr().err
