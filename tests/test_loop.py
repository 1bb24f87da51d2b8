"""The loop: it learns, it can be killed, and what it ends with can be had again to the bit."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from ralf.kernels.artifact import ArtifactError
from ralf.kernels.networks.backbones import NetworkError
from ralf.train.data.batches import Batches
from ralf.train.loop.checkpoint import BEST, LAST, CheckpointError, load
from ralf.train.loop.distributed import ALONE, Compute
from ralf.train.loop.initial_weights import make_network
from ralf.train.loop.loop import Options, TrainingOutcome, train
from ralf.train.loop.optimise import MovingAverage, computed_in, optimiser, rate
from ralf.train.loop.run_log import RunLog
from ralf.train.loop.step import Diverged, Stepper
from ralf.train.loop.validate import judge_validation
from ralf.train.losses.objective import Moment, Objective, disagreement
from ralf.train.publish.version import publish_run
from ralf.train.recipe import Optimiser, Recipe, Schedule
from ralf.train.recipe_text import RecipeError
from tests.faces_on_disk import faces
from tests.training import Halves, MadeBatch, MadeBatches, StubRalf, environment, tiny

DATA = "d" * 64
QUIET = Options(quiet=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def stub_run(
    run: Path, *, options: Options = QUIET, network: nn.Module | None = None, **changes: Any
) -> TrainingOutcome:
    """Train the stub with RALF's whole loss."""
    batches = changes.pop("batches", MadeBatches())
    validation = changes.pop("validation", [MadeBatches()[100]])
    if network is None:
        torch.manual_seed(1)
        network = StubRalf()
    recipe = tiny("ralf", **changes)
    return train(
        recipe, batches, validation, run, data_sha256=DATA, options=options, network=network
    )  # fmt: skip


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    """The log's lines of one kind."""
    every = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in every if line["event"] == event]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits under the same names."""
    left, right = load(one).tensors, load(other).tensors
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_learnt_holds_on_faces_not_seen(tmp_path: Path):
    """On pictures of other numbers the validation AUC goes to one."""
    changes = {
        "schedule.steps": "150",
        "optimiser.lr": "1e-2",
        "weight_con": "0",
        "patience": "none",
    }

    outcome = stub_run(tmp_path, **changes)

    assert outcome.validation is not None
    assert outcome.validation.auc > 0.95
    assert outcome.state.best is not None and outcome.state.best > 0.95


def test_two_runs_are_the_same_run(tmp_path: Path):
    """Same recipe, same data: same bits."""
    stub_run(tmp_path / "one", **{"schedule.steps": "6"})
    stub_run(tmp_path / "other", **{"schedule.steps": "6"})

    assert same_tensors(tmp_path / "one" / LAST, tmp_path / "other" / LAST)


KILLED = """
import sys
import time
from pathlib import Path
import torch
from tests.training import MadeBatches, tiny
from ralf.train.loop.loop import Options, train
torch.set_num_threads(1)

class NoLast(MadeBatches):  # the test that kills it may be slow: it must not finish before
    def __getitem__(self, number):
        if number == 6:
            time.sleep(600)
        return super().__getitem__(number)

recipe = tiny("ralf_small", **{"schedule.steps": "7"})
train(recipe, NoLast(), [MadeBatches()[100]], Path(sys.argv[1]), data_sha256="d" * 64,
      options=Options(quiet=True, save_every_s=0))
