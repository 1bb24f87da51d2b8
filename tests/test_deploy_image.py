"""Checks the Dockerfile and compose.yaml without a container engine."""

import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy_tools import DEPLOY, ROOT, run

# Not left on the path: other tests look at what a worker's child may read there.
sys.path.append(str(DEPLOY))
import dockerfile

sys.path.remove(str(DEPLOY))

TEXT = (ROOT / "Dockerfile").read_text()
STAGES = dockerfile.parse(TEXT)
TARGETS = ("cpu", "gpu", "client")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PINNED = re.compile(r"[a-z0-9./-]+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}")
OURS = {"ralf:cpu", "ralf:gpu", "ralf:client"}
UNPINNED = {"nvidia/dcgm-exporter:3.3.0-3.2.0-ubuntu22.04"}
"""Images whose digest is not known here."""


def environment(target: str) -> dict[str, str]:
    """The environment variables that the image sets."""
    values = {"PATH": "/bin"}
    for stage in dockerfile.lineage(STAGES, target):
        for step in stage.steps:
            if step.word == "ENV":
                values |= dockerfile.pairs(step.text, values)
    return values


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_nobody_checks_its_health_and_holds_no_model(target: str):
    """This holds for every target; all files are written under /work."""
    values = environment(target)
    user = dockerfile.last(STAGES, target, "USER")
    health = dockerfile.health_command(dockerfile.last(STAGES, target, "HEALTHCHECK"))
    copied = [
        step.text
        for stage in STAGES.values()
        for step in stage.steps
        if step.word == "COPY" and not step.text.startswith("--from")
    ]

    assert user == "10001:10001"
    assert "/healthz" in health[-1]
    compile(health[-1], "HEALTHCHECK", "exec")
    assert dockerfile.command(dockerfile.last(STAGES, target, "ENTRYPOINT"))[-1] == "ralf"
    assert values["RALF_MODELS_DIR"] == "/models"
    assert {values[name] for name in ("TMPDIR", "RALF_WORK_DIR")} == {"/work"}
    assert not any(text.startswith("models") for text in copied)


@pytest.mark.parametrize("target", TARGETS)
def test_what_builds_is_not_in_what_ships(target: str):
    """The last stages copy one folder, from a stage that removed pip from it."""
    (copy,) = [step.text for step in STAGES[target].steps if step.word == "COPY"]
    source = copy.split()[0].removeprefix("--from=")
    installs = [step.text for step in STAGES[source].steps if step.word == "RUN"]

    assert not [step for step in STAGES[target].steps if step.word == "RUN"]
    assert copy.split()[1:] == ["/opt/ralf", "/opt/ralf"]
    assert "pip uninstall --yes pip" in installs[-1]


def pip_installs() -> list[str]:
    """Every `pip install` of the Dockerfile, with its arguments."""
    text = re.sub(r"\\\n", " ", TEXT)
    return [" ".join(found.split()) for found in re.findall(r"pip (install [^;&\n]*)", text)]


def test_pip_takes_only_files_with_a_known_hash():
    """Except standard TensorRT, our own code, and torch from an index that was asked for."""
    unhashed = [line for line in pip_installs() if "--require-hashes" not in line]
    own = [line for line in unhashed if line.endswith(" .")]

    assert len(unhashed) == 5
    assert {" ".join(w for w in line.split() if w != "--force-reinstall") for line in own} == {
        "install --no-deps --no-build-isolation ."
    }
    assert "--extra-index-url" not in TEXT
    assert any("--no-deps --index-url" in line and "torch" in line for line in unhashed)
    assert any("-c constraints.txt" in line and "GPU_EXTRA" in line for line in unhashed)


