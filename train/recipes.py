"""The recipes by name: Python functions, each returning a whole frozen Recipe.

ralf_paper follows the paper and its authors' code to the letter; ralf and ralf_small are ours;
xception and small_classifier are what they must beat; fdfl and rcl (RCL-inspired) are two more
detectors, each with a small one beside it.  Choices that the papers leave open are
marked: [S] second-hand notes, [R] from memory, [X] not to be had; each with a word on why.  The
notes of a recipe go onto the card of the model it makes.
"""

from collections.abc import Callable
from importlib.metadata import entry_points

from ralf.kernels.manifest import InputContract, Network, Sampling
from ralf.train.forge.families import REGISTRY
from ralf.train.losses.fdfl import FdflLoss
from ralf.train.losses.objective import BceLoss
from ralf.train.losses.ralf import RalfLoss
from ralf.train.losses.rcl import RclLoss
from ralf.train.losses.reconstruct import MaskedLoss, ReconstructLoss
from ralf.train.losses.two_stream import TwoStreamLoss
from ralf.train.recipe import BLENDS, HELD_OUT, Augment, Data, Init, Optimiser, Recipe, Schedule
from ralf.train.recipe_text import RecipeError

SHARES = tuple(REGISTRY[family].share for family in BLENDS)
"""How often each family is drawn, as its function in train/forge/families.py says."""

PAPER_NOTES = (
    "L_freq takes the authors' magnitudes; equation 5 is loss.freq=difference.",
    "L_freq speaks of the un-normalised DCT: weight 1 is only the paper's on that scale.",
    "The centre sums real faces and is detached; the upload's two bugs are flags of the loss.",
    "loss.con_eps 1e-7 is AECR-Net's: the upload divides bare, which differs only at zero.",
    "Validation is on fixed frames: the upload draws an unseeded one, and its AUC jitters by it.",
    "An epoch is 225 batches on FF++, as the authors' sampler: 720 real, 2,880 forged videos.",
    "data.compression=c40 trains the paper's other rows.",
    "No clip, no EMA, constant rate, FP32: as the upload has none of the others.",
)


def ralf_paper() -> Recipe:
    """RALF as published, with the authors' code where the paper is silent."""
    return Recipe(
        name="ralf_paper",
        network=Network(build="ralf", base=32, blocks=8, backbone="xception", size=256),
        loss=RalfLoss(
            freq="magnitude",
            centre="epoch",
            alpha="epoch",
            con_pairs=False,
            con_eps=1e-7,
        ),
        data=Data(
            input=InputContract(squeeze=True, margin=1.0, sampling=Sampling(max_frames=1)),
            batch=16,
            pairing="balanced",
            frames=1,
            evaluation_frames=1,
            augment=Augment(flip=0.5),
            methods=("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures"),
            compression="c23",
            epoch_of="videos",
        ),
        optimiser=Optimiser(kind="adam", lr=1e-4, clip=None, ema=None),
        schedule=Schedule(epochs=100, shape="constant", warmup=0, evaluate_every=5, select="bce"),
        precision="fp32",
        notes=PAPER_NOTES,
    )


OUR_AUGMENT = Augment(
    jpeg=0.3, h264=0.5, resize=0.4, blur=0.2, noise=0.2, colour=0.3, other=0.5,
    margins=(1.2, 1.3, 1.45),
)  # fmt: skip
OUR_NOTES = (
    (
        "Paired batches: identity and quality cannot be a shortcut when each forgery stands beside "
        "the real face it was made from."
    ),
    "L_freq as equation 5: magnitudes forget the sign, so a phase error costs nothing.",
    "The centre moves each step: an epoch of one small dataset is few steps, of a large one many.",
    "L_con per pair, with eps: a batch mean lets one well-made forgery hide among coarse ones.",
    "[R] Rate, warm-up, decay and EMA are common practice for AdamW at this size, not searched.",
    "norm_momentum 0.05: EfficientNet-Lite's own 0.01 needs 500 steps to forget photographs.",
    (
        "norms=running: a paired batch's own statistics tell which half is forged.  76,000 faces "
        "by them ended in AUC 0.977 by the batch, and 0.827 as served."
    ),
    "H.264, JPEG and scaling hit both classes alike: uploads are compressed, labels must not be.",
)


def ralf() -> Recipe:
    """The product's full network: the paper's losses, trained on damage as uploads have it."""
    return Recipe(
        name="ralf",
        network=Network(build="ralf", base=32, blocks=8, backbone="xception", size=256),
        loss=RalfLoss(),
        data=Data(families=BLENDS, shares=SHARES, held_out=HELD_OUT, augment=OUR_AUGMENT),
        optimiser=Optimiser(lr=2e-4, weight_decay=1e-4, norm_momentum=0.05, norms="running"),
        schedule=Schedule(epochs=40, patience=10),
        notes=OUR_NOTES,
    )


