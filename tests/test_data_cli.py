"""`ralf data` and `ralf evaluate` from the command line to files on disk."""

import argparse
import json

import pytest
import torch

from demo.samples import portraits
from ralf.kernels.networks import build
from ralf.train.cli import commands
from ralf.train.data.index import load
from ralf.train.forge.video import animate, encode
from ralf.train.loop.checkpoint import Checkpoint, State, save
from ralf.train.recipe_text import override
from ralf.train.recipes import named
from tests.faces_on_disk import faces


def ralf(*words: object) -> int:
    parser = argparse.ArgumentParser()
    commands(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return int(args.run(args))


@pytest.fixture
def folder(tmp_path):
    return faces(tmp_path / "d", val=4).root


def test_check_says_what_is_there(folder, capsys):
    """Counts on stdout; exit 1 where something is wrong."""
    assert ralf("data", "check", folder) == 0
    assert "0 leaks" in capsys.readouterr().out

    (folder / "faces/tim-kaine.jpg").unlink()
    assert ralf("data", "check", folder) == 1
    assert "faces/tim-kaine.jpg" in capsys.readouterr().out


def test_an_index_elsewhere_still_finds_its_pictures(folder, tmp_path, capsys):
    """Paths become whole; new splits hold no identity twice."""
    out = tmp_path / "elsewhere" / "index.csv"
    assert ralf("data", "index", folder, "--out", out, "--split", "--val", "0.4") == 0

    index = load(out)
    assert capsys.readouterr().out.strip() == str(out)
    assert ralf("data", "check", out) == 0 and len(index) == 8


def test_only_some_rows(folder, tmp_path, capsys):
    """FIELD=VALUE, typed; an unknown field is refused."""
    out = tmp_path / "val.csv"

    assert ralf("data", "index", folder, "--out", out, "--only", "split=val") == 0
    assert len(load(out)) == 4
    assert ralf("data", "index", folder, "--out", out, "--only", "beauty=1") == 2
    assert "--only takes FIELD=VALUE" in capsys.readouterr().err


def test_only_takes_several_values_and_refuses_to_leave_nothing(tmp_path, capsys):
    """Commas and repeated pairs name further values; other fields narrow; nothing left is said."""
    folder, out = faces(tmp_path / "d", val=4, forgeries="inner").root, tmp_path / "some.csv"
    words = ("data", "index", folder, "--out", out)

    assert ralf(*words, "--only", "method=real,inner", "--only", "split=val") == 0
    assert len(load(out)) == 8
    assert ralf(*words, "--only", "method=real", "--only", "method=swap") == 0
    assert {0} == {row.label for row in load(out)}
    out.unlink()
    assert ralf(*words, "--only", "method=swap,eyes") == 2
    said = capsys.readouterr().err
    assert "no row is left of 16" in said and "method: inner, real" in said
    assert not out.exists()


def test_no_layout_is_a_refusal_in_words(tmp_path, capsys):
    """No traceback."""
    assert ralf("data", "check", tmp_path / "nowhere") == 2
    assert "no data at" in capsys.readouterr().err


def test_prepare_from_the_command_line(tmp_path, capsys):
    """A film in, a table of faces out."""
    (tmp_path / "own/real").mkdir(parents=True)
    portrait = portraits()["tim-kaine.jpg"].image
    film = animate(portrait, seconds=0.2, fps=10, size=(320, 240))
    encode(film, tmp_path / "own/real/a.mp4")
    assert ralf("data", "prepare", tmp_path / "own", "--out", tmp_path / "out", "--frames", 2) == 0

    said = capsys.readouterr()
    assert len(load(said.out.strip())) == 2 and "2 faces" in said.err


def test_preparing_for_a_recipe_of_one_frame_keeps_more_than_one(tmp_path, capsys):
    """ralf_paper shows one frame of a video an epoch, and another one in each."""
    (tmp_path / "own/real").mkdir(parents=True)
    portrait = portraits()["tim-kaine.jpg"].image
    film = animate(portrait, seconds=0.5, fps=10, size=(320, 240))
    encode(film, tmp_path / "own/real/a.mp4")
    words = ("data", "prepare", tmp_path / "own", "--out", tmp_path / "out")
    assert ralf(*words, "--recipe", "ralf_paper") == 0

    assert len(load(capsys.readouterr().out.strip())) == 5


def run_folder(tmp_path):
    """A run whose network was never trained."""
    recipe = override(
        named("ralf_small_cpu"),
        {"network.size": "64", "data.input.size": "64", "init.backbone": ""},
    )
    torch.manual_seed(0)
    network = build(recipe.network.build, **recipe.network.dimensions)
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    run = tmp_path / "run"
    run.mkdir()
    save(
        run / "last.safetensors",
        Checkpoint(recipe, State(), tensors, (), {}, "0" * 64, None, {}),
    )
    return run


def test_evaluate_writes_table_and_videos_and_figures_a_page(folder, tmp_path, capsys):
    """A run's folder is a model; figures come out the same twice."""
    words = ("evaluate", run_folder(tmp_path), "--data", folder, "--split", "val")
    words += ("--families", "inner,boundary", "--out", tmp_path / "out")
    assert ralf(*words) == 0
    first = capsys.readouterr().out
    assert ralf(*words) == 0

    assert first == capsys.readouterr().out and "boundary" in first
    figures = json.loads((tmp_path / "out/intra.json").read_text())["figures"]
    assert figures["run portraits"]["frames"]["real"] == 4
    assert (tmp_path / "out/run-intra.csv").read_text().count("\n") == 13
    assert not (tmp_path / "out/run.html").exists()
    pictured = ("figures", *words[1:-1], tmp_path / "pages")
    assert ralf(*pictured) == 0
    assert "<h2>Faces</h2>" in (tmp_path / "pages/run.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages/run.html")


def test_an_unknown_table_or_model_is_a_refusal(folder, tmp_path, capsys):
    """With what there is."""
    assert ralf("evaluate", "nobody", "--data", folder, "--models", tmp_path) == 2
    assert "ralf train" in capsys.readouterr().err
    run = run_folder(tmp_path)
    assert ralf("evaluate", run, "--data", folder, "--table", "beauty") == 2
    assert "there are intra" in capsys.readouterr().err
