"""Every shell and Python block of README and docs/ runs as printed, or says why it does not.

The word after ``` says what a block is: `sh` and `python` blocks run, in the order of the page, in
one folder that has the files which they name; `sh until=WORD` starts what lives on and waits until
it prints the word; `sh no-run=REASON` is only parsed (tests/test_docs.py), and listed here.
`bash` is a walk with a test of its own.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.clips import face_clip
from tests.ready_ralf import program
from tests.test_deliver import OLD
from tests.web import Web, reply, serving

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
KINDS = {"sh", "python", "bash", "text", "json", "yaml", "toml", "acl", "console", "html", "http"}
NOT_RUN = {
    ("README.md", "installs-packages"): 1,
    ("README.md", "takes-minutes"): 1,
    ("README.md", "takes-hours"): 1,
    ("docs/integration.md", "installs-packages"): 1,
    ("docs/integration.md", "needs-Redis-over-TCP"): 1,
    ("docs/models.md", "runs-until-stopped"): 1,
    ("docs/models.md", "takes-hours"): 3,
    ("docs/operations.md", "takes-minutes"): 2,
    ("docs/operations.md", "needs-Docker"): 2,
    ("docs/operations.md", "needs-a-cluster"): 3,
    ("docs/redis.md", "needs-Redis-over-TCP"): 1,
    ("docs/streams.md", "needs-a-camera"): 2,
    ("docs/training.md", "takes-hours"): 13,
    ("docs/webhooks.md", "runs-until-stopped"): 1,
}
"""Blocks that no test runs.  Take entries away; a new one needs a reason that a reader accepts."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    option: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether a reader runs it, and so this test."""
        return self.kind in {"sh", "python"} and not self.option.startswith("no-run=")


def blocks(page: str) -> list[Block]:
    """All of a page's, in order."""
    found, fence, start = [], "", 0
    lines = (ROOT / page).read_text().splitlines()
    for number, line in enumerate(lines):
        # In a list the fence stands under its item's text.
        if line.strip() == "```" and start:
            kind, _, option = fence.partition(" ")
            text = "\n".join(lines[start:number]) + "\n"
            found.append(Block(page, start, kind, option, text))
            start = 0
        elif not start and line.strip().startswith("```"):
            fence, start = line.strip()[3:], number + 1
    return found


