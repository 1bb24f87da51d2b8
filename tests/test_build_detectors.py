"""Every detector builds a TensorRT-RTX plan without a GPU, and so does an ensemble of them."""

import os
from pathlib import Path

import pytest

from ralf.kernels import plans
from ralf.kernels.artifact import Artifact
from ralf.kernels.build import BuildRequest, build
from ralf.train.publish.ensemble import publish_ensemble
from tests.test_ensemble import member

if os.environ.get("REQUIRE_RTX") != "1":
    pytest.importorskip("tensorrt_rtx", reason="the extra build is not installed")
    pytest.importorskip("onnxruntime", reason="the extra build is not installed")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(900)]


def planned(artifact: Artifact) -> plans.Plan:
    """Its plan, made ahead of time."""
    order = BuildRequest(
        artifact, precision="fp16", buckets=(1, 2), crops=2, say=lambda _line: None
    )
    return build(order, "rtx-aot")


@pytest.mark.parametrize("name", ["blocks", "centre"])
def test_a_detector_builds_a_plan_on_a_cpu(name: str, tmp_path: Path):
    """FDFL, and the classifier that the RCL-inspired recipe trains: checked, not yet run."""
    plan = planned(member(tmp_path, name))

    assert ("unverified", (1, 2)) == (plan.record.state, plan.record.buckets)
    assert plan.record.error["golden"] <= plan.record.error["budget"]


def test_an_ensemble_builds_one_plan(tmp_path: Path):
    """All its members in one graph with one logit a face."""
    both = [member(tmp_path, name) for name in ("forest", "blocks")]
    plan = planned(publish_ensemble(both, "duo", tmp_path))

    assert "unverified" == plan.record.state
    assert len(plan.read()) > 2 * 3_800_000