"""


def test_a_run_killed_in_the_middle_ends_with_the_same_bits(tmp_path: Path):
    """SIGKILL between two steps or in one: network, average, moments, centre, rival, all."""
    recipe = tiny("ralf_small", **{"schedule.steps": "7"})
    run = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(run)], env=environment())
    try:
        deadline_s = time.monotonic() + 400
        while not ((run / LAST).exists() and load(run / LAST).state.step >= 2):
            assert child.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    reached = load(run / LAST).state.step
    assert 2 <= reached < 7

    def go(where: Path) -> TrainingOutcome:
        return train(
            recipe, MadeBatches(), [MadeBatches()[100]], where, data_sha256=DATA, options=QUIET
        )  # fmt: skip

    resumed, whole = go(run), go(tmp_path / "whole")

    assert (resumed.ending, whole.ending) == ("finished", "finished")
    assert same_tensors(tmp_path / "whole" / LAST, run / LAST)
    assert same_tensors(tmp_path / "whole" / BEST, run / BEST)
    for state in (resumed.state, whole.state):
        assert (state.step, state.faces) == (7, 56)
    assert resumed.state.best == whole.state.best
    steps = [line["step"] for line in lines(run, "train")]
    assert sorted(set(steps)) == steps


def test_a_centre_that_moves_by_epochs_survives_a_stop_within_one(tmp_path: Path):
    """Its running sums are part of the state."""
    changes = {"loss.centre": "epoch", "loss.alpha": "one", "schedule.steps": "9"}
    stub_run(tmp_path / "whole", **changes)
    stop_at(6, tmp_path / "cut", **changes)

    stub_run(tmp_path / "cut", **changes)

    centre = load(tmp_path / "whole" / LAST).tensors["loss.centre.position"]
    assert centre.abs().sum() > 0
    assert same_tensors(tmp_path / "whole" / LAST, tmp_path / "cut" / LAST)


class Stopping(MadeBatches):
    """Sends this process a signal when a batch is asked for."""

    def __init__(self, number: int, sent: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.number, self.sent = number, sent

    def __getitem__(self, number: int) -> MadeBatch:
        if number == self.number:
            os.kill(os.getpid(), self.sent)
        return super().__getitem__(number)


def stop_at(step: int, run: Path, **changes: Any) -> TrainingOutcome:
    """Train until so many steps are done, then SIGTERM."""
    return stub_run(run, batches=Stopping(step - 1), **changes)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_between_two_steps(tmp_path: Path, sent: signal.Signals):
    """The step in hand is finished and saved, and the handlers are put back."""
    before = signal.getsignal(sent)

    outcome = stub_run(tmp_path, batches=Stopping(4, sent), **{"schedule.steps": "50"})

    assert outcome.ending == "interrupted"
    assert (outcome.state.step, load(tmp_path / LAST).state.finished) == (5, False)
    assert before == signal.getsignal(sent)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path):
    """For the impatient; the last checkpoint stands."""

    class Twice(Stopping):
        def __getitem__(self, number: int) -> MadeBatch:
            if number == self.number:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(number)

    with pytest.raises(KeyboardInterrupt):
        stub_run(tmp_path, batches=Twice(2, signal.SIGINT), **{"schedule.steps": "50"})


def test_a_run_off_the_main_thread_takes_no_signals(tmp_path: Path):
    """Python allows handlers only there."""
    outcomes: list[TrainingOutcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(stub_run(tmp_path, **{"schedule.steps": "2"}))
    )
    thread.start()
    thread.join()

    assert outcomes[0].ending == "finished"


def test_out_of_time_leaves_a_whole_checkpoint_and_the_next_command_goes_on(tmp_path: Path):
    """Two commands end where one would."""
    changes = {"schedule.steps": "8"}
    spent = dataclasses.replace(QUIET, minutes=1.0, started_s=time.monotonic() - 61)

    first = stub_run(tmp_path / "cut", options=spent, **changes)

    assert (first.ending, first.state.step) == ("out_of_time", 0)
    soon = dataclasses.replace(QUIET, minutes=1.0, started_s=time.monotonic() - 59.9)
    second = stub_run(tmp_path / "cut", options=soon, **changes)
    assert second.ending in ("out_of_time", "finished")
    third = stub_run(tmp_path / "cut", **changes)
    assert third.ending == "finished"
    stub_run(tmp_path / "whole", **changes)
    assert same_tensors(tmp_path / "whole" / LAST, tmp_path / "cut" / LAST)


def test_a_finished_run_does_nothing_more(tmp_path: Path):
    """The same command again neither trains nor validates."""
    stub_run(tmp_path, **{"schedule.steps": "3"})
    before = load(tmp_path / LAST)

    again = stub_run(tmp_path, **{"schedule.steps": "3"})

    assert (again.ending, again.validation) == ("finished", None)
    assert before.state == load(tmp_path / LAST).state


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path):
    """It says what differs, and trains nothing."""
    stub_run(tmp_path, **{"schedule.steps": "2"})

    with pytest.raises(CheckpointError, match=r"optimiser\.lr"):
        stub_run(tmp_path, **{"schedule.steps": "2", "optimiser.lr": "0.5"})


def test_two_added_batches_are_one_of_twice_the_faces(tmp_path: Path):
    """Every term is a mean over pairs or classes, so halves add up; the rival steps later, so it is
    left out here."""
    changes = {"weight_adv": "0", "schedule.steps": "4", "optimiser.kind": "sgd"}
    stub_run(tmp_path / "whole", batches=MadeBatches(), **changes)
    halves = Halves(MadeBatches())

    stub_run(tmp_path / "added", batches=halves, **changes, **{"optimiser.accumulate": "2"})

    one, other = load(tmp_path / "whole" / LAST), load(tmp_path / "added" / LAST)
    for name, tensor in one.part("network").items():
        torch.testing.assert_close(other.part("network")[name], tensor, rtol=1e-4, atol=1e-6)
    assert one.state.faces == other.state.faces == 32


RANKED = """
import sys
from pathlib import Path
import torch
from ralf.kernels.networks.backbones import NetworkError
from tests.training import Halves, MadeBatches, StubRalf, tiny
from ralf.train.loop.loop import Options, train
from ralf.train.loop.distributed import joined
torch.set_num_threads(1)
with joined(torch.device("cpu")) as ranks:
    assert ranks.world == 2
    torch.manual_seed(1)
    recipe = tiny("ralf", **{"schedule.steps": "8"})
    validation = [MadeBatches()[100], MadeBatches()[101], MadeBatches(6)[102]]
    train(recipe, Halves(MadeBatches()), validation, Path(sys.argv[1]), data_sha256="d" * 64,
          ranks=ranks, network=StubRalf(), options=Options(quiet=True, save_every_s=0))
