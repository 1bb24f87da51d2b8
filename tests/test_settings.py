"""Settings: read once from the environment, typed, and refused by name."""

import ast
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ralf.worker.service import sandbox
from ralf.worker.service.processes import as_environment
from ralf.worker.settings import Settings, SettingsError

WORKER = Path(__file__).resolve().parent.parent / "worker"
CHILD_READS = [
    WORKER / "runtime.py",
    WORKER / "pipeline.py",
    *sorted((WORKER / "media").glob("*.py")),
    *(
        WORKER / "service" / name
        for name in ("child.py", "models.py", "jobs.py", "shadow.py", "sandbox.py")
    ),
]
"""The files whose code runs in the child process and sees Settings."""


def test_nothing_set_is_the_defaults():
    """An empty environment changes nothing."""
    assert Settings() == Settings.from_environment({})


def test_each_kind_of_value_is_parsed():
    """int, float, bool, text and lists."""
    settings = Settings.from_environment(
        {
            "RALF_MAX_BYTES": "1000",
            "RALF_GRACE_S": "2.5",
            "RALF_ALLOW_PRIVATE_ADDRESSES": "yes",
            "RALF_MODEL": "fdfl",
            "RALF_RETRY_DELAYS_S": "1, 2.5",
            "RALF_FETCH_PORTS": "80,8443",
            "PATH": "/bin",
        }
    )

    assert 1000 == settings.max_bytes
    assert 2.5 == settings.grace_s
    assert settings.allow_private_addresses is True
    assert "fdfl" == settings.model
    assert (1.0, 2.5) == settings.retry_delays_s
    assert (80, 8443) == settings.fetch_ports


@pytest.mark.parametrize(
    ("name", "text"),
    [("RALF_MAX_BYTES", "2 GiB"), ("RALF_GRACE_S", "soon"), ("RALF_ALLOW_PRIVATE_ADDRESSES", "x")],
)
def test_a_value_that_does_not_parse_names_its_variable(name: str, text: str):
    """So that it can be found."""
    with pytest.raises(SettingsError, match=name):
        Settings.from_environment({name: text})


def test_an_unknown_name_is_refused():
    """A typo must not become a default."""
    with pytest.raises(SettingsError, match="RALF_MAX_BITES"):
        Settings.from_environment({"RALF_MAX_BITES": "1"})


def test_a_setting_may_be_in_a_file(tmp_path: Path):
    """As Compose and Kubernetes give secrets; a supervisor passes the file's name on."""
    secret = tmp_path / "redis_url"
    secret.write_text("redis://worker:s3cret@queue:6379/0\n")
    given = {"RALF_REDIS_URL_FILE": str(secret), "RALF_MODEL": "fdfl", "HOME": "/"}
    settings = Settings.from_environment(given)
    passed = as_environment(replace(settings, http_port=9), given)

    assert settings.redis_url == "redis://worker:s3cret@queue:6379/0"
    assert settings.model == "fdfl"
    assert "s3cret" not in str(passed)
    assert Settings.from_environment(passed) == replace(settings, http_port=9)
    # Another address, as an embedded Redis has, is passed itself.
    other = replace(settings, redis_url="unix:///tmp/socket")
    assert Settings.from_environment(as_environment(other, given)) == other


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RALF_REDIS_URL_FILE": "/nowhere"}, "RALF_REDIS_URL_FILE.*No such file"),
        ({"RALF_REDIS_URL_FILE": "/dev/null", "RALF_REDIS_URL": "redis://a"}, "both set"),
        ({"RALF_REDIS_URI_FILE": "/dev/null"}, "RALF_REDIS_URI_FILE is not a setting"),
    ],
)
def test_a_file_that_cannot_be_a_setting_is_named(given: dict[str, str], said: str):
    """Without the content of any file."""
    with pytest.raises(SettingsError, match=said):
        Settings.from_environment(given)


def test_every_setting_has_a_plain_default():
    """`ralf doctor` can show them all."""
    assert [] == [part.name for part in fields(Settings) if getattr(Settings(), part.name) is None]


def test_settings_come_back_from_their_environment():
    """A supervisor starts its processes so."""
    settings = Settings(
        fetch_ports=(80, 8443), allow_private_addresses=True, retry_delays_s=(1.5,), model="fdfl"
    )

    assert settings == Settings.from_environment(settings.to_environment())


def test_every_setting_that_the_child_reads_is_passed_to_it():
    """The child once ignored RALF_DECODER, RALF_GPU_CHUNK_BYTES and RALF_FIND_EVERY."""
    passed = {part.name for part in fields(Settings) if part.metadata.get("child")}
    changed = replace(Settings(), decoder="pyav", gpu_chunk_bytes=12345, find_every=3)
    seen = Settings.from_environment(
        {
            name: text
            for name, text in sandbox.environment(changed, {}).items()
            if name.startswith("RALF_")
        }
    )

    assert passed >= {"decoder", "gpu_chunk_bytes", "find_every"}
    assert set() == settings_read(CHILD_READS) - passed
    assert ("pyav", 12345, 3) == (seen.decoder, seen.gpu_chunk_bytes, seen.find_every)


def settings_read(files: list[Path]) -> set[str]:
    """The names of settings that appear as attributes in these files."""
    known = {part.name for part in fields(Settings)}
    holders = {"settings", "_settings", "most"}
    found: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in known:
                holder = node.value
                name = holder.attr if isinstance(holder, ast.Attribute) else None
                name = holder.id if isinstance(holder, ast.Name) else name
                found |= {node.attr} if name in holders else set()
    return found


def test_no_secret_and_no_address_is_passed_to_the_child():
    """The child decodes hostile media."""
    passed = sandbox.environment(Settings(), {})

    for name in ("REDIS_URL", "WEBHOOK_SECRETS", "BUCKETS", "FILE_ROOTS", "S3_ENDPOINT"):
        assert f"RALF_{name}" not in passed
