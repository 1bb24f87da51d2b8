"""Which version scores a job: promoted, canary, shadow or pinned; and their settings."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ralf.worker.errors import BadRequest, ModelUnavailable
from ralf.worker.service import models
from ralf.worker.service.child_process import ChildProcess
from ralf.worker.service.messages import Ready
from ralf.worker.service.models import Canary, LoadedModels, Rollout, drawn
from ralf.worker.settings import Settings, SettingsError
from tests.documents import a_job, a_verdict

VERSION = "3f9c2a1b"


def rollout(**settings: object) -> Rollout:
    """From the settings of a worker whose model is ralf-small."""
    return Rollout.of(Settings(**settings))  # type: ignore[arg-type]


def test_nothing_is_asked_by_default():
    """No canary, no shadow."""
    assert Rollout(shadow_share=0.1) == rollout()
    assert not rollout().shadows("j1")


def test_a_share_is_a_share_and_a_draw_is_for_good():
    """Within three standard deviations of 10,000 draws; who is in at 5 % is in at 20 %."""
    names = [f"job-{number}" for number in range(10_000)]
    few = {name for name in names if drawn("s", name, 0.05)}
    more = {name for name in names if drawn("s", name, 0.2)}

    assert abs(len(few) - 500) < 3 * (10_000 * 0.05 * 0.95) ** 0.5
    assert abs(len(more) - 2000) < 3 * (10_000 * 0.2 * 0.8) ** 0.5
    assert few <= more
    assert few == {name for name in names if drawn("s", name, 0.05)}
    assert few != {name for name in names if drawn("another", name, 0.05)}


def test_the_ends_of_a_share_are_none_and_all():
    """Exactly."""
    names = [str(number) for number in range(1000)]

    assert [0, 1000] == [sum(drawn("s", name, share) for name in names) for share in (0, 1)]


def test_a_canary_is_tenants_by_name_or_by_share():
    """Both name the version in full."""
    named = rollout(canary=f"{VERSION}:tenant-a, tenant-b").canary
    shared = rollout(canary=f"other@{VERSION}:100%").canary

    assert Canary(f"ralf-small@{VERSION}", frozenset({"tenant-a", "tenant-b"})) == named
    assert [True, False] == [named.takes(tenant) for tenant in ("tenant-b", "tenant-c")]
    assert Canary(f"other@{VERSION}", share=1.0) == shared
    assert shared.takes("anybody")


def test_a_shadow_is_a_version_of_the_workers_model():
    """Pinned or not; another model by its own name."""
    share = {"shadow": VERSION, "shadow_share": 1.0}

    assert f"ralf-small@{VERSION}" == rollout(**share).shadow
    assert f"ralf-small@{VERSION}" == rollout(**share, model="ralf-small@00000000").shadow
    assert "ralf@12345678" == rollout(shadow="ralf@12345678").shadow
    assert rollout(**share).shadows("j1")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"canary": VERSION}, "RALF_CANARY should be VERSION:tenant-a"),
        ({"canary": f"{VERSION}:"}, "RALF_CANARY should be VERSION:tenant-a"),
        ({"canary": f"{VERSION}:101%"}, "RALF_CANARY should be VERSION:tenant-a"),
        ({"canary": "latest:tenant-a"}, "RALF_CANARY should name a version"),
        ({"shadow": "../../etc"}, "RALF_SHADOW should name a version"),
        ({"shadow": VERSION, "model": "/models/tiny"}, "NAME@VERSION where RALF_MODEL is a path"),
        ({"shadow_share": 1.5}, "from 0 to 1, got 1.5"),
        ({"shadow_share": float("nan")}, "from 0 to 1, got nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, object], why: str):
    """At the start, not at the first job."""
    with pytest.raises(SettingsError, match=why):
        rollout(**settings)


class Published:
    """A models folder as far as LoadedModels sees it, and what was loaded from it."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.broken: set[str] = set()
        self.unreadable = False
        self.refused_plans: dict[str, tuple[str, ...]] = {}
        self.loads: list[str | None] = []

    def promoted(self, settings: Settings) -> str | None:
        """What `current` names."""
        if self.unreadable:
            raise OSError("current is a folder")
        return self.version

    def load(self, settings: Settings, model: str | None) -> Any:
        """Parts that know their own version."""
        self.loads.append(model)
        name, _, version = (model or settings.model).partition("@")
        version = version or self.version
        if version in self.broken:
            raise ModelUnavailable(f"{version} fails its golden check")
        manifest = SimpleNamespace(name=name, reference=None)
        engine = SimpleNamespace(name="torch", precision="fp32", device="cpu")
        return SimpleNamespace(
            artifact=SimpleNamespace(version=version, manifest=manifest),
            engine=engine,
            decoder=SimpleNamespace(name="pyav"),
            refused_plans=self.refused_plans.get(version, ()),
        )


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """Version aaaaaaaa, looked for at each job."""
    monkeypatch.setattr(models, "CHECK_EVERY_S", 0.0)
    return Published("aaaaaaaa")