"""


def test_two_processes_train_what_one_does_on_twice_the_faces(tmp_path: Path):
    """torchrun over gloo: gradients, centre, rival, validation and random states of both."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    said = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path / "two")],
        env=environment() | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=450,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    validation = [MadeBatches()[100], MadeBatches()[101], MadeBatches(6)[102]]

    stub_run(tmp_path / "one", validation=validation, **{"schedule.steps": "8"})

    one, two = load(tmp_path / "one" / LAST), load(tmp_path / "two" / LAST)
    assert (len(one.random), len(two.random)) == (1, 2)
    # The rival has batch norm, whose statistics are each process's own: it may drift a little,
    # and reaches the network at a hundredth.
    for name, tensor in one.part("network").items():
        torch.testing.assert_close(two.part("network")[name], tensor, rtol=2e-2, atol=2e-4)
    torch.testing.assert_close(
        two.tensors["loss.centre.position"],
        one.tensors["loss.centre.position"],
        rtol=1e-3,
        atol=1e-4,
    )
    assert one.state.faces == two.state.faces == 64
    figures = [lines(tmp_path / run, "validation")[-1] for run in ("one", "two")]
    assert [each["faces"] for each in figures] == [22, 22]
    assert figures[0]["bce"] == pytest.approx(figures[1]["bce"], rel=1e-2)


def test_batches_from_other_processes_are_the_same_batches(tmp_path: Path):
    """Workers change the speed and nothing else, random states included."""
    stub_run(tmp_path / "here", **{"schedule.steps": "3"})

    workers = dataclasses.replace(QUIET, workers=1)
    stub_run(tmp_path / "there", options=workers, **{"schedule.steps": "3"})

    assert same_tensors(tmp_path / "here" / LAST, tmp_path / "there" / LAST)
    assert load(tmp_path / "here" / LAST).random == load(tmp_path / "there" / LAST).random


class Poisoned(StubRalf):
    """Its logit is NaN from the third forward pass in training on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def trace(self, crops: Tensor) -> Any:
        """As the stub's."""
        trace = super().trace(crops)
        if self.training and torch.is_grad_enabled():
            self.passes += 1
        return trace._replace(logit=trace.logit * (float("nan") if self.passes > 2 else 1.0))


