"""The model that comes with the code: whole, small, described truly, and better than chance."""

import re
from pathlib import Path

import numpy as np
import pytest

from demo.samples import Truth, make_samples
from ralf.kernels.artifact import SHIPPED, Artifact, golden, resolve
from ralf.kernels.choose_engine import load
from ralf.kernels.registry import events
from ralf.worker.contract import Verdict
from ralf.worker.pipeline import analyze
from ralf.worker.runtime import load as load_parts
from ralf.worker.settings import Settings

NAME = Settings().model
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def shipped() -> Artifact:
    return resolve(SHIPPED, NAME)


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> dict[str, tuple[Truth, Verdict]]:
    """The demo's clips and what the model says of them."""
    folder = tmp_path_factory.mktemp("samples")
    parts = load_parts(Settings(threads=1, models_dir=str(SHIPPED)))
    return {
        clip.file: (clip, analyze(folder / clip.file, parts)[0]) for clip in make_samples(folder)
    }


def test_it_is_whole_and_fits_into_git(shipped: Artifact):
    """Every hash; one version; under 25 MB."""
    shipped.verify()

    files = [path for path in shipped.path.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25_000_000
    assert [shipped.path] == [path for path in shipped.path.parent.iterdir() if path.is_dir()]
    assert not shipped.manifest.untrained


def test_it_says_what_its_golden_crops_say(shipped: Artifact):
    """The engine proves itself on this machine, to the error budget."""
    stored = golden(shipped)
    import torch

    said = load(shipped, "cpu")(torch.from_numpy(stored.crops)).numpy()
    apart = np.abs(said - stored.logits)

    assert apart.max() < shipped.manifest.error_budget["logit"]
    assert stored.logits[len(said) // 2 :].mean() > stored.logits[: len(said) // 2].mean()


def test_its_card_tells_what_was_measured(shipped: Artifact):
    """Every figure of the manifest's, data with its licence, and what it is not for."""
    card = shipped.file("card.md").read_text()

    for name, value in shipped.manifest.metrics.items():
        if isinstance(value, list):
            assert f"| {name} | {value[0]:.4g} |" in card
    for part in ("public domain", "## Where it fails", "## Not for", "fitted on made clips"):
        assert part in card
    assert {"fpr_0.05", "low"} <= shipped.manifest.thresholds.keys()


def test_the_samples_are_judged_rightly_and_with_margin(judged, shipped: Artifact):
    """At the model's own thresholds: a tenth of the scale between each score and the other side."""
    threshold = shipped.manifest.thresholds["fpr_0.05"]
    wanted = {"forged": "likely_forged", "authentic": "likely_authentic", "no_faces": "no_faces"}

    assert {name: v.label for name, (_, v) in judged.items()} == {
        name: wanted[truth.label] for name, (truth, _) in judged.items()
    }
    for truth, verdict in judged.values():
        if truth.faces:
            above = verdict.score - threshold
            assert (above if truth.label == "forged" else -above) > 0.1
    (_, two) = judged["two_faces.mp4"]
    assert [track.score > threshold for track in two.tracks] == [False, True]


def test_the_forged_twin_scores_far_above_the_untouched(judged):
    """The same person, motion and encoder; only the blending differs."""
    (_, authentic), (_, forged) = judged["authentic.mp4"], judged["forged.mp4"]

    assert forged.label == "likely_forged"
    assert forged.score - authentic.score > 0.3


def test_a_folder_without_it_is_a_clear_error(tmp_path: Path):
    """What was sought, what is there, what to do."""
    with pytest.raises(Exception, match=rf"no model '{NAME}'"):
        load_parts(Settings(models_dir=str(tmp_path)))


def test_what_its_sealed_card_cannot_say_is_said_beside_it(shipped: Artifact):
    """A promotion by force stands in the history, on the page beside it, and in README."""
    folder = shipped.path.parent
    (promoted,) = [each for each in events(folder) if each.version == shipped.version]
    beside, readme = (folder / "README.md").read_text(), (ROOT / "README.md").read_text()

    if promoted.remark.startswith("forced past"):
        assert shipped.version in beside and "promoted by force" in beside.lower()
        assert "promoted by force" in " ".join(readme.split())
        for figure in re.findall(r"came (.*?);", promoted.remark)[0].split(", "):
            assert figure.rsplit(" ", 1)[1] in beside
