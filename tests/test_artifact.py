"""A model on disk: whole or refused, old or new, whatever happens between."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from ralf.kernels import artifact as models
from ralf.kernels import registry
from ralf.kernels.artifact import Artifact, ArtifactError, Damaged, Golden, NotFound
from ralf.kernels.manifest import Manifest, Network

GOLDEN = Golden(
    np.arange(2 * 3 * 32 * 32, dtype=np.uint32).astype(np.uint8).reshape(2, 3, 32, 32),
    np.array([0.5, -1.5], np.float32),
)
DRAFT = Manifest(name="tiny", network=Network(build="ralf"), files={})


def contents(card: str = "a card") -> dict[str, bytes | Path]:
    """The files of a version; another card makes another version."""
    return {
        "weights.safetensors": b"weights" * 100,
        "golden.npz": GOLDEN.to_bytes(),
        "card.md": card.encode(),
    }


def publish(root: Path, card: str = "a card") -> Artifact:
    """One version in root."""
    return models.publish(root, DRAFT, contents(card))


def everything(root: Path) -> dict[str, bytes]:
    """Every file under root, by its relative path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_what_is_published_opens_with_every_hash_checked(tmp_path):
    """The version is the manifest's hash; the arrays come back as they went."""
    made = publish(tmp_path)
    opened = models.open_artifact(made.path)
    golden = models.golden(opened)

    assert made == opened
    assert made.path.name == made.version == made.manifest_sha256[:8]
    assert opened.read("card.md") == b"a card"
    assert (golden.crops == GOLDEN.crops).all() and (golden.logits == GOLDEN.logits).all()


def test_the_same_content_is_the_same_version(tmp_path):
    """Publishing twice changes nothing; another card is another version."""
    first = publish(tmp_path)
    before = everything(tmp_path)
    again = publish(tmp_path)

    assert (first, before) == (again, everything(tmp_path))
    assert publish(tmp_path, "another").version != first.version
    assert len(models.versions(tmp_path, "tiny")) == 2


def test_files_may_come_from_disk(tmp_path):
    """A path is copied, not moved and not linked."""
    card = tmp_path / "elsewhere.md"
    card.write_text("a card")
    made = models.publish(tmp_path / "models", DRAFT, {**contents(), "card.md": card})

    assert made.version == publish(tmp_path / "other").version
    assert card.exists() and not (made.path / "card.md").is_symlink()


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def relink(path: Path) -> None:
    target = path.rename(path.parent.parent / path.name)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["weights.safetensors", "golden.npz", "card.md", "manifest.json"])
@pytest.mark.parametrize("harm", [tear, flip, relink, pipe, folder, Path.unlink])
def test_a_harmed_file_is_refused_by_name(tmp_path, harm, name):
    """Torn, tampered, linked, a pipe, a folder, missing: the message names the file."""
    made = publish(tmp_path)
    harm(made.path / name)

    with pytest.raises(Damaged, match=name):
        models.open_artifact(made.path)
    with pytest.raises((Damaged, NotFound)):
        registry.point_to(tmp_path, "tiny", made.version)
    assert models.promoted(tmp_path, "tiny") is None


def test_a_file_changed_after_opening_is_refused_when_read(tmp_path):
    """What is checked is what is used."""
    made = publish(tmp_path)
    flip(made.path / "weights.safetensors")

    with pytest.raises(Damaged, match="changed after publishing"):
        made.read("weights.safetensors")


def test_a_link_that_the_manifest_does_not_name_is_refused(tmp_path):
    """Nothing in a version points out of it."""
    made = publish(tmp_path)
    (made.path / "extra").symlink_to("/etc/hostname")

    with pytest.raises(Damaged, match="extra is a link"):
        models.open_artifact(made.path)


def test_engines_may_be_added_later(tmp_path):
    """They are not the manifest's; each has its own hash."""
    made = publish(tmp_path)
    (made.path / "engines").mkdir()
    (made.path / "engines" / "plan").write_bytes(b"plan")

    assert made == models.open_artifact(made.path)


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/passwd", "a/b", ".hidden", "", "manifest.json"]
)
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path, name):
    """On the way in and, in a forged manifest, on the way out."""
    with pytest.raises(ArtifactError, match="not a plain file name"):
        models.publish(tmp_path, DRAFT, {**contents(), name: b"x"})
    made = publish(tmp_path)
    document = json.loads((made.path / "manifest.json").read_text())
    document["files"][name] = "0" * 64
    forged = json.dumps(document).encode()
    digest = hashlib.sha256(forged).hexdigest()
    home = made.path.rename(made.path.with_name(digest[:8]))
    (home / "manifest.json").write_bytes(forged)

    with pytest.raises(Damaged, match="not a plain file name"):
        models.open_artifact(home)


