"""The manifest of a model: its network, its input, and the figures measured with it.

One JSON document, checked by pydantic, never changed after publishing: the version of a model is
the first 8 hex digits of this file's SHA-256.  Imports no torch, so that a backend may read it.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
"""What the bulk of a network's arithmetic is done in; fp8 exists only in TensorRT plans, where it
is that of the reconstructor's wide levels, beside FP16."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Unit = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Frozen, and an unknown name is an error: a typo must not become a default."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Sampling(Strict):
    """Which frames of a clip are judged."""

    mode: Literal["uniform", "fps", "keyframes"] = "uniform"
    """uniform: evenly over the clip; fps: so many a second; keyframes: those that decode alone."""
    max_frames: Annotated[int, Field(ge=1, le=300)] = 32
    """How many frames at most; a job that asks for no sampling gets more of a long clip."""
    fps: Annotated[float, Field(gt=0, le=120)] | None = None
    """Only for mode fps: frames judged per second of video."""


class Finder(Strict):
    """How faces are found."""

    long_side: Annotated[int, Field(ge=128, le=8192)] = 640
    """Frames are reduced so that their longer side is this, or what shows min_face at 12 pixels if
    that is more; never enlarged."""
    min_face: Annotated[int, Field(ge=12, le=2000)] = 48
    """Smallest face, in pixels of the source."""


class InputContract(Strict):
    """How crops are cut for this model; preparation of training data and the worker read it."""

    size: Annotated[int, Field(ge=32, le=1024)] = 256
    margin: Annotated[float, Field(ge=1.0, le=3.0)] = 1.3
    """Side of the square crop over the longer side of the face's box."""
    squeeze: bool = False
    """True: the box itself, squeezed to a square (the paper's way); margin is then ignored."""
    padding: Literal["edge", "zero"] = "edge"
    colour: Literal["by_tag_untagged_601"] = "by_tag_untagged_601"
    finder: Finder = Finder()
    sampling: Sampling = Sampling()


class Network(BaseModel):
    """`build` names a network of ralf.kernels.networks; every other field is a dimension of it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    build: str

    @property
    def dimensions(self) -> dict[str, Any]:
        """The keyword arguments of ralf.kernels.networks.build."""
        return dict(self.model_extra or {})


class Aggregation(Strict):
    """How the scores of faces become a track's score, and tracks' scores the video's."""

    track: Literal["top_half_mean", "mean", "trimmed_mean", "top_k_mean"] = "top_half_mean"
    k: Annotated[int, Field(ge=1, le=300)] = 8
    """Only for top_k_mean."""
    min_faces: Annotated[int, Field(ge=1, le=300)] = 3
    """A track with fewer sampled faces does not decide the video alone."""
    min_face_px: Annotated[int, Field(ge=1, le=2000)] = 48
    """Faces smaller than this are shown but do not count."""


class CompressionPoint(Strict):
    """Temperature and shift at one strength of compression."""

    bits_per_pixel: Annotated[float, Field(gt=0)]
    """Of the video's packets, for each pixel of each frame."""
    temperature: Annotated[float, Field(gt=0)]
    shift: float


class Calibration(Strict):
    """P(forged) = sigmoid((logit − shift) / temperature)."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    shift: float = 0.0
    fitted_on: str = "nothing"
    by_compression: tuple[CompressionPoint, ...] = ()
    """Replaces temperature and shift for a clip whose bits per pixel are known; ascending.
    Stills, and models published without it, use the two numbers above."""

    @model_validator(mode="after")
    def _ascends(self) -> "Calibration":
        rates = [point.bits_per_pixel for point in self.by_compression]
        if rates != sorted(set(rates)):
            raise ValueError(f"by_compression should ascend in bits_per_pixel, got {rates}")
        return self

    def at(self, bits_per_pixel: float | None) -> "Calibration":
        """The temperature and shift of a clip with so many bits per pixel; None: not known."""
        points = self.by_compression
        if not points or bits_per_pixel is None or not bits_per_pixel > 0:
            return self.model_copy(update={"by_compression": ()})
        # Nothing was fitted beyond the ends, so the nearest end is used there.
        rates = [math.log(point.bits_per_pixel) for point in points]
        rate = min(max(math.log(bits_per_pixel), rates[0]), rates[-1])
        after = min(bisect_right(rates, rate), len(points) - 1)
        before = max(after - 1, 0)
        part = (rate - rates[before]) / (rates[after] - rates[before]) if after > before else 0.0
        one, other = points[before], points[after]
        # Slope and offset of the logit are interpolated, because the fit is linear in them.
        slope = (1 - part) / one.temperature + part / other.temperature
        offset = (1 - part) * one.shift / one.temperature + part * other.shift / other.temperature
        return Calibration(temperature=1 / slope, shift=offset / slope, fitted_on=self.fitted_on)


class Reference(Strict):
    """The distribution of scores when the model was published; drift is measured against it."""

    edges: tuple[Unit, ...]
    """Ascending limits between the bins; the first bin is below the first, the last at or above the
    last."""
    counts: tuple[Annotated[int, Field(ge=0)], ...]
    """Videos in each bin: one more than edges."""
    of: str = ""
    """Which videos were scored, in words."""

    @model_validator(mode="after")
    def _consistent(self) -> "Reference":
        if list(self.edges) != sorted(set(self.edges)) or not self.edges:
            raise ValueError(f"edges should ascend, got {self.edges}")
        # Drift compares shares, and a histogram without any video has none.
        if len(self.counts) != len(self.edges) + 1 or not any(self.counts):
            raise ValueError(
                f"{len(self.edges)} edges need {len(self.edges) + 1} counts, not all 0"
            )
        return self


# Names among a manifest's metrics that the worker reads.
STRANGERS_FLAGGED = "other people clean false positives"
FORGERIES_CAUGHT = "clip any forgeries caught"
RESIDUAL_INSIDE = "residual inside the mask auc"
WORTH_SHOWING = 0.75
"""The least AUC of the residual inside a forgery's mask with which it points at forgeries."""


