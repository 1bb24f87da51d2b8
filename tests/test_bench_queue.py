"""The queue's bench: a few jobs of each way, and a record that says what was measured."""

import json

from ralf.worker.bench.queue import record


def test_the_record_compares_the_three_ways():
    """Small: the figures are only there and sane; what they are is the bench's business."""
    made = json.loads(record(10, turns=2, latency_jobs=5, crowd=200).dump())

    assert made["theme"] == "queue"
    assert set(made["timings"]) == {
        *("run rq SimpleWorker", "run ralf", "run rq Worker"),
        *("enqueue rq", "enqueue rq many", "enqueue ralf submit_many"),
        "latency",
    }
    assert all(0 < one["median_s"] < 5 for one in made["timings"].values())
    assert [one["repeats"] for one in made["timings"].values()] == [2] * 6 + [5]
    assert made["ratios"]["Worker / ours"] > 0.5
    assert set(made["ratios"]) == {
        *("ours / SimpleWorker", "Worker / ours"),
        *("enqueue / submit_many", "enqueue_many / submit_many"),
    }
    fairness = made["facts"]["fairness"]
    assert (fairness["crowd"], fairness["few"]) == (200, 10)
    assert 20 <= fairness["served_until_the_few_ended"] <= 22
    assert made["facts"]["latency_ms"]["p50"] <= made["facts"]["latency_ms"]["p99"]
