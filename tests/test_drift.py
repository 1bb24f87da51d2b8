"""PSI against a case by hand and SciPy's entropies; windows that stay bounded."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from ralf.kernels.manifest import Reference
from ralf.worker import telemetry
from ralf.worker.drift import EDGES, KINDS, LEAST, WINDOW, Drift, Window, histogram, psi
from ralf.worker.service import messages
from ralf.worker.service.child_supervisor import ChildSupervisor
from ralf.worker.service.wakeup import Wakeup
from ralf.worker.telemetry import Metrics
from tests.documents import a_track, a_verdict

COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=20)


def test_the_index_is_what_a_hand_computes():
    """19.5 and 9.5 in place of 19 and 9 and so on: (20−10)/30 · ln 2 + (10−20)/30 · ln ½."""
    expected = (20 / 30 - 10 / 30) * math.log(2) + (10 / 30 - 20 / 30) * math.log(0.5)

    assert expected == pytest.approx(psi([19.5, 9.5], [9.5, 19.5]))
    assert 0.46209812 == pytest.approx(expected)


@given(COUNTS, COUNTS)
def test_the_index_is_both_divergences_of_scipy(late: list[int], reference: list[int]):
    """KL(a‖e) + KL(e‖a) of the smoothed shares; symmetric, never negative, 0 for the same."""
    size = min(len(late), len(reference))
    late, reference = late[:size], reference[:size]
    a, e = np.array(late) + 0.5, np.array(reference) + 0.5

    assert entropy(a, e) + entropy(e, a) == pytest.approx(psi(late, reference), abs=1e-9)
    assert psi(late, reference) == pytest.approx(psi(reference, late))
    assert psi(late, reference) >= 0
    assert psi(late, late) == 0


def test_histograms_of_other_bins_are_refused():
    """They do not compare."""
    with pytest.raises(ValueError, match="3, 2 bins"):
        psi([1, 2, 3], [1, 2])


@given(st.lists(st.floats(0, 1), max_size=50))
def test_the_histogram_is_numpys(scores: list[float]):
    """An edge belongs to the bin above it."""
    expected, _ = np.histogram(scores, bins=[-1, *EDGES, 2])

    assert expected.tolist() == histogram(scores)


def test_a_window_forgets_what_is_old():
    """Its counts are those of the last WINDOW scores, whatever came before."""
    scores = np.random.default_rng(0).uniform(size=3 * WINDOW)
    window = Window(reference=tuple([1] * (len(EDGES) + 1)))
    for score in scores:
        window.add(float(score))

    assert histogram(scores[-WINDOW:].tolist()) == window.counts
    assert WINDOW == len(window.late)


def fed(drift: Drift, scores: np.ndarray, model: str = "ralf@1") -> list[float | None]:
    """The index after each score."""
    return [drift.observe(model, "torch", float(score)) for score in scores]


def test_without_a_reference_the_first_scores_are_it():
    """Quiet for the same spread, loud for another; silent while there is too little."""
    random = np.random.default_rng(1)
    drift = Drift()
    first = fed(drift, random.beta(1, 20, WINDOW + LEAST - 1))
    same = fed(drift, random.beta(1, 20, WINDOW))
    moved = fed(drift, random.beta(2, 5, WINDOW))

    assert {None} == set(first)
    assert same[0] is not None
    assert same[-1] < 0.1
    assert moved[-1] > 0.25


def test_the_manifests_reference_counts_from_the_first_score():
    """And its own edges do; learning it anew changes nothing, another begins anew."""
    drift = Drift()
    drift.set_reference("ralf@1", [0.5], [900, 100])
    low = fed(drift, np.full(LEAST, 0.1))
    high = fed(drift, np.full(WINDOW, 0.9))

    assert [None, psi([LEAST, 0], [900, 100])] == [low[-2], pytest.approx(low[-1])]
    assert psi([0, WINDOW], [900, 100]) == pytest.approx(high[-1])
    drift.set_reference("ralf@1", [0.5], [900, 100])
    assert fed(drift, np.array([0.9]))[0] is not None
    drift.set_reference("ralf@1", [0.5], [100, 900])
    assert fed(drift, np.array([0.9]))[0] is None


def test_memory_is_bounded_whatever_the_models():
    """The windows that were used last stay."""
    drift = Drift()
    for number in range(3 * KINDS):
        drift.set_reference(f"ralf@{number}", [0.5], [1, 1])
        fed(drift, np.full(LEAST, 0.1), f"ralf@{number}")

    assert KINDS == len(drift._windows) == len(drift._references)
    assert fed(drift, np.array([0.1]), f"ralf@{3 * KINDS - 1}")[0] is not None


def test_verdicts_move_the_gauge_of_their_version_and_engine():
    """From the reference that the child told with its facts; its own for each engine."""
    metrics = Metrics()
    child: Any = ChildThatIsReady
    ChildSupervisor(child, Wakeup(), metrics).publish_facts()
    verdict = a_verdict([a_track([0.9, 0.95, 0.97])])
    for _ in range(LEAST):
        telemetry._count(verdict, metrics)
    made = verdict.made
    labels = {"model": made.model, "version": made.version, "engine": made.engine}

    expected = psi([0, LEAST], [900, 100])
    assert expected == pytest.approx(metrics.registry.get_sample_value("ralf_score_psi", labels))
    refused = {"role": "canary", "model": "ralf@12345678"}
    assert 1.0 == metrics.registry.get_sample_value("ralf_model_refused", refused)


class ChildThatIsReady:
    """A child that sent a reference."""

    pid = 0
    made = a_verdict().made
    ready = messages.Ready(
        facts=messages.EngineFacts(
            references={f"{made.model}@{made.version}": Reference(edges=(0.5,), counts=(900, 100))},
            refused=(messages.RefusedModel(role="canary", model="ralf@12345678", why="x"),),
        )
    )

    @staticmethod
    def rss() -> int:
        """Of nobody."""
        return 0
