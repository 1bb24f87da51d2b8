"""Promotion asks before it moves; collecting takes what nobody needs; killed, both are whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis

from ralf.__main__ import main
from ralf.kernels import artifact as models
from ralf.kernels import registry
from ralf.kernels.artifact import Artifact, ArtifactError, NotFound
from ralf.kernels.atomic_files import hold, unused
from ralf.kernels.manifest import Manifest, Network, Reference
from ralf.kernels.registry import NotPromoted, PromotionCheck
from ralf.worker.contract import Job, Media
from ralf.worker.service.store import Store
from ralf.worker.settings import Settings
from tests.test_artifact import DRAFT, Killed, contents, everything, survives_death_at_each_step

PROVEN = PromotionCheck("golden", "agreement", "agreement", True)


def proven(artifact: Artifact) -> PromotionCheck:
    """A golden check that passes: these artifacts hold no network."""
    return PROVEN


def publish(root: Path, card: str = "a card", **changes: object) -> Artifact:
    """One version in root."""
    return models.publish(root, DRAFT.model_copy(update=changes), contents(card))


def measured(root: Path, auc: object, **changes: object) -> Artifact:
    """One version with that figure."""
    return publish(root, f"auc {auc}", metrics={"test_auc": auc}, **changes)


def promote(
    root: Path, made: Artifact, **options: object
) -> tuple[Artifact, tuple[PromotionCheck, ...]]:
    """Through the gates."""
    return registry.promote(root, made.name, made.version, golden=proven, **options)  # type: ignore[arg-type]


# gates


@pytest.mark.parametrize(
    ("cost", "came"),
    [
        (None, "not measured"),
        ([0.01, None, None], "not measured"),
        ([0.02, -0.01, 0.05], "+0.0200 [-0.0100, +0.0500]"),
        ([0.02, 0.01, 0.03], ""),
    ],
)
def test_a_ralf_of_two_streams_needs_a_residual_that_is_at_work(
    tmp_path: Path, cost: object, came: str
):
    """Closing it must cost AUC on the family held out, beyond chance; else it is a classifier."""
    metrics = {} if cost is None else {"residual": {"closed": {"costs held out": cost}}}
    network = Network(build="ralf", sees="bands")
    made = publish(tmp_path, f"{cost}", network=network, metrics=metrics)

    if came:
        with pytest.raises(NotPromoted, match=r"residual REFUSED.*--without-residual") as refused:
            promote(tmp_path, made)
        assert came in str(refused.value)
    else:
        assert "residual" in [gate.name for gate in promote(tmp_path, made)[1]]


def test_the_first_version_has_nothing_to_be_worse_than(tmp_path: Path):
    """No version in place, the torch engine for the CPU, golden agreement."""
    made = measured(tmp_path, 0.5)
    _, gates = promote(tmp_path, made)

    assert [("engines", True), ("metrics", True), ("limits", True), ("golden", True)] == [
        (gate.name, gate.passed) for gate in gates
    ]
    assert made == models.resolve(tmp_path, "tiny")


@pytest.mark.parametrize(
    ("auc", "passed"),
    [(0.95, True), (0.90, True), ([0.89, 0.8, 0.95], True), (0.8899, False), (None, False)],
)
def test_a_figure_may_fall_by_the_margin_and_no_further(tmp_path: Path, auc: object, passed: bool):
    """0.90 is in place and the margin 0.01; one that was not measured is worse."""
    promote(tmp_path, measured(tmp_path, [0.90, 0.88, 0.92]))
    made = measured(tmp_path, auc)
    if passed:
        promote(tmp_path, made)
    else:
        with pytest.raises(NotPromoted, match=r"asked test_auc at least 0\.8900 .* 0\.9000"):
            promote(tmp_path, made)

    assert passed == (models.promoted(tmp_path, "tiny") == made.version)


def test_the_margin_is_the_manifests_and_figures_may_lie_deeper(tmp_path: Path):
    """Names with dots lead inwards; a figure that the one in place lacks is not asked for."""
    promote(tmp_path, publish(tmp_path, metrics={"ffpp": {"auc": 0.9}}))
    margins = {"ffpp.*": 0.1, "celeb.auc": 0.0}
    worse = publish(tmp_path, "worse", metrics={"ffpp": {"auc": 0.79}}, margins=margins)
    fair = publish(tmp_path, "fair", metrics={"ffpp": {"auc": 0.81}}, margins=margins)

    with pytest.raises(NotPromoted, match=r"ffpp\.auc 0\.7900"):
        promote(tmp_path, worse)
    assert fair == promote(tmp_path, fair)[0]


def test_the_cards_figures_are_compared_without_being_named(tmp_path: Path):
    """Those on which more is better; what is told is what fell, not all that did not."""
    card = {"crop clean auc seen": [0.9, 0.8, 1.0], "crop h264=40 auc held out": 0.8}
    promote(tmp_path, publish(tmp_path, metrics=card | {"crop clean ece": 0.01}))
    worse = card | {"crop h264=40 auc held out": 0.77, "crop clean ece": 0.9}

    with pytest.raises(
        NotPromoted, match=r"asked crop h264=40 auc held out at least 0\.7800 [^,]*;"
    ):
        promote(tmp_path, publish(tmp_path, "worse", metrics=worse))
    fair = card | {"crop h264=40 auc held out": 0.79}
    promote(tmp_path, publish(tmp_path, "fair", metrics=fair))


def test_figures_on_two_held_out_families_are_not_compared(tmp_path: Path):
    """A better figure on another family says nothing; the refusal names both families."""
    figure = {"crop clean auc held out": 0.8}
    promote(tmp_path, publish(tmp_path, "boundary", metrics=figure))
    better = {"crop clean auc held out": 0.9}
    swap = publish(tmp_path, "swap", metrics=better, trained={"held_out": "swap"})
    same = publish(tmp_path, "same", metrics=better, trained={"held_out": "boundary"})

    with pytest.raises(NotPromoted, match=r"on the family boundary.*on the family swap"):
        promote(tmp_path, swap)
    assert same == promote(tmp_path, same)[0]


def test_a_target_without_its_engine_is_refused_with_the_command_that_builds_it(tmp_path: Path):
    """And a target that is none is a fault of the manifest."""
    made = publish(tmp_path, targets=("cpu", "sm90-verified"))
    with pytest.raises(NotPromoted, match=rf"sm90.*ralf build tiny@{made.version}"):
        promote(tmp_path, made)
    odd = publish(tmp_path, "odd", targets=("toaster",))
    with pytest.raises(NotPromoted, match="a target is cpu"):
        promote(tmp_path, odd)

    assert models.promoted(tmp_path, "tiny") is None


def test_force_overrides_and_the_history_keeps_what_it_overrode(tmp_path: Path):
    """Also after a rollback: the record is only added to."""
    good, bad = measured(tmp_path, 0.9), measured(tmp_path, 0.6)
    promote(tmp_path, good)
    promote(tmp_path, bad, force=True)
    registry.rollback(tmp_path, "tiny")
    told = registry.events(tmp_path / "tiny")

    assert [
        (good.version, "promoted"),
        (bad.version, "promoted"),
        (good.version, "rolled_back"),
    ] == [(event.version, event.kind) for event in told]
    assert ["", True, ""] == [
        told[0].remark,
        "forced past metrics REFUSED" in told[1].remark and "0.6000" in told[1].remark,
        told[2].remark,
    ]
    assert all(event.at for event in told)


def test_force_that_overrides_nothing_leaves_no_remark(tmp_path: Path):
    """A habit of forcing must not look like one."""
    promote(tmp_path, measured(tmp_path, 0.9), force=True)

    assert [""] == [event.remark for event in registry.events(tmp_path / "tiny")]


def test_a_promotion_by_somebody_else_meanwhile_is_not_overwritten(tmp_path: Path):
    """The checks compared with another version."""
    one, two, three = (measured(tmp_path, auc) for auc in (0.90, 0.91, 0.905))
    promote(tmp_path, one)

    def slow(artifact: Artifact) -> PromotionCheck:
        registry.point_to(tmp_path, "tiny", two.version)
        return PROVEN

    with pytest.raises(ArtifactError, match=f"another process meanwhile, to {two.version}"):
        registry.promote(tmp_path, "tiny", three.version, golden=slow)
    assert two == models.resolve(tmp_path, "tiny")


def test_a_damaged_version_in_place_does_not_bar_its_successor(tmp_path: Path):
    """It is the very case in which another one is needed."""
    broken, whole = measured(tmp_path, 0.99), measured(tmp_path, 0.9)
    promote(tmp_path, broken)
    (broken.path / "card.md").write_text("changed")

    assert whole == promote(tmp_path, whole)[0]


def test_the_golden_gate_runs_the_network(tiny_models: Path, tmp_path: Path):
    """The published one passes; with golden logits that are not its own it does not."""
    tiny = models.resolve(tiny_models, "tiny")
    files: dict[str, bytes | Path] = {name: tiny.read(name) for name in tiny.manifest.files}
    own = models.golden(tiny)
    lie = models.Golden(own.crops, own.logits + 1).to_bytes()
    liar = models.publish(tmp_path, tiny.manifest, files | {"golden.npz": lie})

    assert registry.check_golden_logits(tiny).passed
    refused = registry.check_golden_logits(liar)
    assert not refused.passed
    assert "golden crops differ by 1.0" in refused.came


# the history


def test_a_history_of_an_older_release_still_leads_back(tmp_path: Path):
    """Bare versions, a line each."""
    one, two = publish(tmp_path), publish(tmp_path, "two")
    registry.point_to(tmp_path, "tiny", one.version)
    registry.point_to(tmp_path, "tiny", two.version)
    (tmp_path / "tiny" / "history").write_text(f"{one.version}\n{two.version}\nnonsense\n")

    assert one == registry.rollback(tmp_path, "tiny")


def test_rollbacks_lead_back_further_each_time_also_over_new_promotions(tmp_path: Path):
    """The pile of promotions, whatever was taken off it in between."""
    a, b, c = (publish(tmp_path, card).version for card in "abc")
    for version in (a, b):
        registry.point_to(tmp_path, "tiny", version)
    registry.rollback(tmp_path, "tiny")
    registry.point_to(tmp_path, "tiny", c)

    assert a == registry.rollback(tmp_path, "tiny").version
    with pytest.raises(NotFound, match="nothing was promoted before"):
        registry.rollback(tmp_path, "tiny")
    registry.point_to(tmp_path, "tiny", b)
    assert a == registry.rollback(tmp_path, "tiny").version


# collecting


def fates(root: Path, **options: object) -> dict[str, str]:
    """Why each version stays."""
    found = registry.collect(root, "tiny", **options)  # type: ignore[arg-type]
    return {place.version: place.kept for place in found}


@pytest.fixture
def seven(tmp_path: Path) -> list[str]:
    """Seven versions, oldest first; the third was promoted, then the fifth."""
    made = [publish(tmp_path, f"card {number}") for number in range(7)]
    for age, version in enumerate(made):
        os.utime(version.path / "manifest.json", (1e9 + age, 1e9 + age))
    for number in (2, 4):
        registry.point_to(tmp_path, "tiny", made[number].version)
    return [version.version for version in made]


def test_only_the_old_that_nobody_needs_goes(tmp_path: Path, seven: list[str]):
    """Not the promoted, the newest, those lately promoted, nor those that jobs pin."""
    kept = fates(tmp_path, keep=1, recent=2, spared={seven[0][:6]: "pinned by a job"}, apply=True)

    assert {
        seven[0]: "pinned by a job",
        seven[1]: "",
        seven[2]: "in the last 2 promotions",
        seven[3]: "",
        seven[4]: "promoted",
        seven[5]: "",
        seven[6]: "among the 1 newest",
    } == kept
    assert [seven[0], seven[2], seven[4], seven[6]] == models.versions(tmp_path, "tiny")
    assert seven[2] == registry.rollback(tmp_path, "tiny").version


def test_looking_removes_nothing(tmp_path: Path, seven: list[str]):
    """What is shown is what would go."""
    before = everything(tmp_path)
    shown = fates(tmp_path, keep=1, recent=1)

    assert before == everything(tmp_path)
    assert shown == fates(tmp_path, keep=1, recent=1, apply=True)
    assert [v for v in seven if shown[v]] == models.versions(tmp_path, "tiny")


def test_the_promoted_stays_whatever_is_asked(tmp_path: Path, seven: list[str]):
    """None newest, none lately promoted."""
    fates(tmp_path, keep=0, recent=0, apply=True)

    assert [seven[4]] == models.versions(tmp_path, "tiny")


def test_what_a_running_process_holds_stays_until_it_ends(tmp_path: Path, seven: list[str]):
    """Even when it is killed: the lock is the kernel's."""
    code = "import sys; from pathlib import Path; from ralf.kernels.atomic_files import hold; "
    code += "hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "tiny" / seven[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert b"held\n" == process.stdout.readline()
        held = fates(tmp_path, keep=1, recent=1, apply=True)[seven[0]]
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    assert "held by a running process" == held
    assert (tmp_path / "tiny" / seven[0]).is_dir()
    assert "" == fates(tmp_path, keep=1, recent=1, apply=True)[seven[0]]
    assert not (tmp_path / "tiny" / seven[0]).exists()