def test_a_nan_stops_the_run_and_keeps_the_evidence(tmp_path: Path):
    """Batch, weights, terms by name; the last checkpoint is from before."""
    options = dataclasses.replace(QUIET, save_every_s=0)

    with pytest.raises(Diverged, match=r"step 2: the terms total, bce") as raised:
        stub_run(tmp_path, options=options, network=Poisoned(), **{"schedule.steps": "5"})

    folder = tmp_path / "diverged-000002-rank0"
    assert str(folder) in str(raised.value)
    assert torch.equal(MadeBatches()[2].crops, load_file(folder / "batch.safetensors")["0.crops"])
    facts = json.loads((folder / "facts.json").read_text())
    assert MadeBatches()[2].ids == facts["ids"][0]
    assert {"total", "bce"} == set(facts["terms_not_finite"])
    assert "classifier.0.weight" in facts["gradients_not_finite"]
    assert facts["weights_not_finite"] == []
    last = load(tmp_path / LAST)
    assert last.state.step == 2
    for name, tensor in load_file(folder / "network.safetensors").items():
        assert torch.equal(last.part("network")[name], tensor)


def test_a_run_stops_early_on_validation_alone_and_keeps_its_best(tmp_path: Path):
    """With a rate of almost nothing no validation is better than the first."""
    changes = {
        "patience": "2", "epochs": "20", "optimiser.lr": "1e-12", "optimiser.ema": "none",
        "select": "auc",
    }  # fmt: skip

    outcome = stub_run(tmp_path, **changes)

    assert (outcome.ending, outcome.state.step, outcome.state.best_step) == ("stopped_early", 12, 4)
    assert load(tmp_path / BEST).state.step == 4
    assert load(tmp_path / LAST).state.finished


def test_the_best_weights_are_those_that_were_judged(tmp_path: Path):
    """The moving average's, not the network's own."""
    stub_run(tmp_path, **{"schedule.steps": "4", "optimiser.ema": "0.5"})
    best, last = load(tmp_path / BEST), load(tmp_path / LAST)

    for name, tensor in last.part("average").items():
        assert torch.equal(best.part("network")[name], tensor)
    assert not torch.equal(best.tensors["network.mask"], last.tensors["network.mask"])
    assert {"network"} == {name.split(".")[0] for name in best.tensors}


def test_a_validation_is_scikit_learns_figure():
    """AUC, cross entropy, and each family against all reals."""
    torch.manual_seed(2)
    network = StubRalf()
    batches = [MadeBatches()[n] for n in range(3)]
    crops = torch.cat([b.crops for b in batches])
    forged = torch.cat([b.forged for b in batches]).numpy()
    family = torch.cat([b.family for b in batches]).numpy()

    said = judge_validation(network, None, batches, Compute(torch.device("cpu")))

    logit = network(crops).detach().double().numpy()
    assert said.auc == pytest.approx(roc_auc_score(forged, logit))
    assert said.bce == pytest.approx(log_loss(forged, 1 / (1 + np.exp(-logit))), rel=1e-6)
    for each in (0, 1):
        kept = ~forged | (family == each)
        assert said.family_auc[f"family_{each}"] == pytest.approx(
            roc_auc_score(forged[kept], logit[kept])
        )
    assert network.training


def test_a_validation_of_one_class_is_refused():
    """An AUC of it would mean nothing."""
    batch = dataclasses.replace(MadeBatches()[0], forged=torch.zeros(8, dtype=torch.bool))

    with pytest.raises(ValueError, match="real and forged"):
        judge_validation(StubRalf(), None, [batch], Compute(torch.device("cpu")))


def test_the_rate_warms_up_and_falls_along_a_cosine():
    """Never zero at the first step; half-way down in the middle; the floor at the end."""
    schedule = Schedule(warmup=0.1, floor=0.01)

    rates = [rate(schedule, step, 100) for step in range(100)]

    assert rates[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.01 + 0.99 / 2)
    assert rates[99] == pytest.approx(0.01, abs=0.001)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    constant = Schedule(shape="constant", warmup=0)
    assert {1.0} == {rate(constant, step, 7) for step in range(7)}


