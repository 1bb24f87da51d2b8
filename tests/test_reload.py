"""Another version while a worker runs: real Redis, real child, tiny models on the CPU.

One worker for all of it: promoted one, another with the same weights, one whose golden crops lie,
a canary for one tenant and a shadow that scores everything.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ralf.kernels import artifact as models
from ralf.kernels import registry
from ralf.kernels.artifact import Artifact
from ralf.kernels.manifest import Calibration
from ralf.worker.contract import Job, Media, Sampling, Verdict
from ralf.worker.service.connection import connect
from ralf.worker.service.processes import as_environment
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.redis_server import RedisServer
from tests.web import free_port, get

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 240.0
"""For a machine that does much else; nothing here takes a tenth of it on one that does not."""
NAME = "moving"


@dataclass
class Site:
    """A running worker, its store and its models."""

    settings: Settings
    store: Store
    models: Path
    clip: Path
    log: Path
    versions: dict[str, Artifact]
    process: "subprocess.Popen[bytes]"
    submitted: int = field(default=0)

    def submit(self, count: int, tenant: str = "plain") -> list[str]:
        """So many jobs that look at four frames of the clip."""
        made = []
        for _ in range(count):
            self.submitted += 1
            made.append(
                Job(
                    job_id=f"j{self.submitted}",
                    token=f"t{self.submitted}",
                    tenant=tenant,
                    media=Media(uri=self.clip.as_uri()),
                    sampling=Sampling(max_frames=4),
                    submitted_at=datetime.now(UTC),
                )
            )
        self.store.submit(made)
        return [job.job_id for job in made]

    def verdicts(self, jobs: list[str]) -> list[Verdict]:
        """Each job's, once all have one."""
        self.until(lambda: all(self.store.verdict(job_id) for job_id in jobs))
        return [verdict for job_id in jobs if (verdict := self.store.verdict(job_id))]

    def until(self, there: Callable[[], Any]) -> None:
        """Wait for it."""
        end = time.monotonic() + PATIENCE_S
        while not there():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def metrics(self) -> str:
        """What Prometheus would read."""
        return get(self.settings.http_port, "/metrics")[1]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of that event, the child's too."""
        lines = (line for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def promote(self, which: str) -> str:
        """Make it current; its version."""
        return registry.point_to(self.models, NAME, self.versions[which].version).version


def make_versions(folder: Path, tiny: Artifact) -> dict[str, Artifact]:
    """The tiny network under manifests that differ, and one whose golden logits are not its own."""
    files: dict[str, bytes | Path] = {name: tiny.read(name) for name in tiny.manifest.files}
    own = models.golden(tiny)
    lie = {"golden.npz": models.Golden(own.crops, own.logits + 1).to_bytes()}
    trusted = {"name": NAME, "untrained": False, "thresholds": {"fpr_0.05": 0.01}}
    shifted = {"calibration": Calibration(shift=1.0), "thresholds": {"fpr_0.05": 0.999999}}

    def publish(card: str, changed: dict[str, Any], others: dict[str, bytes]) -> Artifact:
        draft = tiny.manifest.model_copy(update=trusted | changed)
        return models.publish(folder, draft, files | {"card.md": card.encode()} | others)

    return {
        "first": publish("first", {}, {}),
        "second": publish("second", {}, {}),
        "liar": publish("liar", {}, lie),
        "canary": publish("canary", {}, {}),
        "shadow": publish("shadow", shifted, {}),
    }


@pytest.fixture(scope="module")
def site(
    tiny_models: Path, clip_of_two: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The worker, its first job done."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "work").mkdir()
    versions = make_versions(folder / "models", models.resolve(tiny_models, "tiny"))
    registry.point_to(folder / "models", NAME, versions["first"].version)
    server = RedisServer()
    server.start()
    settings = replace(
        Settings(),
        redis_url=server.url,
        models_dir=str(folder / "models"),
        model=NAME,
        work_dir=str(folder / "work"),
        file_roots=(str(clip_of_two.parent),),
        threads=1,
        child_start_timeout_s=PATIENCE_S,
        hang_s=PATIENCE_S,
        http_port=free_port(),
        log_format="json",
        canary=f"{versions['canary'].version}:acme,other",
        shadow=versions["shadow"].version,
        shadow_share=1.0,
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ralf", "worker"],
            env=as_environment(settings, os.environ | {"OMP_NUM_THREADS": "1"}),
            cwd=ROOT,
            stderr=log,
        )
    store = Store(connect(server.url), settings)
    try:
        made = Site(
            settings, store, folder / "models", clip_of_two, folder / "log", versions, process
        )
        made.verdicts(made.submit(1))
        yield made
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        store.redis.close()
        server.stop()


def test_a_promotion_under_load_loses_no_job_and_changes_no_score(site: Site):
    """Each verdict names its version; there is one switch, between two jobs; scores stay."""
    first, second = site.versions["first"].version, site.versions["second"].version
    jobs = site.submit(4)
    site.until(lambda: site.store.verdict(jobs[0]))
    site.promote("second")
    while second not in {verdict.made.version for verdict in site.verdicts(jobs)[-4:]}:
        jobs += site.submit(4)
    verdicts = sorted(site.verdicts(jobs), key=lambda verdict: verdict.finished_at)
    made = [verdict.made.version for verdict in verdicts]
    scores = [verdict.score for verdict in verdicts]
    budget = site.versions["first"].manifest.error_budget["logit"]

    assert {"succeeded"} == {getattr(site.store.status(job), "state", None) for job in jobs}
    assert [first] * made.count(first) + [second] * made.count(second) == made
    assert made.count(first) > 0
    logits = [math.log(score / (1 - score)) for score in scores if score is not None]
    assert len(jobs) == len(logits)
    assert max(logits) - min(logits) <= budget
    assert f'version="{second}"' in site.metrics()


def test_a_bad_version_is_refused_loudly_and_the_old_one_goes_on(site: Site):
    """Logged and shown as a metric until it is no longer promoted; no job notices."""
    second = site.promote("second")
    site.until(lambda: site.verdicts(site.submit(1))[0].made.version == second)
    liar = site.promote("liar")
    shown = f'ralf_model_refused{{model="{NAME}@{liar}",role="promoted"}} 1.0'
    site.until(lambda: shown in site.metrics())

    assert [second] * 3 == [verdict.made.version for verdict in site.verdicts(site.submit(3))]
    assert f'version="{second}"' in site.metrics()
    (refused,) = [e for e in site.events("model.refused") if e["model"] == f"{NAME}@{liar}"]
    assert "golden crops differ by" in refused["error"]
    registry.rollback(site.models, NAME)
    site.until(lambda: "ralf_model_refused{" not in site.metrics())


def test_a_canarys_tenants_get_its_verdicts_which_say_so(site: Site):
    """Nobody else does."""
    canary = site.versions["canary"].version
    theirs, others = site.submit(2, "acme"), site.submit(2, "plain")

    for verdict in site.verdicts(theirs):
        assert canary == verdict.made.version
        assert any(text.startswith(f"canary_model: {NAME}@{canary}") for text in verdict.warnings)
    for verdict in site.verdicts(others):
        assert canary != verdict.made.version
        assert not any(text.startswith("canary_model") for text in verdict.warnings)


def test_a_shadow_scores_what_the_promoted_one_does_and_says_nothing(site: Site):
    """Its calibration is shifted by one: the log and the metrics show by how much it differs."""
    (job,) = site.submit(1)
    (verdict,) = site.verdicts([job])

    def compared() -> list[dict[str, Any]]:
        return [event for event in site.events("shadow.compared") if event["job_id"] == job]

    site.until(compared)
    (found,) = compared()
    assert verdict.score is not None
    expected = 1 / (1 + math.exp(1 - math.log(verdict.score / (1 - verdict.score))))
    assert f"{NAME}@{site.versions['shadow'].version}" == found["shadow"]
    assert expected == pytest.approx(found["shadow_score"], abs=2e-6)
    assert verdict.score - expected == pytest.approx(found["difference"], abs=2e-6)
    assert ("likely_forged", "likely_forged") != (found["label"], found["shadow_label"])
    assert found["label"] == verdict.label
    assert site.versions["shadow"].version != verdict.made.version
    counted = f'ralf_shadow_jobs_total{{result="disagreed",shadow="{site.settings.shadow}"}}'
    site.until(lambda: counted in site.metrics())


def test_versions_that_a_running_worker_holds_are_not_collected(site: Site):
    """The canary and the shadow are neither promoted nor new; the liar is held by nobody."""
    fates = {
        place.version: place.kept for place in registry.collect(site.models, NAME, keep=0, recent=0)
    }

    held = "held by a running process"
    assert (held, held, "") == tuple(
        fates[site.versions[which].version] for which in ("canary", "shadow", "liar")
    )
