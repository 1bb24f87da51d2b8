"""A run's state: whole or not there, and the same bits when it comes back."""

import json
import pickletools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ralf.train.loop.checkpoint import (
    Checkpoint,
    CheckpointError,
    State,
    commit,
    load,
    pack_optimiser,
    random_state,
    refuse_another_run,
    save,
    set_random_state,
    unpack_optimiser,
)
from ralf.train.recipe_text import override
from tests.training import StubRalf, tiny

CPU = torch.device("cpu")


def checkpoint(**changes: object) -> Checkpoint:
    """One with something in every field."""
    fields: dict[str, object] = {
        "recipe": tiny("ralf"),
        "state": State(
            step=7, faces=56, seconds=1.5, best=0.75, best_step=4, validations_since_best=1
        ),
        "tensors": {"network.a": torch.randn(3, 4), "loss.b": torch.tensor(5)},
        "random": (random_state(CPU),),
        "optimisers": {"main": {"state": {}, "param_groups": []}},
        "data_sha256": "d" * 64,
        "commit": "c" * 40,
        "metrics": {"validation": {"auc": 0.75}},
    }
    return Checkpoint(**(fields | changes))  # type: ignore[arg-type]


def test_what_is_saved_comes_back(tmp_path: Path):
    """Every field, every bit."""
    saved = checkpoint()
    save(tmp_path / "last.safetensors", saved)

    found = load(tmp_path / "last.safetensors")

    for name, tensor in saved.tensors.items():
        assert torch.equal(tensor, found.tensors[name])
    for field in ("recipe", "state", "random", "optimisers", "data_sha256", "commit", "metrics"):
        assert getattr(saved, field) == getattr(found, field), field
    assert torch.equal(saved.tensors["network.a"], found.part("network")["a"])
    assert {"b"} == found.part("loss").keys()


def test_the_file_calls_its_fields_as_it_always_did(tmp_path: Path):
    """A run of an older version goes on, and an older version reads what we write."""
    path = tmp_path / "last.safetensors"
    save(path, checkpoint(state=State(validations_since_best=3, validated_step=40)))
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["ralf"])["state"]
    found = load(path).state

    assert {"looks_since_best": 3, "looked_step": 40}.items() <= stored.items()
    assert (3, 40) == (found.validations_since_best, found.validated_step)


def test_layouts_and_shared_memory_do_not_matter(tmp_path: Path):
    """Channels-last weights and tied ones are saved by value."""
    last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tied = torch.randn(5)
    save(tmp_path / "x", checkpoint(tensors={"a": last, "b": tied, "c": tied, "d": tied[1:3]}))

    found = load(tmp_path / "x").tensors

    assert torch.equal(last, found["a"])
    assert torch.equal(tied, found["b"]) and torch.equal(tied, found["c"])
    assert torch.equal(tied[1:3], found["d"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Full disk, killed writer: the last whole checkpoint is still there."""
    path = tmp_path / "last.safetensors"
    save(path, checkpoint())

    def full(target: Path, content: bytes) -> str:
        target.write_bytes(content[:100])
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("ralf.train.loop.checkpoint.write", full)
        with pytest.raises(OSError, match="no space"):
            save(path, checkpoint(state=State(step=99)))

    assert load(path).state.step == 7
    save(path, checkpoint(state=State(step=8)))
    assert load(path).state.step == 8
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_torn_file_is_refused(tmp_path: Path):
    """Not read halfway."""
    path = tmp_path / "last.safetensors"
    save(path, checkpoint())
    path.write_bytes(path.read_bytes()[:-5])

    with pytest.raises(CheckpointError, match="does not read"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="does not read"):
        load(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load(tmp_path / "none")


def test_anothers_tensors_are_no_checkpoint(tmp_path: Path):
    """A weights file is not mistaken for a run."""
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "old", metadata={"ralf": '{"schema": "x/0"}'})

    with pytest.raises(CheckpointError, match="no checkpoint of ours"):
        load(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="x/0"):
        load(tmp_path / "old")


def test_nothing_in_the_file_is_a_pickle(tmp_path: Path):
    """A length, a JSON header, raw bytes."""
    save(tmp_path / "x", checkpoint())
    data = (tmp_path / "x").read_bytes()

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])

    assert json.loads(header["__metadata__"]["ralf"])["schema"] == "ralf.checkpoint/1"
    with pytest.raises(ValueError):  # noqa: PT011 - pickletools names no pattern
        list(pickletools.genops(data))


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_an_optimiser_comes_back_to_the_bit(kind: str):
    """Two more steps from the copy are two more steps from the original."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    options = {"momentum": 0.9} if kind == "sgd" else {"betas": (0.5, 0.999)}
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    first = kinds[kind](one.parameters(), lr=0.1, **options)
    second = kinds[kind](other.parameters(), lr=0.7, **options)

    def move(layer: nn.Linear, chosen: torch.optim.Optimizer, seed: int) -> None:
        data = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        chosen.zero_grad()
        layer(data).square().sum().backward()
        chosen.step()

    move(one, first, 0)
    tensors, plain = pack_optimiser("main", first)
    other.load_state_dict(one.state_dict())
    plain = json.loads(json.dumps(plain))
    unpack_optimiser(
        second, {k.removeprefix("main."): v.clone() for k, v in tensors.items()}, plain
    )
    for seed in (1, 2):
        move(one, first, seed)
        move(other, second, seed)

    assert torch.equal(one.weight, other.weight)
    assert second.param_groups[0]["lr"] == 0.1


def test_random_numbers_go_on_where_they_were():
    """Python's, NumPy's and torch's, their cached halves too."""
    random.gauss(0, 1)
    np.random.standard_normal()
    text = random_state(CPU)

    def draw() -> tuple[object, ...]:
        return (
            random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(),
            torch.randn(3).tolist(),
        )  # fmt: skip

    expected = draw()
    assert expected != draw()
    set_random_state(text, CPU)
    assert expected == draw()


def test_another_recipe_data_or_world_is_refused():
    """Each by what differs, with both values."""
    found = checkpoint()
    refuse_another_run(found, found.recipe, "d" * 64, 1)

    with pytest.raises(CheckpointError, match=r"schedule\.epochs: 40 → 5"):
        refuse_another_run(found, override(found.recipe, {"epochs": "5"}), "d" * 64, 1)
    with pytest.raises(CheckpointError, match="other data"):
        refuse_another_run(found, found.recipe, "e" * 64, 1)
    with pytest.raises(CheckpointError, match="1 processes, not 2"):
        refuse_another_run(found, found.recipe, "d" * 64, 2)


def test_weights_that_do_not_fit_the_network_are_refused(tmp_path: Path):
    """Never strict=False: a half-loaded network gives nonsense without a word."""
    network = StubRalf()
    state = {f"network.{k}": v for k, v in network.state_dict().items() if k != "mask"}
    save(tmp_path / "x", checkpoint(tensors=state))

    with pytest.raises(RuntimeError, match="mask"):
        network.load_state_dict(load(tmp_path / "x").part("network"))


def test_the_commit_is_named_or_absent():
    """Forty hex digits, a plus where files differ; None outside of git."""
    said = commit()

    assert said is None or len(said.removesuffix("+")) == 40