def test_the_optimiser_is_given_the_schedules_rate(tmp_path: Path):
    """DeepfakeBench's never was."""
    stub_run(
        tmp_path,
        weight_con="0",
        **{"schedule.steps": "40", "warmup": "0.25", "optimiser.lr": "0.01"},
    )

    rates = {line["step"]: line["lr"] for line in lines(tmp_path, "train")}

    schedule = tiny("ralf", warmup="0.25").schedule
    for step in (1, 20, 40):
        assert rates[step] == pytest.approx(0.01 * rate(schedule, step - 1, 40))


def test_the_moving_average_is_one():
    """With its early decay, of floating tensors; counters are copied."""
    layer = nn.BatchNorm1d(2)
    average = MovingAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.num_batches_tracked.fill_(7)

    average.follow(layer, 0)
    assert average.state["weight"].tolist() == pytest.approx([0.1 * 1 + 0.9 * 3] * 2)
    average.follow(layer, 10_000)

    expected = 0.9 * (0.1 * 1 + 0.9 * 3) + 0.1 * 3
    assert average.state["weight"].tolist() == pytest.approx([expected] * 2)
    assert average.state["num_batches_tracked"].item() == 7


def test_weight_decay_spares_vectors_and_the_mask():
    """Decay would pull the mask's logits to a mask of one half."""
    network = StubRalf()
    own = nn.Parameter(torch.zeros(3))

    groups = optimiser(Optimiser(weight_decay=0.1), network, [own]).param_groups

    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert 0.0 == decay[id(network.mask)] == decay[id(own)] == decay[id(network.encoder.bias)]
    assert decay[id(network.encoder.weight)] == 0.1
    plain = optimiser(Optimiser(kind="adam", weight_decay=0.1), network, ()).param_groups
    assert [group["weight_decay"] for group in plain] == [0.1]
    assert len(list(network.parameters())) == len(plain[0]["params"])


def stepper(recipe: Recipe, run: Path, network: nn.Module | None = None) -> Stepper:
    """One step's machinery."""
    return Stepper(recipe, network or StubRalf(), torch.device("cpu"), ALONE, run)


def test_clipping_bounds_the_whole_gradient(tmp_path: Path):
    """SGD at rate one moves by the clipped gradient."""
    plain = {"optimiser.kind": "sgd", "optimiser.lr": "1", "optimiser.betas": "0,0"}
    level = {"warmup": "0", "schedule.shape": "constant"}
    recipe = tiny("ralf", clip="0.01", **plain, **level)
    network = StubRalf()
    before = [p.detach().clone() for p in network.parameters()]

    terms = stepper(recipe, tmp_path, network).step([MadeBatches()[0]], Moment(0, 0, 1, 0.0), 10)

    moves = [
        (p.detach() - b).square().sum() for p, b in zip(network.parameters(), before, strict=True)
    ]
    assert terms["gradient_norm"] > 0.01
    assert math.sqrt(torch.stack(moves).sum().item()) == pytest.approx(0.01, rel=5e-3)


def test_batch_norms_follow_at_the_recipes_pace(tmp_path: Path):
    """EfficientNet-Lite's own 0.01 would take 500 steps."""
    recipe = tiny("small_classifier")
    moving = stepper(recipe, tmp_path, make_network(recipe))

    norms = [m for m in moving.network.modules() if isinstance(m, nn.BatchNorm2d)]

    assert {recipe.optimiser.norm_momentum} == {norm.momentum for norm in norms}


def test_bf16_is_used_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch):
    """Emulated it would be slower than FP32; FP16 is a CUDA matter."""
    cpu, half = torch.device("cpu"), tiny("ralf", precision="bf16")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("ralf.train.loop.optimise.cpu_has_bf16", lambda n=native: n)
        assert computed_in(half, cpu) == expected
    assert computed_in(tiny("ralf", precision="fp16"), cpu) == torch.float32
    assert computed_in(tiny("ralf", precision="fp16"), torch.device("cuda")) == torch.float16