def ralf_small() -> Recipe:
    """The same network, narrower: runs on two CPU cores and weighs about 9 MB in FP16."""
    return ralf().replaced(
        name="ralf_small",
        network=Network(
            build="ralf", base=16, blocks=4, backbone="tf_efficientnet_lite0", size=256
        ),
        loss=RalfLoss(perceptual="vgg16", con_patch=128),
        optimiser=Optimiser(lr=4e-4, weight_decay=1e-4, norm_momentum=0.05, norms="running"),
        schedule=Schedule(epochs=60),
        notes=(
            *OUR_NOTES,
            "L_con on a square of 128: VGG on all of it is two thirds of a step on a CPU.",
            "VGG16's first 14 layers have VGG19's shapes, and can be had where VGG19 cannot.",
        ),
    )


def ralf_small_cpu() -> Recipe:
    """ralf_small with a reconstructor that two CPU cores can train: what ships (CHAINS)."""
    small = ralf_small()
    return small.replaced(
        name="ralf_small_cpu",
        network=small.network.model_copy(update={"base": 8, "blocks": 2, "sees": "both"}),
        loss=small.loss.replaced(weight_con=0.0, con_patch=64),
        data=small.data.replaced(batch=16),
        optimiser=small.optimiser.replaced(ema=0.99),
        schedule=small.schedule.replaced(steps=450, evaluate_every=4, select="last"),
        notes=(
            *small.notes,
            "No L_con: VGG would take a quarter of the faces that the time allows.",
            "It begins from small_classifier's weights: 450 steps are too few for both.",
            "sees=both: the crop beside the residual, so that it begins as that classifier.",
            "The last weights: 242 clean stills of the val split are too few to choose by.",
        ),
    )


def small_classifier() -> Recipe:
    """ralf_small's classifier alone: same backbone, data and budget; what RALF must beat."""
    return ralf_small().replaced(
        name="small_classifier",
        network=Network(build="classifier", backbone="tf_efficientnet_lite0", size=256),
        loss=BceLoss(),
        notes=("The comparison: all as ralf_small, without destructor and reconstructor.",),
    )


TWO_STREAM = Network(
    build="ralf", base=8, blocks=2, backbone="tf_efficientnet_lite0", size=256,
    sees="bands", keeps=6.0, leaves=0.5,
)  # fmt: skip
TWO_STREAM_NOTES = (
    (
        "network.keeps=6: the mask keeps what lies below level 6, light and colour, and half of "
        "the rest. A level is the sum of a coefficient's two indices in a DCT of 256 px, 0 to 510."
    ),
    "The reconstructor learnt on real faces alone, and is frozen: no forgery may teach it.",
    (
        "The signed residual by bands, over its deviation on real faces, has a stem and a loss of "
        "its own; the gates that let it in begin at 0.1, at 20 times the rate, without decay."
    ),
    "drop_plain=0.3: on three batches of ten the residual has to do without the crop.",
)
FROZEN = ("reconstructor*0", "mask*0")


def reconstructor() -> Recipe:
    """RALF's reconstructor alone, on real faces damaged as uploads are; no detector yet."""
    small = ralf_small()
    parts = ("classifier", "residual", "residual_head", "guide", "attention", "gate", "mask")
    return small.replaced(
        name="reconstructor",
        network=TWO_STREAM,
        loss=ReconstructLoss(),
        data=Data(pairing="reals", batch=8, augment=OUR_AUGMENT),
        optimiser=Optimiser(
            lr=1e-3,
            weight_decay=1e-4,
            # No average: the measured deviations must be those of the published weights.
            ema=None,
            rates=tuple(f"{part}*0" for part in parts),
        ),
        schedule=Schedule(steps=3750, evaluate_every=4, select="last"),
        init=Init(backbone=None),
        notes=TWO_STREAM_NOTES[:2],
    )


def masked_backbone() -> Recipe:
    """A classifier's backbone on real faces without a label; a classifier's `init.backbone`."""
    small = small_classifier()
    return small.replaced(
        name="masked_backbone",
        loss=MaskedLoss(),
        data=Data(pairing="reals", batch=16, augment=OUR_AUGMENT),
        optimiser=small.optimiser.replaced(
            # Reals alone: a batch's statistics give no label away.  No average: the decoder,
            # which validation needs too, has none.
            norms="batch", ema=None, rates=("head*0",),
        ),
        schedule=Schedule(steps=3000, evaluate_every=4, select="last"),
        notes=(
            "RALF's idea without its reconstructor: the backbone says what is missing.",
            "Labels come afterwards: init.backbone=RUN of a classifier.",
        ),
    )  # fmt: skip


def two_stream() -> Recipe:
    """RALF on the crop and on its signed residual by bands: begins from `residual_stream`."""
    small = ralf_small()
    return small.replaced(
        name="two_stream",
        network=TWO_STREAM,
        loss=TwoStreamLoss(),
        data=small.data.replaced(batch=16),
        optimiser=small.optimiser.replaced(
            ema=0.99, rates=(*FROZEN, "gate*20"), no_decay=("mask", "gate")
        ),
        schedule=Schedule(steps=2500, evaluate_every=8, select="last"),
        notes=TWO_STREAM_NOTES,
    )