def test_a_version_that_is_being_removed_cannot_be_held(tmp_path: Path):
    """Who comes too late hears of it at once."""
    made = publish(tmp_path)
    with unused(made.path) as free:
        assert free
        with pytest.raises(BlockingIOError, match="being removed"):
            hold(made.path)


def test_killed_at_any_step_collecting_leaves_each_version_whole_or_gone(
    tmp_path: Path, seven: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Also in the middle of removing files; the next collecting sweeps what is left."""
    whole = set(seven)

    def collect():
        fates(tmp_path, keep=1, recent=1, apply=True)

    def check():
        for version in models.versions(tmp_path, "tiny"):
            models.open_artifact(tmp_path / "tiny" / version)
        assert seven[4] == models.promoted(tmp_path, "tiny")
        assert {seven[4], seven[6]} <= set(models.versions(tmp_path, "tiny")) <= whole

    steps = 0
    for step in range(1, 100):
        with monkeypatch.context() as patch:
            dying(patch, step)
            try:
                collect()
            except Killed:
                check()
            else:
                steps = step
                break
    check()

    assert steps > 5
    assert {seven[4], seven[6]} == set(models.versions(tmp_path, "tiny"))
    assert [] == list((tmp_path / "tiny").glob(".old-*"))


def dying(patch: pytest.MonkeyPatch, step: int) -> None:
    """Die before the given rename, flush or removal of one file or folder."""
    counted = 0

    def wrap(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal counted
            counted += 1
            if counted == step:
                raise Killed(real.__name__)
            return real(*args, **options)

        return call

    for name in ("rename", "fsync", "unlink", "rmdir"):
        patch.setattr(os, name, wrap(getattr(os, name)))


def test_killed_at_any_step_a_forced_promotion_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The remark is there exactly when the promotion is."""
    good, bad = measured(tmp_path, 0.9), measured(tmp_path, 0.6)
    promote(tmp_path, good)

    def check():
        now = models.resolve(tmp_path, "tiny")
        told = registry.events(tmp_path / "tiny")
        assert now in (good, bad)
        assert told[-1].version == now.version
        assert ("forced" in told[-1].remark) == (now == bad)

    survives_death_at_each_step(monkeypatch, lambda: promote(tmp_path, bad, force=True), check)
    check()
    assert bad == models.resolve(tmp_path, "tiny")


# the manifest's part


@pytest.mark.parametrize(
    ("edges", "counts"),
    [
        ((0.5,), (1,)),
        ((0.5,), (0, 0)),
        ((0.5, 0.4), (1, 1, 1)),
        ((), (1,)),
        ((0.5, 0.5), (1, 1, 1)),
    ],
)
def test_a_reference_of_scores_checks_itself(edges: tuple[float, ...], counts: tuple[int, ...]):
    """Ascending edges, one bin more than edges, something in them."""
    with pytest.raises(ValueError, match=r"edges|counts"):
        Reference(edges=edges, counts=counts)
    assert Manifest.model_validate_json(DRAFT.model_dump_json(by_alias=True)) == DRAFT


# commands


def test_the_commands_show_gates_history_and_what_may_go(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Refused with exit 1, forced with the reason on record, collected by rule."""
    tiny = models.resolve(tiny_models, "tiny")
    files: dict[str, bytes | Path] = {name: tiny.read(name) for name in tiny.manifest.files}
    made = [
        models.publish(tmp_path, tiny.manifest.model_copy(update={"metrics": metrics}), files)
        for metrics in ({"test_auc": 0.9}, {"test_auc": 0.7})
    ]
    good, bad = made
    where = ["--models", str(tmp_path)]

    assert 0 == main(["models", "promote", good.label, *where])
    assert "golden passed" in capsys.readouterr().err
    assert 1 == main(["models", "promote", bad.label, *where])
    assert "metrics REFUSED: asked test_auc at least 0.8900" in capsys.readouterr().err
    assert 0 == main(["models", "promote", bad.label, *where, "--force"])
    assert 0 == main(["models", "rollback", "tiny", *where])
    assert 2 == main(["models", "promote", "tiny", *where])
    capsys.readouterr()
    assert 0 == main(["models", "show", bad.label, *where, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert ["promoted"] == [event["kind"] for event in shown["history"]]
    assert "forced past metrics" in shown["history"][0]["remark"]
    rule = ["models", "gc", "tiny", *where, "--keep", "0", "--recent", "1", "--no-queue"]
    assert 0 == main([*rule, "--json"])
    assert {good.version: "promoted", bad.version: ""} == {
        place["version"]: place["kept"] for place in json.loads(capsys.readouterr().out)
    }
    assert 0 == main([*rule, "--apply"])
    assert [good.version] == models.versions(tmp_path, "tiny")


def test_collecting_asks_the_queue_and_refuses_without_an_answer(
    tmp_path: Path, seven: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """No Redis there: nothing is known of what jobs pin, so nothing goes."""
    monkeypatch.setenv("RALF_REDIS_URL", f"unix://{tmp_path}/nowhere.sock")

    assert 5 == main(["models", "gc", "tiny", "--models", str(tmp_path), "--apply"])
    assert "--no-queue" in capsys.readouterr().err
    assert 7 == len(models.versions(tmp_path, "tiny"))


def test_what_waiting_jobs_pin_stays(
    tmp_path: Path, seven: list[str], redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    """Queued or running; another model's pin is not this one's."""
    monkeypatch.setenv("RALF_REDIS_URL", redis_url)
    jobs = [
        Job(job_id=f"j{number}", token=f"t{number}", media=Media(uri="file:///a.mp4"),
            model=model, submitted_at=datetime.now(UTC))
        for number, model in enumerate([f"tiny@{seven[0]}", f"other@{seven[1]}", "tiny", None])
    ]  # fmt: skip
    store = Store(redis, Settings())
    store.submit(jobs)
    rule = ["models", "gc", "tiny", "--models", str(tmp_path), "--keep", "1", "--recent", "1"]

    assert {seven[0]: "pinned by 1 waiting or running jobs"} == store.pinned_versions("tiny")
    assert 0 == main([*rule, "--apply"])
    assert [seven[0], seven[4], seven[6]] == models.versions(tmp_path, "tiny")


def test_a_version_that_calls_too_many_strangers_forged_is_refused(tmp_path: Path):
    """Also as the first one; a figure that nobody measured is not asked for."""
    figure = "other people clean false positives"
    worse = publish(tmp_path, "worse", metrics={figure: [0.2, 0.17, 0.24]})
    fair = publish(tmp_path, "fair", metrics={figure: [0.09, 0.07, 0.12]})

    with pytest.raises(NotPromoted, match=rf"asked {figure} at most 0\.1; came {figure} 0\.2000"):
        promote(tmp_path, worse)
    promote(tmp_path, fair)
    promote(tmp_path, measured(tmp_path, 0.9))
