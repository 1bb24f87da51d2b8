"""One frozen Settings, read once from the environment.

Each field is the environment variable RALF_<FIELD IN CAPITALS>; `ralf doctor` prints them all
with their values. A value that does not parse is an error that names the variable.

RALF_<FIELD IN CAPITALS>_FILE names a file that holds the value instead, for secrets: a process's
environment can be read by others of its user, and by whoever may inspect its container.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

GIB = 1024**3
FROM_FILE = "_FILE"
GPU = Path("/dev/nvidiactl")
"""Exists where NVIDIA's driver is loaded, and in the containers that get a GPU."""
CHILD: Mapping[str, bool] = {"child": True}
"""Marks a field that the child process reads too: no address, no secret, no bucket."""


class SettingsError(ValueError):
    """An environment variable holds what its field cannot take."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator may change without touching code."""

    # where things are
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_ca_file: str = ""
    """Certificates (PEM) that a rediss: address is checked with; empty means the system's."""
    redis_wait_replicas: int = 0
    """A submission is answered, and a verdict counts as kept, once so many replicas have it."""
    redis_prefix: str = "ralf:"
    models_dir: str = field(default="", metadata=CHILD)
    """Where published models lie; empty means the models/ folder that ships with the code."""
    model: str = field(default="ralf-small", metadata=CHILD)
    shadow: str = field(default="", metadata=CHILD)
    """A version that scores a share of the jobs as well; only the promoted one's verdict counts."""
    shadow_share: float = field(default=0.1, metadata=CHILD)
    canary: str = field(default="", metadata=CHILD)
    """VERSION:tenant-a,tenant-b or VERSION:5%: whose verdicts come from a version not promoted."""
    work_dir: str = ""
    """Fetched files and the child's socket; empty means a private folder under the system's."""

    # what confines the child that decodes uploads
    sandbox: Literal["auto", "required", "off"] = field(default="auto", metadata=CHILD)
    """auto: all that this host allows; required: a worker does not start where something is
    missing; off: no seccomp filter and no Landlock, for a profiler or a debugger."""
    sandbox_read: tuple[str, ...] = field(default=(), metadata=CHILD)
    """Further folders that the child may read, such as those of packages outside Python's path."""

    # the device
    device: str = field(default="auto", metadata=CHILD)
    threads: int = field(default=0, metadata=CHILD)
    """CPU threads of the child; 0 means one per core available."""
    decoder: str = field(default="auto", metadata=CHILD)
    """On a GPU: auto sends each clip to the decoder that finishes first; pyav or dali pins one."""
    gpu_chunk_bytes: int = field(default=512 * 1024**2, metadata=CHILD)
    """Bytes of one clip's decoded pixels at once in a GPU's memory; several get four times it."""

    # what is refused before decoding
    max_bytes: int = field(default=2 * GIB, metadata=CHILD)
    max_seconds: float = field(default=4 * 3600.0, metadata=CHILD)
    max_width: int = field(default=8192, metadata=CHILD)
    max_height: int = field(default=4320, metadata=CHILD)
    max_still_pixels: int = field(default=120_000_000, metadata=CHILD)
    """Of one picture that `ralf scan` takes: cameras have 48 or 108 million.  One of more than
    max_width × max_height is reduced before faces are searched.  Pillow's limit is 178,956,970."""
    max_frame_rate: float = field(default=300.0, metadata=CHILD)
    max_streams: int = field(default=64, metadata=CHILD)
    max_frames: int = field(default=300, metadata=CHILD)
    """The most frames that any job may ask to sample."""
    max_tracks: int = field(default=16, metadata=CHILD)
    max_decode_pixels: int = field(default=250_000_000_000, metadata=CHILD)
    """The most pixels that one job may decode for its sampled frames: some ten minutes of two
    cores.  Few bytes can hold many large pictures, so max_bytes is no bound of this work."""

    # bounds of one walk
    chunk_bytes: int = field(default=64 * 1024**2, metadata=CHILD)
    """Bytes of decoded pixels at once: ten frames of 1080p.  Progress is reported per chunk."""

    plan_public_key: str = field(default="", metadata=CHILD)
    """Ed25519 keys (PEM): a TensorRT plan that none of them signed is not loaded; empty: all."""
    plan_signing_key: str = ""
    """The key (PEM) with which `ralf build` and `ralf models verify` sign; no worker needs it."""

    find_every: int = field(default=1, metadata=CHILD)
    """Faces are searched in each Nth frame and interpolated between (worker/media/stride.py);
    verdicts with more than 1 are marked uncalibrated."""

    # one job's time: clamp(base + per_second * seconds of video, least, most)
    timeout_base_s: float = field(default=60.0, metadata=CHILD)
    timeout_per_video_s: float = field(default=0.5, metadata=CHILD)
    timeout_least_s: float = field(default=120.0, metadata=CHILD)
    timeout_most_s: float = field(default=1800.0, metadata=CHILD)

    # retries, crashes
    retries: int = 2
    retry_delays_s: tuple[float, ...] = (15.0, 120.0)
    quarantine_after: int = 2
    tenant_running_max: int = 0
    """Jobs that one tenant may have with workers at once. 0: no cap, for a cap leaves workers idle
    when only one tenant has jobs; the order of the queue and fetch_least_rate bound a tenant."""
    fair_over_s: float = 60.0
    """How fast a tenant's use of the workers is forgotten; who used much waits for others."""
    child_max_jobs: int = 500
    """A child is replaced after so many jobs; 0: never."""
    shared_child_max_jobs: int = 20_000
    """The same for a child that several workers share, over the jobs of all: to load a model onto a
    GPU takes long, and at five clips a second 500 jobs are 100 s."""
    # Of the child's first resident size: a larger child is replaced between two jobs, which bounds
    # a slow leak.
    child_max_rss_ratio: float = 1.5
    child_max_rss: int = field(default=0, metadata=CHILD)
    """Bytes; above it a child is killed in the middle of a job. 0 means 80 % of the memory."""
    child_start_timeout_s: float = 120.0
    child_start_gpu_timeout_s: float = 900.0
    """The same on a GPU, where a network without a plan is compiled, for minutes, before its child
    is ready: behind the running jobs no compiler can be started (docs/operations.md, Security)."""
    hang_s: float = 60.0
    """A child that reports no progress for so long, inside one job, is taken for hung."""
    heartbeat_s: float = 10.0
    # A job's lease: it is renewed each second, and RQ's record of the worker each heartbeat.
    heartbeat_ttl_s: float = 20.0
    grace_s: float = 25.0
    """After SIGTERM a job may run on for so long before it is handed back."""
    cancel_grace_s: float = 2.0
    """What a cancelled job gets to stop by itself before its child is killed."""
    reclaim_after_s: float = 15.0
    janitor_every_s: float = 3.0

    # how long things are kept
    token_ttl_s: int = 7 * 86400
    job_ttl_s: int = 30 * 86400
    verdict_ttl_s: int = 30 * 86400
    evidence_ttl_s: int = 7 * 86400
    session_ttl_s: int = 86400
    crash_ttl_s: int = 7 * 86400
    stream_max_len: int = 100_000
    # Redis evicts nothing (noeviction): without bounds these two would fill its memory.
    dead_letters_max: int = 10_000
    quarantine_max: int = 10_000
    """Above these the oldest dead letter or quarantined job is dropped."""

    # fetching and delivering
    file_roots: tuple[str, ...] = ()
    """Folders that file: URIs may name: tenant=/folder, or /folder for everyone; none means that
    file: is refused by the service."""
    allow_private_addresses: bool = False
    """Only for a closed network of your own and for tests: lifts the SSRF guard."""
    fetch_hosts: tuple[str, ...] = ()
    """If not empty, only these hosts (or .suffixes) may be fetched from."""
    fetch_ports: tuple[int, ...] = (80, 443)
    fetch_timeout_s: float = 300.0
    fetch_least_rate: int = 32_768
    """Bytes a second, over any 30 s: a slower download is broken off and tried again; 0: none."""
    fetch_redirects: int = 3
    buckets: tuple[str, ...] = ()
    """Allowed buckets as tenant=scheme://bucket; the tenant * is everyone."""
    s3_endpoint: str = ""
    gs_endpoint: str = ""
    # Standard Webhooks asks for 15 to 30 s.
    webhook_timeout_s: float = 20.0
    webhook_delays_s: tuple[float, ...] = (
        5.0,
        300.0,
        1800.0,
        7200.0,
        18000.0,
        36000.0,
        50400.0,
        72000.0,
        86400.0,
    )
    """Between one attempt at a push and the next: ten attempts over some 75 hours."""
    webhook_secrets: tuple[str, ...] = ()
    """tenant/secret_id=whsec_…; the tenant * is everyone; the same twice: both sign (rotation)."""
    # Standard Webhooks recommends bodies below 20 kB.
    webhook_max_body: int = 20_000

    # watching
    http_host: str = "127.0.0.1"
    http_port: int = 0
    """/metrics, /healthz and /readyz; 0 turns them off."""

    # `ralf serve --http`
    http_token: str = ""
    """What callers send as `Authorization: Bearer`; needed where other machines can reach it."""
    http_names: tuple[str, ...] = ()
    """Host names under which it is called, beside addresses and localhost."""
    http_uploads: str = ""
    """Where uploads lie until their verdict; empty: in --data, else a private folder that is
    removed at the end."""
    http_uploads_at_once: int = 8
    http_uploads_bytes: int = 20 * GIB
    """All uploads together; above it no further one is taken."""
    http_upload_ttl_s: int = 86400
    """After so long an upload is deleted; its job is cancelled if it has not ended."""
    http_queue_max: int = 100
    """While so many jobs wait, none is taken over HTTP."""
    log_level: str = field(default="info", metadata=CHILD)
    log_format: str = field(default="auto", metadata=CHILD)

    def time_allowed(self, seconds: float) -> float:
        """How long a clip of so many seconds may take; 0 is a length that is not known yet."""
        if seconds <= 0:
            return self.timeout_most_s
        wanted = self.timeout_base_s + self.timeout_per_video_s * seconds
        return min(max(wanted, self.timeout_least_s), self.timeout_most_s)

    def start_allowed(self) -> float:
        """How long a child may take to load its model."""
        # Not by torch, which a worker process never imports.
        on_gpu = self.device.startswith("cuda") or (self.device == "auto" and GPU.exists())
        return self.child_start_gpu_timeout_s if on_gpu else self.child_start_timeout_s

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Read RALF_* once; unknown RALF_ names are refused so that a typo cannot hide."""
        env = os.environ if environment is None else environment
        hints = get_type_hints(cls)
        known = {f"RALF_{f.name.upper()}": f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in values_of(env).items():
            if name in known:
                values[known[name]] = _parse(name, text, hints[known[name]])
            elif name.startswith("RALF_") and not name.startswith("RALF_X_"):
                near = ", ".join(sorted(known))
                raise SettingsError(f"{name} is not a setting of Ralf; known: {near}")
        return cls(**values)

    def to_environment(self, *, child: bool = False) -> dict[str, str]:
        """The variables from which from_environment() reads these settings; child: only its own."""
        return {
            f"RALF_{part.name.upper()}": _text(getattr(self, part.name))
            for part in fields(self)
            if part.metadata.get("child") or not child
        }


def values_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, with the content of its file in place of each RALF_…_FILE."""
    values, known = dict(environment), {f"RALF_{f.name.upper()}" for f in fields(Settings)}
    for name, path in environment.items():
        setting = name.removesuffix(FROM_FILE)
        # RALF_REDIS_CA_FILE is a setting itself.
        if name in known or setting == name or setting not in known:
            continue
        if setting in environment:
            raise SettingsError(f"{setting} and {name} are both set; keep one of them")
        try:
            values[setting] = Path(values.pop(name)).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SettingsError(f"{name} should name a file to read, got {path}: {why}") from None
    return values


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def _parse(name: str, text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in {"1", "true", "yes", "on"}:
            return True
        if text.lower() in {"0", "false", "no", "off", ""}:
            return False
        raise SettingsError(f"{name} should be 1 or 0, got {text!r}")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise SettingsError(f"{name} should be {kind.__name__}, got {text!r}") from None
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise SettingsError(f"{name} should be {' or '.join(get_args(kind))}, got {text!r}")
    inner = kind.__args__[0]
    return tuple(_parse(name, part.strip(), inner) for part in text.split(",") if part.strip())