def shelved(published: Published, **settings: Any) -> LoadedModels:
    """Models loaded from it."""
    made = LoadedModels(
        replace(Settings(), **settings),
        load=published.load,
        promoted=published.promoted,
        start=lambda work: work(),
    )
    made.open()
    return made


def version_of(made: LoadedModels, model: str | None = None, tenant: str = "default") -> str:
    """The version that a job is walked with."""
    asked = {"model": model, "tenant": tenant}
    parts: Any = made.of(a_job("j").model_copy(update=asked))
    return str(parts.artifact.version)


def test_a_promotion_is_followed_between_two_jobs(published: Published):
    """Loaded beside the old one, then in its place."""
    made = shelved(published)
    assert made.follow() is None
    published.version = "bbbbbbbb"
    facts = made.follow()

    assert facts is not None
    assert facts.version == "bbbbbbbb"
    assert version_of(made) == "bbbbbbbb"


def test_a_promoted_model_that_does_not_load_leaves_the_old_one(
    published: Published, monkeypatch: pytest.MonkeyPatch
):
    """Told, not tried again and again, and tried again later: the reason may have passed."""
    made = shelved(published)
    published.version, published.broken = "bbbbbbbb", {"bbbbbbbb"}
    told, again = made.follow(), made.follow()
    assert told is not None
    assert [("promoted", "ralf-small@bbbbbbbb", "bbbbbbbb fails its golden check")] == [
        (each.role, each.model, each.why) for each in told.refused
    ]
    assert (None, "aaaaaaaa", "aaaaaaaa") == (again, told.version, version_of(made))
    assert published.loads.count("ralf-small@bbbbbbbb") == 1
    monkeypatch.setattr(models, "RETRY_S", 0.0)
    published.version = "cccccccc"
    published.broken = {"cccccccc"}
    assert made.follow() is not None
    published.broken = set()
    healed = made.follow()
    assert healed is not None
    assert ("cccccccc", ()) == (healed.version, healed.refused)


def test_a_refused_version_is_forgotten_once_the_old_one_is_promoted_again(published: Published):
    """The metric goes down, and promoting the mended version is followed at once."""
    made = shelved(published)
    published.version, published.broken = "bbbbbbbb", {"bbbbbbbb"}
    made.follow()
    published.version, published.broken = "aaaaaaaa", set()
    told = made.follow()
    assert told is not None
    assert ((), "aaaaaaaa") == (told.refused, told.version)
    published.version = "bbbbbbbb"
    assert version_now(made) == "bbbbbbbb"


def test_jobs_go_on_with_the_old_version_while_the_new_one_loads(published: Published):
    """And one that was promoted away meanwhile is not put in place."""
    late: list[Callable[[], None]] = []
    made = LoadedModels(
        Settings(), load=published.load, promoted=published.promoted, start=late.append
    )
    made.open()
    published.version = "bbbbbbbb"
    assert [made.follow(), made.follow()] == [None, None]
    assert (version_of(made), len(late)) == ("aaaaaaaa", 1)
    published.version = "cccccccc"
    late.pop()()
    made.follow()
    assert version_of(made) == "aaaaaaaa"
    made.follow()
    late.pop()()
    assert version_now(made) == version_of(made) == "cccccccc"


def test_a_current_file_that_does_not_read_leaves_the_old_one(published: Published):
    """It is somebody's mistake, and no reason to stop serving."""
    made = shelved(published)
    published.unreadable = True
    assert [made.follow(), version_of(made)] == [None, "aaaaaaaa"]
    published.version, published.unreadable = "bbbbbbbb", False
    assert version_now(made) == "bbbbbbbb"