def locked(name: str) -> dict[str, str]:
    """Versions by normalised name of one lock; each must have a hash."""
    text = (DEPLOY / "locks" / f"{name}.txt").read_text()
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        package, version = re.match(r"([A-Za-z0-9._-]+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        assert "--hash=sha256:" in entry, entry
        found[re.sub(r"[-_.]+", "-", package).lower()] = version
    return found


@pytest.mark.parametrize(
    ("name", "extra"), [("client", "service"), ("cpu", "stores"), ("dev", "dev")]
)
def test_a_lock_has_what_its_extra_asks_for_in_the_versions_of_constraints(name: str, extra: str):
    """`make locks` was run after the last change; CI runs it again where the registry answers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    have = locked(name) | (locked("torch") if name == "cpu" else {})
    asked, names = set(), [extra] + (["cpu"] if name == "cpu" else [])
    while names:
        for line in project["optional-dependencies"][names.pop()]:
            if own := re.match(r"ralf-moderation\[(.*)\]", line):
                names += own[1].split(",")
            else:
                asked.add(re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-"))  # type: ignore[index]
    asked |= {re.match(r"[a-z]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]

    assert asked - set(have) == set()
    assert {n: v for n, v in have.items() if n in pins and pins[n] != v} == {}


def test_one_version_of_tensorrt_rtx_is_built_with_and_run_with():
    """Only the version that wrote a plan can read it."""
    text = (ROOT / "pyproject.toml").read_text()
    (pin,) = re.findall(r"tensorrt-rtx-cu13==([0-9.]+)", text)

    assert locked("gpu-rtx")["tensorrt-rtx-cu13"] == locked("gpu-rtx")["tensorrt-rtx"] == pin


def test_a_gpu_image_asks_for_decoder_and_device():
    """Otherwise a worker could run on the CPU of a GPU machine without any error."""
    values = environment("gpu")

    assert values["NVIDIA_DRIVER_CAPABILITIES"] == "video,compute,utility"
    assert values["RALF_DEVICE"] == "cuda"
    assert environment("cpu")["RALF_DEVICE"] == "cpu"


def test_bases_are_pinned_by_digest():
    """The one exception is named in UNPINNED."""
    images = {service["image"] for service in COMPOSE["services"].values()} - OURS

    assert {image for image in images if not PINNED.fullmatch(image)} == UNPINNED
    assert {stage.base for stage in STAGES.values() if stage.base not in STAGES} == set(
        PINNED.findall(TEXT)
    )


def test_what_is_copied_exists_and_is_not_ignored():
    """.dockerignore excludes everything that it does not name."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    sources = {
        source.rstrip("/")
        for stage in STAGES.values()
        for step in stage.steps
        if step.word == "COPY" and not step.text.startswith("--from")
        for source in step.text.split()[:-1]
    }

    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_parser_refuses_what_it_does_not_know():
    """If the parser skipped a step, prove_image.py would prove nothing."""
    with pytest.raises(dockerfile.NotUnderstood, match="ONBUILD"):
        dockerfile.parse("FROM x AS a\nONBUILD RUN true\n")
    stages = dockerfile.parse(
        "ARG B=x:1\nFROM ${B} AS a\nRUN one \\\n # why\n && two\nENV P=$Q/r\n"
    )
    assert stages["a"].base == "x:1"
    assert stages["a"].steps[0].text.split() == ["one", "&&", "two"]
    assert dockerfile.pairs("P=$Q/r S='a b'", {"Q": "q"}) == {"P": "q/r", "S": "a b"}


def test_hadolint_has_nothing_to_say():
    """With its default rules."""
    run("hadolint", ROOT / "Dockerfile")


# compose.yaml


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_held_tight(name: str):
    """Except for the GPU exporter, whose counters need a capability."""
    service = COMPOSE["services"][name]
    if name == "gpu-exporter":
        assert service["cap_add"] == ["SYS_ADMIN"]
        return
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_a_bound_on_memory_and_processes(name: str):
    """One that grows or forks without end takes only itself down."""
    assert COMPOSE["services"][name]["mem_limit"]
    assert COMPOSE["services"][name]["pids_limit"]


def test_redis_is_reached_from_outside_only_when_asked(deployment: Path):
    """A second file opens the port, on loopback unless an address is given; users are the same."""
    files = ["-f", deployment / "compose.yaml", "-f", deployment / "compose.backend.yaml"]
    redis = yaml.safe_load(run("docker-compose", *files, "config"))["services"]["redis"]

    assert "ports" not in COMPOSE["services"]["redis"]
    assert [str(port) for port in redis["ports"]] == ["127.0.0.1:6379:6379/tcp"]
    assert set(redis["networks"]) == {"queue", "people"}
    assert (
        "user default on nopass resetkeys resetchannels -@all +ping"
        in (deployment / "secrets" / "users.acl").read_text()
    )