@dataclass
class Desk:
    """Where a reader sits: a folder, an environment that `export` changes, what runs beside."""

    folder: Path
    environment: dict[str, str]
    shown: dict[str, str]
    """An address or a path in the documents → what stands for it here."""
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        """As a reader does; fails with what was printed."""
        text = block.text
        for printed, here in self.shown.items():
            text = text.replace(printed, here)
        if block.kind == "python":
            (self.folder / "block.py").write_text(text)
            text = "ralf block.py\n"
        if block.option.startswith("until="):
            self._start(text, block.option.removeprefix("until="))
            return
        state = self.folder / ".environment"
        script = f"set -eo pipefail\n{text}\nenv -0 > {state}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{block.page}:{block.line}\n{text}\n{done}"
        pairs = (entry.partition("=") for entry in state.read_text().split("\0") if entry)
        self.environment = {name: value for name, _, value in pairs}

    def _start(self, text: str, word: str) -> None:
        if text in self.running:
            return
        log = self.folder / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"],
                cwd=self.folder,
                env=self.environment,
                stderr=stderr,
            )
        self.running[text] = process
        end = time.monotonic() + 240
        while word not in log.read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert word in log.read_text(), f"{text}: {log.read_text()}"
        found = re.search(r"RALF_REDIS_URL=([\w:/.-]+)", log.read_text())
        for address in ("redis://queue:6379/0", "redis://producer:…@queue:6379/0"):
            self.shown[address] = found[1] if found else address

    def close(self) -> None:
        """End what runs beside."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(60)


@pytest.fixture(scope="module")
def web(place: Path) -> Iterator[Web]:
    """Serves the clip under any name, and takes webhooks."""
    clip = (place / "clip.mp4").read_bytes()
    with serving(lambda asked: reply(204) if asked.method == "POST" else reply(200, clip)) as web:
        yield web


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray) -> Path:
    """A folder with the files that the documents name."""
    folder = tmp_path_factory.mktemp("desk")
    face_clip(folder / "clip.mp4", [astronaut], 1.0, size=(320, 240), fps=8, face_height=0.7)
    for name in ("uploads/one.mp4", "demo/out/clips/forged.mp4"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(folder / "clip.mp4", folder / name)
    Image.fromarray(astronaut).save(folder / "portrait.jpg")
    (folder / "manifest.csv").write_text(f"uri\n{(folder / 'clip.mp4').as_uri()}\n")
    return folder


@pytest.fixture(scope="module")
def desk(place: Path, web: Web, tiny_models: Path) -> Iterator[Desk]:
    """A shell whose `ralf` starts at once, with a small model and leave to fetch from here."""
    socket = place / "ready"
    program(place / "bin", socket)
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("RALF_")}
    environment = {
        **quiet,
        "PATH": f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_RUNTIME_DIR": str(place),
        "OMP_NUM_THREADS": "1",
        "RALF_THREADS": "1",
        "RALF_MODELS_DIR": str(tiny_models),
        "RALF_MODEL": "tiny",
        "RALF_FILE_ROOTS": str(place),
        "RALF_ALLOW_PRIVATE_ADDRESSES": "1",
        "RALF_FETCH_PORTS": str(web.port),
        "RALF_WEBHOOK_SECRETS": f"*/default={OLD}",
    }
    shown = {
        "https://cdn.example/": f"{web.url}/",
        "https://example/": f"{web.url}/",
        # The one `ralf` that is here already.
        'export PATH="$PWD/.venv/bin:$PATH"': "",
    }
    ready = subprocess.Popen(
        [sys.executable, "-m", "tests.ready_ralf", str(socket)], cwd=ROOT, env=environment
    )
    at = Desk(place, environment, shown)
    try:
        while not socket.exists() and ready.poll() is None:
            time.sleep(0.05)
        yield at
    finally:
        at.close()
        ready.kill()
        ready.wait()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.runs for block in blocks(page))]
)
def test_the_blocks_of_a_page_run_as_printed(page: str, desk: Desk):
    """In order; a page that asks the queue and starts none uses the one that README starts."""
    if page != "README.md" and not desk.running:
        for block in blocks("README.md"):
            if block.option.startswith("until="):
                desk.run(block)
    for block in blocks(page):
        if block.runs:
            desk.run(block)


def test_the_list_of_blocks_that_no_test_runs_is_complete():
    """And names none that has begun to run."""
    not_run = Counter(
        (page, block.option.removeprefix("no-run="))
        for page in PAGES
        for block in blocks(page)
        if block.option.startswith("no-run=")
    )

    assert dict(not_run) == NOT_RUN


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_says_what_it_is(page: str):
    """No block is indented, where it could not say; none has an option that nobody knows."""
    lines = (ROOT / page).read_text().splitlines()
    fenced = {n for b in blocks(page) for n in range(b.line, b.line + b.text.count("\n"))}
    indented = [
        line
        for number, line in enumerate(lines)
        if line.startswith("    ") and not lines[number - 1].strip() and number not in fenced
    ]

    assert indented == []
    assert {block.kind for block in blocks(page)} <= KINDS
    if any(block.kind == "bash" for block in blocks(page)):
        assert page in "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    options = {block.option.partition("=")[0] for block in blocks(page)}
    assert options <= {"", "no-run", "until"}


def test_commands_for_docker_and_kubectl_name_files_services_and_profiles_that_exist():
    """They are not run, since both need more than a test has."""
    text = "\n".join(b.text for page in PAGES for b in blocks(page) if b.kind == "sh")
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    profiles = {name for service in compose.values() for name in service.get("profiles", ())}
    lines = [line for line in text.splitlines() if re.match(r"docker |kubectl ", line)]
    files = re.findall(r" -[fk] (deploy/\S+)", "\n".join(lines))
    stages = re.findall(
        r"^FROM .* AS (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.IGNORECASE
    )

    assert len(lines) > 8 and len(files) > 3
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert {name for line in lines for name in re.findall(r"--profile (\S+)", line)} <= profiles
    assert {name for line in lines for name in re.findall(r"run --rm (\S+)", line)} <= set(compose)
    assert set(re.findall(r"docker build --target (\S+)", text)) <= set(stages)
