"""Settings: read once from the environment, typed, and refused by name."""

from dataclasses import fields

import pytest

from ralf.worker.settings import Settings, SettingsError


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


def test_every_setting_has_a_plain_default():
    """`ralf doctor` can show them all."""
    assert [] == [part.name for part in fields(Settings) if getattr(Settings(), part.name) is None]
