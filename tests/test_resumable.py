"""Steps that are done once: repeated where another thing is asked, resumed after a kill."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ralf.kernels.atomic_files import hold
from ralf.train.retrain import resumable
from ralf.train.retrain.resumable import Step, StepsDone, Stopped, do_steps, outlook


class Killed(BaseException):
    """An end that no code under test may catch."""


def three_steps(counts: dict[str, int], **asks: Any) -> list[Step]:
    """Three steps that count how often they worked."""

    def step(name: str) -> Step:
        def work(done: Mapping[str, Any]) -> dict[str, Any]:
            counts[name] = counts.get(name, 0) + 1
            return {"after": sorted(done)}

        return Step(name, {"asked": asks.get(name)}, work, f"condition of {name}")

    return [step(name) for name in ("a", "b", "c")]


def test_another_question_repeats_its_step_and_what_follows(tmp_path: Path):
    """The steps before it are not repeated, and the outlook says so beforehand."""
    counts: dict[str, int] = {}
    done = do_steps(three_steps(counts), tmp_path, lambda text: None)
    assert {"a": {"after": []}, "b": {"after": ["a"]}, "c": {"after": ["a", "b"]}} == done
    asked = three_steps(counts, b="another")

    assert [True, False, False] == [known for _, known in outlook(asked, tmp_path)]
    do_steps(asked, tmp_path, lambda text: None)
    assert {"a": 1, "b": 2, "c": 2} == counts


def test_what_is_no_longer_there_is_made_again_with_what_follows(tmp_path: Path):
    """As a version that somebody removed."""
    counts: dict[str, int] = {}
    do_steps(three_steps(counts), tmp_path, lambda text: None)
    first, second, third = three_steps(counts)
    do_steps(
        [first, replace(second, still_there=lambda facts: False), third],
        tmp_path,
        lambda text: None,
    )

    assert {"a": 1, "b": 2, "c": 2} == counts


def test_a_step_that_stops_leaves_those_before_it_done(tmp_path: Path):
    """The next command begins with the step that stopped."""
    counts: dict[str, int] = {}

    def stop(done: Mapping[str, Any]) -> dict[str, Any]:
        raise Stopped("more", "less", "try")

    first, second, third = three_steps(counts)
    with pytest.raises(Stopped, match=r"asked: more\n  came: less\n  to go on: try"):
        do_steps([first, replace(second, work=stop), third], tmp_path, lambda text: None)
    do_steps(three_steps(counts), tmp_path, lambda text: None)

    assert {"a": 1, "b": 1, "c": 1} == counts


def test_killed_while_the_record_is_written_it_holds_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At each flush and rename."""
    for number in range(1, 20):
        counts: dict[str, int] = {}
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            left = [number]
            for name in ("fsync", "replace"):
                patch.setattr(os, name, counted(getattr(os, name), left))
            try:
                do_steps(three_steps(counts), run, lambda text: None)
            except Killed:
                pass
            else:
                break
        known = [step.name for step, done in outlook(three_steps(counts), run) if done]
        before = dict(counts)
        do_steps(three_steps(counts), run, lambda text: None)
        assert all(counts[name] == before.get(name, 0) + (name not in known) for name in "abc")
    assert number > 6


def counted(real: Any, left: list[int]) -> Any:
    """The function, which raises Killed at the call of that number."""

    def call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return real(*args, **options)

    return call


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path):
    """The second is refused at once."""
    held = hold(tmp_path)
    try:
        with pytest.raises(resumable.FolderBusy, match="another process retrains"):
            do_steps(three_steps({}), tmp_path, lambda text: None)
    finally:
        os.close(held)


def test_a_file_that_is_no_record_is_refused(tmp_path: Path):
    """The message says what to do."""
    (tmp_path / "retrain.json").write_text('{"schema": "ralf.model/1"}')

    with pytest.raises(ValueError, match="remove it and every step but the training"):
        StepsDone(tmp_path)
