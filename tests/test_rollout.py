"""Draws by hash, and settings that say what is wrong with them."""

import pytest

from ralf.worker.service.rollout import Canary, Rollout, drawn
from ralf.worker.settings import Settings, SettingsError

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
