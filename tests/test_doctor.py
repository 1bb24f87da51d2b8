"""The doctor: every setting shown, secrets kept, and a fix beside each thing that is missing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from redis import Redis

from ralf.__main__ import main
from ralf.kernels import choose_engine, engine_cuda
from ralf.kernels.networks.mtcnn import WeightsMissing
from ralf.kernels.registry import point_to
from ralf.worker.doctor import (
    Finding,
    examine,
    examine_confinement,
    examine_gpu_engine,
    examine_models,
    examine_redis,
    redis_cure,
    settings_shown,
)
from ralf.worker.settings import Settings
from tests.redis_server import RedisServer
from tests.test_artifact import publish
from tests.test_plan_signature import OURS
from tests.test_plans import KEY, put


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


def test_the_doctor_says_which_plans_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Unsigned ones where keys are set; and where none is, that nobody checks them."""
    artifact = publish(tmp_path)
    point_to(tmp_path, artifact.name, artifact.version)
    put(artifact, b"plan", KEY, "sm90")
    settings = Settings(models_dir=str(tmp_path), model=artifact.name)
    [unchecked] = [each for each in examine_models(settings) if each.name == "plans"]
    [refused] = [
        each
        for each in examine_models(replace(settings, plan_public_key=OURS.public))
        if each.name == "plans"
    ]

    assert "missing" == unchecked.state and "whoever made them" in unchecked.found
    assert "broken" == refused.state and "NOT LOADED, torch runs instead" in refused.found
    assert unchecked.fix and refused.fix
    monkeypatch.setenv("RALF_PLAN_SIGNING_KEY", OURS.private)
    put(artifact, b"another", KEY, "sm90")
    found = [(each.name, each.state) for each in examine_models(settings)]
    assert [("model", "ok"), ("plans", "ok")] == found


def test_keys_of_plans_are_not_shown():
    """Only that they are set."""
    settings = Settings(plan_signing_key=OURS.private, plan_public_key=OURS.public)
    shown = dict(settings_shown(settings))

    assert {"set"} == {shown["RALF_PLAN_SIGNING_KEY"], shown["RALF_PLAN_PUBLIC_KEY"]}


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


@pytest.mark.parametrize(
    ("plans", "compiler", "expected"),
    [
        (["trt-10.12-sm90-fp16-64"], None, ("ok", "trt-10.12-sm90-fp16-64")),
        ([], "/usr/bin/gcc", ("missing", "torch.compile by /usr/bin/gcc")),
        ([], None, ("broken", "SLOW: no plan, and no C compiler")),
    ],
)
def test_a_gpu_that_would_compute_slowly_is_named(
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    plans: list[str],
    compiler: str | None,
    expected: tuple[str, str],
):
    """The production image has no compiler: without a plan all works, at a part of the speed."""
    offered = ["torch-fp16", "torch-eager-fp16", *plans]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(choose_engine, "candidates", lambda artifact, device: offered)
    monkeypatch.setattr(engine_cuda, "c_compiler", lambda: compiler)
    settings = Settings(models_dir=str(tiny_models), model="tiny")

    (finding,) = examine_gpu_engine(settings)
    state, said = expected

    assert state == finding.state and said in finding.found
    assert "ralf build --all" in finding.fix or state == "ok"
    assert [] == list(examine_gpu_engine(replace(settings, device="cpu")))


def test_what_cannot_be_examined_comes_with_a_fix_and_an_exit_code(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A machine without PyAV, the finder's weights or a Python to start: two stop a walk."""

    def missing(_: str) -> Path:
        raise WeightsMissing("pnet.pt is not there")

    monkeypatch.setenv("RALF_MODELS_DIR", str(tiny_models))
    monkeypatch.setenv("RALF_MODEL", "tiny")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr("ralf.kernels.networks.mtcnn.weights_path", missing)
    monkeypatch.setitem(sys.modules, "ralf.worker.media.probe", None)

    assert 5 == main(["doctor", "--json"])
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["findings"]}
    states = {name: found[name]["state"] for name in ("codecs", "finder", "confinement")}
    needed = {name: found[name]["needed"] for name in states}
    assert {"codecs": "missing", "finder": "broken", "confinement": "broken"} == states
    assert {"codecs": True, "finder": True, "confinement": False} == needed
    assert [] == [item for item in found.values() if item["state"] != "ok" and not item["fix"]]


@pytest.mark.parametrize("mode", ["auto", "required", "off"])
def test_what_confines_a_child_here_is_tried_and_said(mode: str, monkeypatch: pytest.MonkeyPatch):
    """One line for each protection; where they are required, a missing one is an error."""
    monkeypatch.setenv("RALF_SANDBOX", mode)
    settings = Settings.from_environment()
    found = {item.name: item for item in examine_confinement(settings)}
    tried = subprocess.run(
        [sys.executable, "-m", "ralf.worker.service.sandbox"], capture_output=True, text=True
    )
    holds = {
        f"child {one['name']}": one["holds"]
        for one in map(json.loads, tried.stdout.split("\n")[:-1])
    }

    assert {"child seccomp", "child landlock", "child network", "child memory"} <= set(found)
    assert {name: item.state == "ok" for name, item in found.items()} == holds
    assert {item.needed for item in found.values()} == {mode == "required"}
    if mode == "off":
        assert "RALF_SANDBOX=off" in found["child seccomp"].found
        assert found["child seccomp"].state == "missing"


def examined(redis_url: str) -> Finding:
    """What is said of the server itself."""
    return next(
        item for item in examine_redis(Settings(redis_url=redis_url)) if item.name == "redis"
    )


def test_a_redis_that_forgets_at_a_restart_is_broken(redis_url: str):
    """The suite's own server keeps nothing."""
    finding = examined(redis_url)

    assert "broken" == finding.state
    assert "noeviction, no append-only file" in finding.found
    assert "appendonly yes and appendfsync always" in finding.fix


def test_only_a_redis_that_keeps_each_answered_write_is_ok():
    """What each setting of a real server may lose is said."""
    server = RedisServer(aof=True)
    server.start()
    try:
        always = examined(server.url)
        with Redis.from_url(server.url) as client:
            client.config_set("appendfsync", "everysec")
            everysec = examined(server.url)
            client.config_set("maxmemory-policy", "allkeys-lru")
            evicting = examined(server.url)
    finally:
        server.stop()

    assert ("ok", "") == (always.state, always.fix)
    assert "broken" == everysec.state
    assert "everysec a crash may lose the last two seconds" in everysec.fix
    assert "noeviction" in evicting.fix


@pytest.mark.parametrize(
    ("info", "cure"),
    [({"redis_version": "6.0.16"}, "6.2"), ({"redis_version": "7.2", "cluster_enabled": 1}, "one")],
)
def test_a_redis_that_cannot_serve_is_named(info: dict[str, object], cure: str):
    """Too old for BLMOVE, or sharded under scripts that touch many keys."""
    assert cure in redis_cure(info, "noeviction", "always")


def test_secrets_are_counted_never_shown():
    """Passwords and webhook secrets stay out of the report."""
    settings = Settings(
        redis_url="redis://user:hunter2@queue:6379/0", webhook_secrets=("a=whsec_abc", "b=whsec_d")
    )
    text = json.dumps(dict(settings_shown(settings)))

    assert "hunter2" not in text
    assert "whsec" not in text
    assert "2 secrets" in text
