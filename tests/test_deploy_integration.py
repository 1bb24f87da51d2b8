"""The examples of docs/integration.md run, in Python and in Node, on a real Redis."""

import ast
import base64
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis
from standardwebhooks import Webhook

from ralf.worker.service.connection import connect
from ralf.worker.service.rq_entry import check_entry
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.deploy_tools import ROOT, tool
from tests.documents import a_track, a_verdict
from tests.test_redis_access import popped

TEXT = (ROOT / "docs" / "integration.md").read_text()
SUBMIT = ROOT / "docs" / "examples" / "submit.mjs"
VERIFY = ROOT / "docs" / "examples" / "verify.mjs"
URI = "https://cdn.example/42.mp4"


def node(program: Path, *arguments: str, **environment: str) -> list[str]:
    """The command line that runs a Node program."""
    return [tool("node"), str(program), *arguments]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """ralf.lua, made with the command on the page."""
    path = tmp_path / "ralf.lua"
    command = [sys.executable, "-m", "ralf.worker.service.store"]
    path.write_bytes(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    return path


@pytest.fixture
def address(redis: Redis) -> str:
    """The address of the test's Redis, in the form that the Node program takes."""
    return f"unix://{redis.connection_pool.connection_kwargs['path']}"


def test_a_job_from_node_is_a_job_like_any_other(redis_url: str, address: str, script: Path):
    """A worker takes it, RQ lists it, its verdict is read, and its token makes no second job."""
    store = Store(connect(redis_url), Settings(redis_url=redis_url))
    command = node(SUBMIT, address, str(script), "upload-42", URI, "60")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        made = json.loads(client.stdout.readline())
        entry = store.redis.hgetall(f"rq:job:{made['job_id']}")
        claim = store.begin(popped(store), "w")
        assert claim is not None
        verdict = a_verdict([a_track([0.9, 0.95])]).model_copy(update={"job_id": claim.job_id})
        store.end(claim, verdict)
        answer = json.loads(client.stdout.readline())
        code = client.wait(60)
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert (made["state"], made["existing"], code) == ("queued", False, 0)
    assert json.loads(entry[b"data"]) == [store.function, None, [made["job_id"]], {}]
    assert (claim.job.media.uri, claim.job.token) == (URI, "upload-42")
    assert answer["label"] == verdict.label
    assert json.loads(again[0]) == {
        "job_id": made["job_id"],
        "state": "succeeded",
        "existing": True,
    }


def test_a_token_for_another_upload_is_a_conflict_in_node_too(
    redis_url: str, address: str, script: Path
):
    """And the program prints why a job ended without a verdict."""
    store = Store(connect(redis_url), Settings(redis_url=redis_url))
    first = node(SUBMIT, address, str(script), "upload-42", URI, "60")
    other = node(SUBMIT, address, str(script), "upload-42", URI + "?v=2", "1")
    with subprocess.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        made = json.loads(one.stdout.readline())
        two = subprocess.run(other, capture_output=True, text=True)
        store.cancel(made["job_id"])
        said = one.communicate(timeout=60)[1]

    assert (one.returncode, two.returncode) == (1, 1)
    assert f"was used for another upload, job {made['job_id']}" in two.stderr
    assert "ended as cancelled" in said


def test_the_documented_envelope_is_what_a_worker_believes():
    """The worker's own check accepts the JSON on the page and refuses another function."""
    moderate = "ralf.worker.service.jobs.moderate"
    blocks = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    (block,) = [block for block in blocks if moderate in block]

    assert check_entry(block.encode(), "ID", [moderate]) == (moderate, "")
    assert check_entry(block.replace(moderate, "os.system").encode(), "ID", [moderate])[1]
    assert check_entry(block.encode(), "another", [moderate])[1]


def test_the_python_on_the_page_parses_and_names_what_the_client_has():
    """Every imported name exists."""
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        for statement in ast.walk(ast.parse(block)):
            if isinstance(statement, ast.ImportFrom):
                module = __import__(str(statement.module), fromlist=["x"])
                assert [n.name for n in statement.names if not hasattr(module, n.name)] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"body": '{"type":"verdict.ready" }'}, 1),
        ({"webhook-timestamp": "1"}, 1),
        ({"webhook-signature": "v1,AAAA"}, 1),
        ({"secrets": "whsec_" + base64.b64encode(b"other").decode()}, 1),
    ],
)
def test_node_believes_only_what_the_secret_signed(change: dict[str, str], code: int):
    """The reference library signs; a rotated secret is one of several."""
    secret, body = "whsec_" + base64.b64encode(b"k" * 32).decode(), '{"type":"verdict.ready"}'
    at = datetime.fromtimestamp(int(time.time()), UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": "v1,bm8= " + Webhook(secret).sign("msg_1", at, body),
    }
    headers |= {name: value for name, value in change.items() if name in headers}
    old = "whsec_" + base64.b64encode(b"old").decode()
    ran = subprocess.run(
        node(VERIFY),
        input=json.dumps({"headers": headers, "body": change.get("body", body)}),
        text=True,
        env={**os.environ, "WEBHOOK_SECRETS": change.get("secrets", f"{old} {secret}")},
    )

    assert ran.returncode == code
