"""Each recipe, whole: it trains, is killed, goes on, is published, and `ralf scan` says its logits.

At 32 pixels and with one small backbone for all; what a recipe is made of stays: its network, loss,
sampler of frames, optimiser, average and schedule.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ralf.__main__ import main
from ralf.kernels.networks import build
from ralf.kernels.registry import point_to
from ralf.train.loop.checkpoint import LAST, judged, load, weights
from ralf.train.loop.loop import Options, train
from ralf.train.publish.version import publish_run
from ralf.train.recipe import Recipe
from ralf.train.recipes import RECIPES
from ralf.worker.contract import Sampling
from ralf.worker.media.crops import cut
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.mtcnn import Mtcnn
from ralf.worker.media.probe import probe
from ralf.worker.media.types import Clip
from ralf.worker.settings import Settings
from tests.test_loop import lines, same_tensors
from tests.training import MadeBatch, MadeBatches, tiny

# At this size these are fdfl and rcl; the reconstructor alone makes no detector.
NAMES = sorted(RECIPES.keys() - {"fdfl_small", "masked_backbone", "rcl_small", "reconstructor"})
QUIET, EAGER = Options(quiet=True), Options(quiet=True, save_every_s=0)
FRAMES = 3


pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """What no part of the loop may catch, as it cannot catch a SIGKILL."""


class Killing(MadeBatches):
    """Ends the run when a batch is asked for: nothing is saved on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(only=0)
        self.killed_at = number

    def __getitem__(self, number: int) -> MadeBatch:
        if number == self.killed_at:
            raise Killed
        return super().__getitem__(number)


def go(recipe: Recipe, run: Path, killed_at: int | None = None) -> None:
    """Train, to the end or until killed; that one saves after every step."""
    batches = MadeBatches(only=0) if killed_at is None else Killing(killed_at)
    options = QUIET if killed_at is None else EAGER
    train(recipe, batches, None, run, data_sha256="d" * 64, options=options)


def served(models: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> np.ndarray:
    """Logits behind the faces that `ralf scan --json` lists; the model is not calibrated."""
    command = ["scan", str(clip), "--model", "made", "--models", str(models), "--json", "--quiet"]
    assert main([*command, "--device", "cpu", "--max-frames", str(FRAMES)]) == 0
    verdict = json.loads(capsys.readouterr().out)
    score = np.array([s["score"] for track in verdict["tracks"] for s in track["samples"]])
    return np.sort(np.log(score / (1 - score)))


def expected(run: Path, clip: Path) -> np.ndarray:
    """The checkpoint's own weights on the same faces, without any artifact between."""
    checkpoint = load(judged(run))
    recipe = checkpoint.recipe
    network = build(recipe.network.build, **recipe.network.dimensions)
    network.load_state_dict(weights(checkpoint))
    asked = Sampling(**recipe.data.input.sampling.model_dump() | {"max_frames": FRAMES})
    (frames,) = PyavDecoder(2**28).decode([Clip(probe(clip, Settings()), asked)])
    faces = Mtcnn(recipe.data.input.finder).find(frames)
    with torch.no_grad():
        logits = network.eval()(cut(frames, faces, recipe.data.input))
    return np.sort(logits.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_goes_from_a_batch_to_a_served_logit(
    name: str, tmp_path: Path, clip_of_two: Path, capsys: pytest.CaptureFixture[str]
):
    """Overfits; killed and resumed it ends with the same bits; scan gives the run's logits."""
    # Fifteen steps from random weights are too few for running statistics to settle.
    changes = {"schedule.steps": "15", "optimiser.lr": "3e-3", "optimiser.norms": "batch"}
    recipe = tiny(name, **changes)
    go(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        go(recipe, tmp_path / "killed", killed_at=11)
    reached = load(tmp_path / "killed" / LAST).state.step
    go(recipe, tmp_path / "killed")

    logged = lines(tmp_path / "whole", "train")
    assert logged[0]["bce"] > 0.4
    assert logged[-1]["bce"] < 0.1
    assert 11 == reached
    assert same_tensors(tmp_path / "whole" / LAST, tmp_path / "killed" / LAST)

    artifact = publish_run(tmp_path / "killed", "made", tmp_path / "models")
    point_to(tmp_path / "models", "made", artifact.version)
    found = served(tmp_path / "models", clip_of_two, capsys)
    own = expected(tmp_path / "killed", clip_of_two)
    assert 2 * FRAMES == len(own) == len(found)
    assert np.ptp(own) > 0
    np.testing.assert_allclose(found, own, atol=0.03)