@pytest.mark.parametrize("text", [b"{}", b"not json", b"[" * 10_000, b"\xff\xfe", b""])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    """Under the right folder name too."""
    home = tmp_path / "tiny" / hashlib.sha256(text).hexdigest()[:8]
    home.mkdir(parents=True)
    (home / "manifest.json").write_bytes(text)

    with pytest.raises(Damaged, match="manifest"):
        models.open_artifact(home)


def test_a_manifest_of_any_length_does_not_fill_memory(tmp_path):
    """Its size is capped before it is read."""
    made = publish(tmp_path)
    with (made.path / "manifest.json").open("r+b") as stream:
        stream.truncate(1 << 32)

    with pytest.raises(Damaged, match="at most"):
        models.open_artifact(made.path)


@pytest.mark.parametrize("lacking", ["weights.safetensors", "golden.npz", "card.md"])
def test_a_model_without_its_card_golden_or_weights_is_not_published(tmp_path, lacking):
    """A model is all three."""
    files = contents()
    del files[lacking]

    with pytest.raises(ArtifactError, match=lacking):
        models.publish(tmp_path, DRAFT, files)


def test_golden_arrays_are_never_unpickled(tmp_path):
    """An object array is refused, not executed."""
    bad = tmp_path / "bad.npz"
    np.savez(bad, crops=np.array([{}], dtype=object), logits=np.zeros(1, np.float32))
    made = models.publish(tmp_path, DRAFT, {**contents(), "golden.npz": bad})

    with pytest.raises(Damaged, match="does not read"):
        models.golden(made)


@pytest.mark.parametrize(
    ("crops", "logits"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), np.zeros(1, np.float32)),
        (np.zeros((1, 3, 8, 9), np.uint8), np.zeros(1, np.float32)),
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros(1, np.float32)),
        (np.zeros((1, 3, 8, 8), np.uint8), np.array([np.nan], np.float32)),
        (np.zeros((0, 3, 8, 8), np.uint8), np.zeros(0, np.float32)),
    ],
)
def test_golden_arrays_check_themselves(crops, logits):
    """Shapes, dtypes, and at least one finite logit."""
    with pytest.raises(Damaged, match="should be"):
        Golden(crops, logits)


