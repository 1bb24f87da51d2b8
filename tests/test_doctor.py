"""The doctor: every setting shown, secrets kept, and a fix beside each thing that is missing."""

import json
from pathlib import Path

import pytest

from worker.cli import main
from worker.doctor import examine, settings_shown
from worker.settings import Settings


def test_a_healthy_machine_exits_0(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The walk's needs are met: codecs, finder's weights, a model."""
    monkeypatch.setenv("RALF_MODELS_DIR", str(tiny_models))
    monkeypatch.setenv("RALF_MODEL", "tiny")
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = {item["name"]: item for item in report["findings"]}

    assert 0 == code, [item for item in found.values() if item["state"] != "ok"]
    assert "ok" == found["codecs"]["state"]
    assert "h264" in found["codecs"]["found"]
    assert "never trained" in found["model"]["found"]
    assert str(tiny_models) == report["settings"]["RALF_MODELS_DIR"]


def test_a_missing_model_exits_5_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The walk cannot do without one."""
    monkeypatch.setenv("RALF_MODELS_DIR", str(tmp_path))
    code = main(["doctor"])
    out = capsys.readouterr().out

    assert 5 == code
    assert "RALF_MODELS_DIR" in out


def test_everything_missing_comes_with_a_fix():
    """A finding that is not ok says what to do."""
    findings = list(examine(Settings(redis_url="redis://127.0.0.1:1/0")))

    assert [] == [item for item in findings if item.state == "missing" and not item.fix]


def test_a_redis_that_is_there_is_examined(redis_url: str):
    """Version and policy are read from the server itself."""
    findings = {item.name: item for item in examine(Settings(redis_url=redis_url))}

    assert findings["redis"].state in ("ok", "broken")  # the test's own server keeps nothing
    assert "noeviction" in findings["redis"].found


def test_secrets_are_counted_never_shown():
    """Passwords and webhook secrets stay out of the report."""
    settings = Settings(
        redis_url="redis://user:hunter2@queue:6379/0", webhook_secrets=("a=whsec_abc", "b=whsec_d")
    )
    text = json.dumps(dict(settings_shown(settings)))

    assert "hunter2" not in text
    assert "whsec" not in text
    assert "2 secrets" in text
