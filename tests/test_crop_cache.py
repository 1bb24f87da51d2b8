"""Pairs of crops on disk: the same as those that are made anew, whole, and shared."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ralf.__main__ import main
from ralf.kernels.manifest import InputContract
from ralf.train.data.batches import Batches
from ralf.train.data.crop_cache import PAIR
from ralf.train.data.index import Index
from ralf.train.recipe import Data
from tests.faces_on_disk import faces
from tests.test_batches import HARD


def data(**choices: Any) -> Data:
    return Data(**({"input": InputContract(size=32), "batch": 8, "frames": 2} | choices))


@pytest.fixture(scope="module")
def reals(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return faces(tmp_path_factory.mktemp("reals") / "d")


def kept_pairs(index: Index, folder: Path, **changes: Any) -> Batches:
    """Two variants of each face, forged, damaged, and kept."""
    return Batches(
        index, data(families=("inner", "mouth"), augment=HARD, variants=2, **changes), crops=folder
    )


def test_a_kept_pair_is_the_one_that_is_made_anew(reals: Index, tmp_path: Path):
    """With the folder, from the folder and without it: the same batches, also past two rounds."""
    rounds = 3 * len(kept_pairs(reals, tmp_path))
    made = [kept_pairs(reals, tmp_path)[number] for number in range(rounds)]
    filled = kept_pairs(reals, tmp_path)
    assert filled.cache is not None and filled.pairs == filled.cache.kept
    filled._pair = None  # type: ignore[assignment,method-assign]
    without = Batches(reals, filled.data)
    for number, batch in enumerate(made):
        for other in (filled[number], without[number]):
            assert torch.equal(batch.crops, other.crops) and batch.ids == other.ids
            assert torch.equal(batch.family, other.family) and torch.equal(batch.pair, other.pair)
    shown = {crop.numpy().tobytes() for batch in made for crop in batch.crops[batch.forged]}
    # Two variants of each face, each as it is and mirrored at the most.
    assert filled.pairs // 2 < len(shown) <= 2 * filled.pairs


def test_a_pair_that_was_written_half_is_made_anew(reals: Index, tmp_path: Path):
    """Its checksum tells; another recipe has another folder; processes share what is there."""
    batches = kept_pairs(reals, tmp_path)
    whole = batches.variant(1)
    cache = batches.cache
    assert cache is not None and cache.get(0) is None
    path = cache.folder / "crops.u8"
    raw = np.memmap(path, "u1", "r+")
    raw[raw.size // batches.pairs + 5] ^= 255
    raw.flush()
    assert cache.get(1) is None
    assert torch.equal(whole.forged, batches.variant(1).forged) and cache.get(1) is not None
    again = pickle.loads(pickle.dumps(batches))
    assert again.cache is not None and len(pickle.dumps(cache)) < 1000
    assert torch.equal(whole.real, again.cache.get(1).real)
    other = kept_pairs(reals, tmp_path, batch=2).cache
    assert other is not None and cache.folder == other.folder
    other = kept_pairs(reals, tmp_path, blended_share=0.25).cache
    assert other is not None and cache.folder != other.folder


def test_all_pairs_are_made_before_a_training_asks_for_them(
    reals: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By the command, in this process; a recipe that keeps none is refused."""
    table = reals.save(reals.root / "kept.csv")
    words = ["data", "crops", "small_classifier", "--data", str(table), "--out", str(tmp_path)]
    small = ["--set", "data.input.size=32", "--set", "network.size=32", "--set", "h264=0"]
    assert 2 == main([*words, *small])
    assert "--set data.variants=4" in capsys.readouterr().err
    assert 0 == main([*words, *small, "--set", "data.variants=1"])
    folder = Path(capsys.readouterr().out.strip())
    rows = np.fromfile(folder / "pairs.bin", PAIR)
    assert len(reals.where(split="train", label=0)) == len(rows) == rows["there"].sum() > 0
    with pytest.raises(ValueError, match=r"data.variants 2 needs data.pairing paired"):
        data(families=("inner",), variants=2, pairing="balanced")


def test_every_view_of_a_pair_is_kept(reals: Index, tmp_path: Path):
    """One row each; the same batches from the folder and without it, and each view of one flip."""
    choices: dict[str, Any] = {"families": ("inner",), "variants": 1, "views": ("none", "jpeg:10")}
    kept = Batches(reals, data(**choices), crops=tmp_path)
    made, again = [[kept[number] for number in range(2)] for _ in range(2)]
    without = Batches(reals, data(**choices))

    assert kept.cache is not None and kept.cache.kept == 2 * len({*made[0].ids, *made[1].ids}) / 2
    for number in range(2):
        assert torch.equal(made[number].crops, again[number].crops)
        assert torch.equal(made[number].crops, without[number].crops)
        one, other = made[number].crops.float().unflatten(0, (2, 2, 2)).unbind(1)
        assert 0 < (one - other).abs().mean() < (one - other.flip(-1)).abs().mean()