def test_a_canary_serves_its_tenants_until_it_is_promoted(published: Published):
    """Its verdicts say so; a pin of another version is obeyed; promoted, it is loaded once."""
    made = shelved(published, canary="bbbbbbbb:acme,other")
    assert version_of(made) == "aaaaaaaa"
    assert version_of(made, tenant="acme") == version_of(made, "ralf-small", "acme") == "bbbbbbbb"
    assert version_of(made, "ralf-small@aaaaaaaa", "acme") == "aaaaaaaa"
    told = warnings_of(made, "bbbbbbbb")
    assert [True] == ["ralf-small@bbbbbbbb is not promoted" in text for text in told]
    assert () == warnings_of(made, "aaaaaaaa")
    published.version = "bbbbbbbb"
    made.follow()
    assert (version_of(made), warnings_of(made, "bbbbbbbb")) == ("bbbbbbbb", ())
    assert published.loads == [None, "ralf-small@bbbbbbbb"]


def test_a_canary_that_does_not_load_leaves_its_tenants_to_the_promoted_one(published: Published):
    """Loudly; the worker serves."""
    published.broken = {"bbbbbbbb"}
    made = LoadedModels(
        replace(Settings(), canary="bbbbbbbb:acme"),
        load=published.load,
        promoted=published.promoted,
    )

    assert ["canary"] == [each.role for each in made.open().refused]
    assert version_of(made, tenant="acme") == "aaaaaaaa"


def test_a_plan_that_is_not_signed_is_told_and_stops_nothing(published: Published):
    """By metric and readiness: the version is served, only by torch."""
    published.refused_plans = {"aaaaaaaa": ("rtx1.4 is not loaded: it is not signed",)}
    made = LoadedModels(Settings(), load=published.load, promoted=published.promoted)
    facts = made.open()
    child = ChildProcess(Settings())
    child.ready = Ready(facts=facts)

    assert "aaaaaaaa" == version_of(made)
    assert [("plan", "ralf-small@aaaaaaaa")] == [(each.role, each.model) for each in facts.refused]
    said = child.confinement()
    child.close()

    assert "REFUSED: plan ralf-small@aaaaaaaa: rtx1.4 is not loaded" in said


def test_a_shadow_sees_its_share_of_the_promoted_ones_jobs(published: Published):
    """Not a canary's, not a pinned job's, and none once it is promoted itself."""
    made = shelved(published, shadow="bbbbbbbb", shadow_share=1.0, canary="cccccccc:acme")
    job = a_job("j")
    served = made.of(job)
    shadow: Any = made.shadow_of(job, served)
    assert "bbbbbbbb" == shadow.artifact.version
    canaried = job.model_copy(update={"tenant": "acme"})
    assert made.shadow_of(canaried, made.of(canaried)) is None
    assert made.shadow_of(job, None) is None
    published.version = "bbbbbbbb"
    made.follow()
    assert made.shadow_of(job, made.of(job)) is None


def warnings_of(made: LoadedModels, version: str) -> tuple[str, ...]:
    """What is added to a verdict by that version."""
    verdict = a_verdict()
    by = verdict.made.model_copy(update={"model": "ralf-small", "version": version})
    verdict = verdict.model_copy(update={"made": by, "warnings": ()})
    return made.marked(verdict, a_job("j")).warnings


def test_a_pinned_setting_is_not_followed(published: Published):
    """Who names a version wants that version."""
    made = shelved(published, model="ralf-small@aaaaaaaa")
    published.version = "bbbbbbbb"

    assert made.follow() is None
    assert version_of(made) == "aaaaaaaa"


def test_a_job_may_pin_a_model_which_stays_loaded(published: Published):
    """The last one; the worker's own is never dropped for it."""
    made = shelved(published)
    assert [version_of(made, "ralf-small@dddddddd") for _ in range(3)] == ["dddddddd"] * 3
    assert version_of(made, "ralf-small") == version_of(made) == "aaaaaaaa"
    assert published.loads == [None, "ralf-small@dddddddd"]


def test_a_pin_that_cannot_be_loaded_is_the_jobs_fault(published: Published):
    """bad_request, never retried; not a crash of the child."""
    made = shelved(published)
    published.broken = {"dddddddd"}

    with pytest.raises(BadRequest, match="golden check"):
        version_of(made, "ralf-small@dddddddd")


def version_now(made: LoadedModels) -> str:
    """After a check for a promotion that changed something."""
    facts = made.follow()
    assert facts is not None
    return facts.version