class Manifest(Strict):
    """manifest.json."""

    # With an underscore, because pydantic's BaseModel has a method of that name.
    schema_: Literal["ralf.model/1"] = Field("ralf.model/1", alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    network: Network
    input: InputContract = InputContract()
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    """SHA-256 of each file that belongs to the version."""
    aggregation: Aggregation = Aggregation()
    calibration: Calibration = Calibration()
    thresholds: dict[str, Unit] = Field(default_factory=dict)
    """Calibrated score at or above which a video is called forged, by policy: fpr_0.05, …"""
    policy: str = "fpr_0.05"
    """The threshold that decides; `low` is the score below which a video is called authentic."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    error_budget: dict[str, float] = Field(default_factory=lambda: {"logit": 0.05})
    """The most that another engine's logit may differ from the FP32 reference's on golden.npz.

    `logit` holds for every engine; `logit_PRECISION` (as fp16 or fp8) replaces it for engines of
    that precision.  `logit_bf16` is there only if bf16 stayed within half of `logit` when the
    model was published; without it a CPU runs the model in FP32.
    """
    targets: tuple[str, ...] = ("cpu",)
    """Where the model is to run: cpu, sm90, sm90-verified.  It is promoted only when each target
    has its engine."""
    margins: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {"test_auc": 0.01, "* auc seen": 0.01, "* auc held out": 0.02}
    )
    """Figures in `metrics` that should be high (* stands for any text), and how far each may fall
    below the promoted version's."""
    limits: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {
            STRANGERS_FLAGGED: 0.10,
            "crop jpeg=* auc lost": 0.15,
        }
    )
    """Figures in `metrics` that should be low (* stands for any text), and the most that each may
    be at a promotion; one that was not measured is not asked for."""
    reference: Reference | None = None
    """Scores of videos at publishing; None: a worker takes the first scores that it computes."""
    trained: dict[str, Any] = Field(default_factory=dict)
    untrained: bool = False
    """True for weights that were never trained: every verdict then says so."""

    def figure(self, name: str) -> tuple[float, ...] | None:
        """A share among the metrics: its value, and the ends of its interval where it has one.

        None where it was not measured; a value that is no share is not one.
        """
        given = self.metrics.get(name)
        values = tuple(given) if isinstance(given, list | tuple) else (given,)
        shares = [float(v) for v in values if isinstance(v, int | float) and 0 <= v <= 1]
        return tuple(shares) if shares and len(shares) == len(values) else None

    @property
    def residual_shows_where(self) -> bool:
        """Whether pictures of the residual point at forgeries, and may be shown to people."""
        located = self.figure(RESIDUAL_INSIDE)
        return located is not None and located[0] >= WORTH_SHOWING


USUALLY_HELD_OUT = "boundary"
"""The forgery family that a training leaves out by default."""


def held_out_family(trained: Mapping[str, Any]) -> str | None:
    """The forgery family that a model was never trained on, from its `trained` record.

    None means that it was trained on every family.  Calibration, tables, card and promotion all ask
    this function, so that all of them agree on what the model was trained on.
    """
    # Models published before the record said it had all left out this one.
    found: str | None = trained.get("held_out", USUALLY_HELD_OUT)
    return found


def never_trained_on(trained: Mapping[str, Any]) -> tuple[str, ...]:
    """Every family and generator that a model was never trained on: the family held out first."""
    family = held_out_family(trained)
    return (*([family] if family else []), *trained.get("also_held_out", ()))