class Killed(BaseException):
    """What a process killed at this step would never come back from."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the given flush, rename or replacement, and clean nothing up."""
    counted = 0

    def dying(real):
        def call(*args, **options):
            nonlocal counted
            counted += 1
            if counted == step:
                raise Killed(real.__name__)
            return real(*args, **options)

        return call

    for name in ("fsync", "rename", "replace", "mkdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)


def survives_death_at_each_step(monkeypatch, act, check) -> int:
    """Kill `act` at step 1, 2, … until it lives; after each death the state must check."""
    for step in range(1, 60):
        with monkeypatch.context() as patch:
            kill_at(step, patch)
            try:
                act()
            except Killed:
                pass
            else:
                return step
        check()
    raise AssertionError("never came through")


def test_killed_at_any_step_publishing_leaves_old_or_new_whole(tmp_path, monkeypatch):
    """And what the dead left is swept by the next."""
    old = publish(tmp_path)
    registry.point_to(tmp_path, "tiny", old.version)

    def check():
        for version in models.versions(tmp_path, "tiny"):
            models.open_artifact(tmp_path / "tiny" / version)
        assert models.resolve(tmp_path, "tiny") == old

    steps = survives_death_at_each_step(monkeypatch, lambda: publish(tmp_path, "new"), check)
    publish(tmp_path, "newer")

    assert steps > 6
    assert not list((tmp_path / "tiny").glob(".new-*"))
    assert len(models.versions(tmp_path, "tiny")) == 3


def test_killed_at_any_step_promoting_and_rolling_back_leave_old_or_new(tmp_path, monkeypatch):
    """`current` is always one of the two, and history still leads back."""
    one, two = publish(tmp_path), publish(tmp_path, "two")
    registry.point_to(tmp_path, "tiny", one.version)

    def check():
        assert models.resolve(tmp_path, "tiny") in (one, two)

    def forward():
        registry.point_to(tmp_path, "tiny", two.version)

    def back():
        if models.promoted(tmp_path, "tiny") == two.version:
            registry.rollback(tmp_path, "tiny")

    survives_death_at_each_step(monkeypatch, forward, check)
    assert models.resolve(tmp_path, "tiny") == two
    survives_death_at_each_step(monkeypatch, back, check)
    assert models.resolve(tmp_path, "tiny") == one
    assert registry.point_to(tmp_path, "tiny", two.version) == two
    assert registry.rollback(tmp_path, "tiny") == one


def test_an_error_while_publishing_leaves_nothing(tmp_path):
    """A source that is not there."""
    with pytest.raises(FileNotFoundError):
        models.publish(tmp_path, DRAFT, {**contents(), "card.md": tmp_path / "missing"})

    assert list((tmp_path / "tiny").iterdir()) == []


def test_many_publishers_at_once_make_one_version(tmp_path):
    """The lock is the model's folder."""
    made: list[Artifact] = []
    threads = [threading.Thread(target=lambda: made.append(publish(tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 6 and len({a.version for a in made}) == 1
    assert models.versions(tmp_path, "tiny") == [made[0].version]


def test_rollback_walks_back_through_what_was_promoted(tmp_path):
    """Promoting the current one again is no step; the first has nothing before it."""
    first, second, third = (publish(tmp_path, card).version for card in "abc")
    for version in (first, second, second, first, third):
        registry.point_to(tmp_path, "tiny", version)
    walked = [registry.rollback(tmp_path, "tiny").version for _ in range(3)]

    assert walked == [first, second, first]
    with pytest.raises(NotFound, match="nothing was promoted before"):
        registry.rollback(tmp_path, "tiny")


def test_rollback_to_a_damaged_version_is_refused(tmp_path):
    """The current one stays."""
    first, second = publish(tmp_path), publish(tmp_path, "b")
    registry.point_to(tmp_path, "tiny", first.version)
    registry.point_to(tmp_path, "tiny", second.version)
    flip(first.path / "card.md")

    with pytest.raises(Damaged):
        registry.rollback(tmp_path, "tiny")
    assert models.resolve(tmp_path, "tiny") == second


def test_a_model_is_found_by_name_version_or_path(tmp_path):
    """The promoted one, a version or its first digits, and both folders."""
    one, two = publish(tmp_path), publish(tmp_path, "two")
    registry.point_to(tmp_path, "tiny", one.version)
    found = [
        models.resolve(tmp_path, spec)
        for spec in ("tiny", f"tiny@{one.version}", f"tiny@{one.version[:6]}")
    ]

    assert found == [one] * 3
    assert models.resolve(tmp_path, f"tiny@{two.version}") == two
    assert models.resolve("nowhere", str(two.path)) == two
    assert models.resolve("nowhere", str(tmp_path / "tiny")) == one


def test_what_is_not_found_says_what_is_there_and_what_helps(tmp_path):
    """Sought, there, the command."""
    with pytest.raises(NotFound, match=r"no model 'tiny' .*have: none.*ralf models untrained"):
        models.resolve(tmp_path, "tiny")
    made = publish(tmp_path)
    with pytest.raises(NotFound, match=rf"none is promoted .*models promote tiny@{made.version}"):
        models.resolve(tmp_path, "tiny")
    with pytest.raises(NotFound, match=rf"'00000000' of tiny .*have: {made.version}"):
        models.resolve(tmp_path, "tiny@00000000")
    with pytest.raises(NotFound, match="no model 'tony'"):
        models.resolve(tmp_path, "tony")
    with pytest.raises(NotFound, match=r"neither manifest\.json nor current"):
        models.resolve(tmp_path, str(tmp_path / "tony"))
    registry.point_to(tmp_path, "tiny", made.version)
    shutil.rmtree(made.path)
    publish(tmp_path, "another")
    with pytest.raises(NotFound, match=f"promoted version {made.version} is gone"):
        models.resolve(tmp_path, "tiny")


def test_a_model_under_anothers_name_is_refused(tmp_path):
    """A copied folder must not pass for the model it replaced."""
    made = publish(tmp_path)
    shutil.copytree(made.path, tmp_path / "other" / made.version)

    with pytest.raises(Damaged, match="named 'tiny', not 'other'"):
        models.resolve(tmp_path, f"other@{made.version}")


def test_a_broken_current_is_refused(tmp_path):
    """It names a version, or nothing is loaded."""
    publish(tmp_path)
    (tmp_path / "tiny" / "current").write_text("../../etc")

    with pytest.raises(Damaged, match="should hold a version"):
        models.resolve(tmp_path, "tiny")