def test_bf16_trains_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights and their moments stay FP32, and one step's terms agree."""
    monkeypatch.setattr("ralf.train.loop.optimise.cpu_has_bf16", lambda: True)
    stub_run(tmp_path / "half", **{"schedule.steps": "1", "precision": "bf16"})
    stub_run(tmp_path / "full", **{"schedule.steps": "1"})

    half, full = (lines(tmp_path / run, "train")[0] for run in ("half", "full"))

    assert half["total"] != full["total"]
    assert half["total"] == pytest.approx(full["total"], rel=0.02)
    kinds = {t.dtype for t in load(tmp_path / "half" / LAST).tensors.values()}
    assert torch.bfloat16 not in kinds


def test_first_weights_depend_on_the_seed_alone():
    """Same seed, same network; another, another."""
    torch.rand(7)
    one, same = make_network(tiny("ralf_small")), make_network(tiny("ralf_small"))
    other = make_network(tiny("ralf_small", seed="1"))

    def first(network: nn.Module) -> Tensor:
        return next(p for p in network.parameters() if p.ndim == 4)

    assert torch.equal(first(one), first(same))
    assert not torch.equal(first(one), first(other))


@pytest.mark.parametrize("name", ["ralf_small", "small_classifier"])
def test_the_backbones_first_weights_come_from_a_file(name: str, tmp_path: Path):
    """timm's names, as `init.backbone`; the stand-in for ImageNet's."""
    import timm
    from safetensors.torch import save_file

    source = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    save_file(source.state_dict(), tmp_path / "lite0.safetensors")

    network = make_network(tiny(name, **{"init.backbone": str(tmp_path / "lite0.safetensors")}))

    weights = [p for n, p in network.named_parameters() if n.endswith("conv_stem.weight")]
    assert len(weights) == (2 if name == "ralf_small" else 1)  # the guide's stem too
    assert all(torch.equal(source.conv_stem.weight, weight) for weight in weights)


def classifier_run(run: Path, **changes: str) -> dict[str, torch.Tensor]:
    """Train the small classifier two steps; its judged weights."""
    recipe = tiny("small_classifier", **{"schedule.steps": "2"} | changes)
    train(recipe, MadeBatches(), [MadeBatches()[100]], run, data_sha256=DATA, options=QUIET)
    return load(run / LAST).part("average")


def test_a_detector_may_begin_where_its_classifier_ended(tmp_path: Path):
    """`init.backbone` may be a run's folder: its judged weights, the head and the guide too."""
    ended = classifier_run(tmp_path / "first")

    network = make_network(tiny("ralf_small", **{"init.backbone": str(tmp_path / "first")}))

    mine = network.state_dict()
    assert 100 < sum(name.startswith("backbone.") for name in ended)
    for name, tensor in ended.items():
        assert torch.equal(tensor, mine[name.replace("backbone.", "classifier.", 1)])
    assert torch.equal(mine["guide.conv_stem.weight"], ended["backbone.stem.conv_stem.weight"])


def test_a_run_may_go_on_from_anothers_weights(tmp_path: Path):
    """`init.network`: all judged weights of a run of the same network, over which ImageNet's are
    not laid; of another network, refused."""
    ended = classifier_run(tmp_path / "first")
    again = {"init.network": str(tmp_path / "first"), "init.backbone": "imagenet", "seed": "5"}

    mine = make_network(tiny("small_classifier", **again)).state_dict()

    assert mine.keys() == ended.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in ended.items())
    with pytest.raises(CheckpointError, match=r"another network.*build: 'classifier' → 'ralf'"):
        make_network(tiny("ralf_small", **again))


