"""The gate before a plan is published: how far logits may be, and which decisions must agree."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ralf.kernels import artifact as models
from ralf.kernels.artifact import Artifact, Golden
from ralf.kernels.manifest import Calibration
from ralf.kernels.verify import AgreementCheck, Disagrees, decided_otherwise, thresholds, variations
from tests.test_artifact import DRAFT, GOLDEN, contents

LIMIT = math.log(0.7 / 0.3)


def score(crops: np.ndarray) -> np.ndarray:
    """A reference: the mean pixel, from about -4 to 4."""
    return ((crops.mean((1, 2, 3)) - 128) / 32).astype(np.float32)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A model whose golden logits are that reference's."""
    crops = np.stack([np.full((3, 32, 32), level, np.uint8) for level in range(20, 240, 20)])
    budget = {"error_budget": {"logit": 0.1, "logit_fp16": 0.05}, "thresholds": {"fpr_0.05": 0.7}}
    files = {**contents(), "golden.npz": Golden(crops, score(crops)).to_bytes()}
    return models.publish(tmp_path, DRAFT.model_copy(update=budget), files)


def test_an_engine_within_the_budget_passes_and_is_measured(artifact: Artifact):
    """Error on the golden crops, spread on the random ones."""
    gate = AgreementCheck(artifact, score, count=40)
    agreement = gate.run("a plan", lambda crops: score(crops) + np.float32(0.03), "fp16")

    assert 0.03 == pytest.approx(agreement.error, abs=1e-5)
    assert 0.03 == pytest.approx(agreement.spread, abs=1e-5)
    assert (0.05, 40) == (agreement.budget, agreement.decisions)


@pytest.mark.parametrize(("precision", "passes"), [("fp16", False), ("fp32", True)])
def test_the_budget_is_that_of_the_precision(artifact: Artifact, precision, passes):
    """0.05 for FP16 here, 0.1 for all else; beyond it the message has both numbers."""
    gate = AgreementCheck(artifact, score, count=8)
    if passes:
        assert gate.run("a plan", lambda crops: score(crops) + np.float32(0.08), precision)
        return
    with pytest.raises(Disagrees, match=r"11 golden crops differ by 0\.0800, budget 0\.0500"):
        gate.run("a plan", lambda crops: score(crops) + np.float32(0.08), precision)


def test_an_engine_right_on_golden_crops_and_wrong_elsewhere_is_refused(artifact: Artifact):
    """What overfits the golden file is not an engine."""
    gate = AgreementCheck(artifact, score, count=40)

    def overfit(crops: np.ndarray) -> np.ndarray:
        return score(crops) if len(crops) == 11 else -score(crops)

    with pytest.raises(Disagrees, match=r"decides \d+ of 40 random crops otherwise"):
        gate.run("a plan", overfit, "fp16")


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_engine_that_gives_no_number_is_refused(artifact: Artifact, wrong: float):
    """On golden crops or on others."""
    gate = AgreementCheck(artifact, score, count=8)
    with pytest.raises(Disagrees, match="differ by inf"):
        gate.run("a plan", lambda crops: score(crops) * np.float32(wrong), "fp16")
    with pytest.raises(Disagrees, match="otherwise than the FP32 module"):
        gate.run(
            "a plan",
            lambda crops: score(crops) if len(crops) == 11 else score(crops) * wrong,
            "fp16",
        )


def test_the_reference_answers_once(artifact: Artifact):
    """However many engines are asked: it is the slow one."""
    asked: list[int] = []
    gate = AgreementCheck(artifact, lambda crops: asked.append(len(crops)) or score(crops), count=6)
    for _ in range(3):
        gate.run("a plan", score, "fp16")

    assert [6] == asked


def test_thresholds_are_logits_behind_the_calibration(artifact: Artifact):
    """P = sigmoid((logit − shift) / temperature), solved for the logit; 0.5 where none is held."""
    fitted = Calibration(temperature=2.0, shift=-0.5)
    held = artifact.manifest.model_copy(
        update={"calibration": fitted, "thresholds": {"fpr_0.05": 0.7, "low": 0.2, "never": 1.0}}
    )
    expected = [2 * math.log(p / (1 - p)) - 0.5 for p in (0.2, 0.7)]

    assert expected == pytest.approx(thresholds(held))
    assert [-0.5] == thresholds(held.model_copy(update={"thresholds": {}}))
    assert [LIMIT] == pytest.approx(thresholds(artifact.manifest))


LOGITS = arrays(np.float32, 20, elements=st.floats(-4, 4, width=32))


@given(LOGITS, LOGITS, st.floats(0, 1))
def test_only_firm_decisions_count_as_flipped(expected, noise, margin):
    """Noise within the margin never flips; each crop is counted once."""
    limits = [-1.0, 0.0, LIMIT]
    near = expected + np.clip(noise, -1, 1) * np.float32(margin * 0.99)
    flipped, contested = decided_otherwise(expected, near, limits, margin + 1e-5)

    assert 0 == flipped
    flipped, contested = decided_otherwise(expected, noise, limits, margin)
    sides = (np.digitize(expected, limits) != np.digitize(noise, limits)).sum()
    assert sides == flipped + contested


def test_variations_are_many_different_and_the_same_each_time():
    """u8 crops of the same size; no two alike, none blank."""
    made = variations(GOLDEN.crops, 30)

    assert (np.uint8, (30, 3, 32, 32)) == (made.dtype, made.shape)
    assert (made == variations(GOLDEN.crops, 30)).all()
    assert 30 == len({crop.tobytes() for crop in made})
    assert made.reshape(30, -1).std(1).min() > 1