def residual_stream() -> Recipe:
    """The residual alone, before the crop comes in: begins from `reconstructor`."""
    both = two_stream()
    crop = ("classifier.stem*0", "classifier.head*0", "gate*0")
    return both.replaced(
        name="residual_stream",
        loss=TwoStreamLoss(streams="residual"),
        optimiser=both.optimiser.replaced(rates=(*FROZEN, *crop)),
        schedule=both.schedule.replaced(steps=1875),
    )


def xception() -> Recipe:
    """The field's baseline, as DeepfakeBench trains it, on whatever forgeries are on disk."""
    return Recipe(
        name="xception",
        network=Network(build="classifier", backbone="xception", size=256),
        loss=BceLoss(),
        data=Data(
            pairing="balanced",
            frames=32,
            augment=Augment(jpeg=0.3, blur=0.2, noise=0.2, colour=0.3),
        ),
        optimiser=Optimiser(kind="adam", lr=2e-4, weight_decay=5e-4, clip=None, ema=None),
        schedule=Schedule(epochs=10, shape="constant", warmup=0),
        notes=(
            "Adam 2e-4, decay 5e-4, batch 32, ten epochs at 256: DeepfakeBench's Xception.",
            "Its schedule never stepped (a bug), so the rate is constant here by intent.",
        ),
    )


FDFL_NOTES = (
    "[R] loss.weight 0.5 is from memory; loss.margin 0.3 is the open implementations' default.",
    "[X] Norms and activations of the mining block, its width, the fusion: see the network.",
    "network.fusion=gate begins near its backbone; fresh convolutions there forget what it knew.",
    "network.gate=0.1: a gate of 0 gives the mining block no gradient, and hardly ever opens.",
    "[X] Input size, optimiser and schedule are not published where we can read: ralf's here.",
    "loss.centre=faces: a centre drawn at random lies far from every face; random is as published.",
    "The paper names its own limit: no gain on forgeries of other methods than it trained on.",
)


def fdfl() -> Recipe:
    """FDFL on the product's data: pixels and block frequencies, single-center loss."""
    full = ralf()
    return full.replaced(
        name="fdfl",
        network=Network(build="fdfl", backbone="xception", size=256, fusion="gate", gate=0.1),
        loss=FdflLoss(),
        optimiser=full.optimiser.replaced(rates=("fuse.factor*20",)),
        notes=FDFL_NOTES,
    )


def fdfl_small() -> Recipe:
    """FDFL around ralf_small's backbone: 3.8 M parameters, 2 GFLOP a face."""
    full, small = fdfl(), ralf_small()
    return small.replaced(
        name="fdfl_small",
        network=full.network.model_copy(update={"backbone": "tf_efficientnet_lite0"}),
        loss=full.loss,
        optimiser=small.optimiser.replaced(rates=full.optimiser.rates),
        notes=FDFL_NOTES,
    )


RCL_NOTES = (
    "RCL-inspired: only RCL's abstract can be had, so each part has its words and our form.",
    "[X] Every weight, the margin, what is mined and how far it is pushed: ours, not searched.",
    "loss.temperature 0.1 and five hard ones are common in contrastive work on forgeries.",
    "The projection is for training; what is published is the classifier that it shaped.",
)


def rcl() -> Recipe:
    """The RCL-inspired detector: a plain classifier, trained around natural faces' centre."""
    full = ralf()
    return full.replaced(
        name="rcl",
        network=Network(build="classifier", backbone="xception", size=256),
        loss=RclLoss(),
        data=full.data.replaced(pairing="kindred"),
        notes=RCL_NOTES,
    )


def rcl_small() -> Recipe:
    """The same with ralf_small's backbone: small_classifier's network and cost."""
    small = ralf_small()
    return small.replaced(
        name="rcl_small",
        network=Network(build="classifier", backbone="tf_efficientnet_lite0", size=256),
        loss=RclLoss(),
        data=small.data.replaced(pairing="kindred"),
        notes=RCL_NOTES,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    # By the function's own name, so that the two cannot differ.
    made.__name__: made
    for made in (
        ralf_paper,
        ralf,
        ralf_small,
        ralf_small_cpu,
        small_classifier,
        reconstructor,
        masked_backbone,
        residual_stream,
        two_stream,
        xception,
        fdfl,
        fdfl_small,
        rcl,
        rcl_small,
    )
}


GROUP = "ralf.recipes"
"""Another package adds a recipe by an entry point of this group: its name, and the function."""


def named(name: str) -> Recipe:
    """The recipe of that name; an unknown one is refused with the known."""
    # Ours come first, so that no installed package changes what a name here means.
    if name in RECIPES:
        return RECIPES[name]()
    for entry in entry_points(group=GROUP, name=name):
        found: Recipe = entry.load()()
        return found
    known = sorted({*RECIPES, *entry_points(group=GROUP).names})
    raise RecipeError(f"no recipe {name!r}; known: {', '.join(known)}")