def test_a_run_may_go_on_from_a_published_version(tmp_path: Path):
    """What ships is as good a beginning as its run, up to its FP16; damaged, it is refused."""
    ended = classifier_run(tmp_path / "first")
    version = publish_run(tmp_path / "first", "small", tmp_path / "models").path

    whole = make_network(tiny("small_classifier", **{"init.network": str(version)})).state_dict()
    part = make_network(tiny("ralf_small", **{"init.backbone": str(version)})).state_dict()

    for name, tensor in ended.items():
        kept = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(whole[name], kept)
        assert torch.equal(part[name.replace("backbone.", "classifier.", 1)], kept)
    (version / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        make_network(tiny("small_classifier", **{"init.network": str(version)}))


def test_weights_that_saw_the_held_out_family_are_no_beginning(tmp_path: Path):
    """Or the card would call unseen what the classifier was trained on: of a run, of a version."""
    run = tmp_path / "first"
    classifier_run(run)
    version = publish_run(run, "small", tmp_path / "models").path
    for source in (run, version):
        for field in ("init.backbone", "init.network"):
            recipe = tiny("small_classifier", **{field: str(source), "held_out": "swap"})
            with pytest.raises(RecipeError, match=r"was trained on swap, which data\.held_out"):
                make_network(recipe)
            make_network(tiny("small_classifier", **{field: str(source)}))


def test_a_run_may_begin_at_the_mean_of_several(tmp_path: Path):
    """Of whole networks and of backbones alone; one that does not fit the others is named."""
    one, two = tmp_path / "one", tmp_path / "two"
    ended = [classifier_run(one), classifier_run(two, seed="7")]
    both = f"{one},{two}"

    whole = make_network(tiny("small_classifier", **{"init.network": both})).state_dict()
    part = make_network(tiny("ralf_small", **{"init.backbone": both})).state_dict()

    for name, tensor in ended[0].items():
        mean = (tensor + ended[1][name]) / 2 if tensor.is_floating_point() else tensor
        torch.testing.assert_close(whole[name], mean)
        torch.testing.assert_close(part[name.replace("backbone.", "classifier.", 1)], mean)
    assert any(not torch.equal(tensor, ended[1][name]) for name, tensor in ended[0].items())
    classifier_run(tmp_path / "other", **{"network.backbone": "resnet18"})
    with pytest.raises(CheckpointError, match=r"other and \S*one trained different networks"):
        make_network(tiny("ralf_small", **{"init.backbone": f"{one},{tmp_path / 'other'}"}))


def test_a_run_without_that_backbone_cannot_be_begun_from(tmp_path: Path):
    """A folder that is no run, and weights of another network, are named."""
    (tmp_path / "empty").mkdir()
    stub_run(tmp_path / "stub", **{"schedule.steps": "1"})

    with pytest.raises(CheckpointError, match="is it a folder of `ralf train`"):
        make_network(tiny("ralf_small", **{"init.backbone": str(tmp_path / "empty")}))
    with pytest.raises(NetworkError, match=r"stub.safetensors is not tf_efficientnet_lite0"):
        make_network(tiny("ralf_small", **{"init.backbone": str(tmp_path / "stub")}))


def test_the_log_tells_each_step_once_after_a_resume(tmp_path: Path):
    """Lines after the checkpoint, and one cut in two, are taken out."""
    log_ = RunLog(tmp_path, 0, None)
    for step in (1, 20, 40):
        log_.record("train", step, {"total": 1.0})
    log_.close()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"event": "train", "st')

    RunLog(tmp_path, 20, None).close()

    assert [line["step"] for line in lines(tmp_path, "train")] == [1, 20]


def test_the_scalars_are_in_tensorboard(tmp_path: Path):
    """The same names as in the log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stub_run(tmp_path, **{"schedule.steps": "4"})

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/total", "train/con", "train/faces_per_s", "validation/auc"} <= tags
    bce = next(event for event in events.Scalars("train/bce") if event.step == 4)
    assert bce.value == pytest.approx(lines(tmp_path, "train")[-1]["bce"], rel=1e-5)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_the_line_is_redrawn_on_a_terminal_and_sparse_elsewhere():
    """A log file is not filled with carriage returns; on a terminal the last line stays."""
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        log_ = RunLog(None, 0, stream)
        for _ in range(3):
            log_.progress("step 1  12.0 faces/s")
        log_.say("done")
        log_.close()

    drawn, _, left = terminal.getvalue().partition("step 1  12.0 faces/s")
    assert "\x1b[" in drawn
    assert "\x1b[2K" in left and left.rsplit("\x1b[", 1)[-1].endswith("done\n")
    assert file.getvalue() == "step 1  12.0 faces/s\ndone\n"


def test_the_live_line_says_what_a_person_waits_for(tmp_path: Path, capfd: Any):
    """Epoch, step, loss, faces a second, time left, on stderr."""
    stub_run(tmp_path, options=Options(), **{"schedule.steps": "3"})

    said = capfd.readouterr()

    assert said.out == ""
    for part in ("epoch 1/1", "step 1/3", "faces/s", "min left", "validation AUC", "finished"):
        assert part in said.err


def test_a_loss_with_a_rival_must_say_who_steps_it(tmp_path: Path):
    """The protocol's one joint that could be forgotten."""

    class Half(Objective):
        def run(self, crops: Tensor) -> Any:
            return self.network(crops)

        def rival(self, seen: Any, batch: Any) -> Tensor | None:
            return seen.sum()

    moving = stepper(tiny("ralf"), tmp_path)
    moving.objective, moving.rival = Half(moving.recipe, moving.network), None

    with pytest.raises(TypeError, match="rival_optimiser"):
        moving.step([MadeBatches()[0]], Moment(0, 0, 1, 0.0), 10)


def test_the_newest_weights_are_kept_where_the_recipe_says_so(tmp_path: Path):
    """select=last: a worse validation later replaces a better one earlier."""
    stub_run(tmp_path, **{"schedule.steps": "8", "schedule.select": "last"})
    best, last = load(tmp_path / BEST), load(tmp_path / LAST)

    assert (8, 8) == (best.state.step, best.state.best_step)
    for name, tensor in last.part("average").items():
        assert torch.equal(tensor, best.part("network")[name])


def test_the_disagreement_of_views_is_scipys_divergence():
    """Of a real and a forged picture in two views each; 0 where all agree, ln 2 at the most."""
    logit = torch.tensor([-1.0, 2.0, 0.5, 3.0])  # by class and view

    shares = [[1 - p, p] for p in logit.sigmoid().tolist()]
    expected = [jensenshannon(*shares[:2]) ** 2, jensenshannon(*shares[2:]) ** 2]
    assert disagreement(logit, 2).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert disagreement(torch.tensor([1.0, 1.0, 1.0, -3.0, -3.0, -3.0]), 3).abs() < 1e-6
    assert disagreement(torch.tensor([-50.0, 50.0, 50.0, -50.0]), 2).item() == pytest.approx(
        math.log(2), rel=1e-3
    )


def test_the_disagreements_gradient_draws_the_views_of_each_picture_together():
    """By finite differences; nothing reaches a picture whose views agree."""
    torch.manual_seed(1)
    logit = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: disagreement(x, 3), (logit,))
    # Two faces in two views: rows 0 and 2 show the first real face, 1 and 3 the second.
    apart = torch.tensor([-1.0, 0.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0], requires_grad=True)
    disagreement(apart, 2).backward()

    assert apart.grad is not None and apart.grad[0] < 0 < apart.grad[2]
    assert apart.grad[[1, 3, 4, 5, 6, 7]].abs().max() < 1e-6