def test_the_network_of_uploads_is_closed_to_the_lan_and_to_metadata(tmp_path: Path):
    """The script adds a rule for each block, in both chains, once; it knows the bridge's name."""
    fake = tmp_path / "iptables"
    fake.write_text('#!/bin/sh\n[ "$1" = -C ] && exit 1\necho "$@" >> ' + f"{tmp_path}/rules\n")
    fake.chmod(0o755)
    script = [DEPLOY / "closed_network.sh"]
    subprocess.run(script, check=True, env={"IPTABLES": str(fake), "PATH": "/usr/bin:/bin"})
    rules = (tmp_path / "rules").read_text().splitlines()
    blocks = {rule.split(" -d ")[1].split()[0] for rule in rules}
    (bridge,) = COMPOSE["networks"]["outside"]["driver_opts"].values()

    assert all(f"-i {bridge} " in rule and rule.endswith("-j REJECT") for rule in rules)
    assert {rule.split()[1] for rule in rules} == {"DOCKER-USER", "INPUT"}
    assert {"10.0.0.0/8", "169.254.0.0/16", "168.63.129.16/32", "192.168.0.0/16"} <= blocks
    assert len(rules) == 2 * len(blocks)


def test_each_role_gets_its_own_secrets_and_the_network_it_needs():
    """Only services inside reach Redis; only those that fetch or push reach the internet."""
    services = COMPOSE["services"]
    secrets = {
        name: {each["source"] for each in service.get("secrets", ())}
        for name, service in services.items()
    }
    outside = {name for name, service in services.items() if "outside" in service["networks"]}

    assert secrets["worker-cpu"] == secrets["worker-gpu"] == {"worker_redis_url"}
    assert secrets["deliverer"] == {"deliverer_redis_url", "deliverer_webhook_secrets"}
    assert secrets["janitor"] == {"janitor_redis_url"}
    assert secrets["ralf"] == {"producer_redis_url"}
    assert secrets["build-engine"] == set()
    assert outside == {"worker-cpu", "worker-gpu", "deliverer"}
    assert COMPOSE["networks"]["queue"] == {"internal": True}


def test_redis_is_configured_as_the_page_asks():
    """Append-only, synced at each write, without eviction."""
    lines = (DEPLOY / "redis" / "redis.conf").read_text().splitlines()
    page = (ROOT / "docs" / "redis.md").read_text()
    asked = re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0].splitlines()

    assert [line for line in asked if line not in lines] == []
    assert "aclfile /run/secrets/users.acl" in lines


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    """A copy of deploy/ in which make_secrets.py has just run."""
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("secrets", "__pycache__"))
    subprocess.run([sys.executable, folder / "make_secrets.py"], check=True, capture_output=True)
    return folder


def test_docker_compose_reads_every_profile(deployment: Path):
    """Uses Debian's 1.29, the oldest version that is supported."""
    profiles = [word for name in ("cpu", "gpu", "tools") for word in ("--profile", name)]
    text = run("docker-compose", "-f", deployment / "compose.yaml", *profiles, "config")
    services: dict[str, Any] = yaml.safe_load(text)["services"]

    assert set(services) == set(COMPOSE["services"])
    assert services["worker-cpu"]["command"][:1] == ["worker"]
    assert services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    # Docker gives the values to whoever may inspect a container: there are only files' names.
    assert "redis://" not in text and "whsec_" not in text
    for name in ("worker-cpu", "worker-gpu", "deliverer", "janitor", "ralf"):
        for each in services[name]["secrets"]:
            file = Path(yaml.safe_load(text)["secrets"][each["source"]]["file"])
            assert file.read_text().startswith(("redis://", "*/default=whsec_"))
            setting = f"RALF_{each['target'].upper()}_FILE"
            assert services[name]["environment"][setting] == f"/run/secrets/{each['target']}"


def test_scripts_can_be_run_and_parse():
    """bash -n accepts them, and they are executable."""
    for script in DEPLOY.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        assert script.stat().st_mode & stat.S_IXUSR


def test_the_proof_asks_for_root_before_it_does_anything():
    """--help works for every user and starts nothing."""
    ran = subprocess.run(
        [sys.executable, DEPLOY / "prove_image.py", "--help"], capture_output=True, text=True
    )
    assert ran.returncode == 0
    assert "--work" in ran.stdout