def test_a_classifier_trained_for_it_says_the_same_of_every_encoding(tmp_path: Path):
    """The same steps with and without the weight, from forging to weights; it is logged."""
    index = faces(tmp_path / "faces")
    seen: dict[str, float] = {}
    for weight in ("0", "30"):
        recipe = tiny(
            "small_classifier", data__views="none,jpeg:6", loss__consistency=weight,
            data__families="inner", data__shares="", schedule__steps="12", schedule__warmup="0",
            optimiser__lr="1e-3", optimiser__ema="none", data__augment__other="0",
            data__variants="1",
        )  # fmt: skip
        batches = Batches(index, recipe.data, seed=1, crops=tmp_path / "crops")
        run = tmp_path / weight
        train(recipe, batches, None, run, data_sha256=DATA, options=QUIET)
        network = make_network(recipe).eval()
        network.load_state_dict(load(run / LAST).part("network"))
        with torch.inference_mode():
            logits = [network(batches[number].crops) for number in range(4)]
        seen[weight] = float(torch.stack([disagreement(logit, 2) for logit in logits]).mean())
        logged = "consistency" in (run / "log.jsonl").read_text()
        assert logged == (weight != "0")

    assert seen["30"] < 0.8 * seen["0"]
    with pytest.raises(RecipeError, match=r"loss\.consistency 1\.0 compares views.*data\.views"):
        tiny("small_classifier", loss__consistency="1")
