"""The only place that chooses CPU or GPU parts, and warms them up.

Parts are made once per process: the model is opened and checked against its golden file, the
finder's networks are loaded, and one black crop is scored, so that the first job is not slower
than the next.  A device that is not there is an error, never a silent fallback.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import structlog
import torch

from ralf import install_hint
from ralf.kernels import plans
from ralf.kernels.artifact import SHIPPED, Artifact, ArtifactError, resolve
from ralf.kernels.choose_engine import load as load_engine
from ralf.kernels.engine import Engine, EngineError
from ralf.kernels.manifest import Finder
from ralf.worker.batcher import Batcher
from ralf.worker.contract import Sampling
from ralf.worker.errors import Infrastructure, ModelUnavailable
from ralf.worker.media.decode_dali import DaliDecoder, dali_version, nvdec_present
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.mtcnn import Mtcnn
from ralf.worker.media.routing import RoutedDecoder
from ralf.worker.media.stride import StridedFinder
from ralf.worker.media.types import Decoder, FaceFinder
from ralf.worker.settings import Settings, SettingsError

log = structlog.get_logger()


@dataclass(frozen=True)
class Parts:
    """What analyze() works with; one per process and model."""

    settings: Settings
    artifact: Artifact
    engine: Engine
    decoder: Decoder = field(repr=False)
    finder: FaceFinder = field(repr=False)
    finder_settings: Finder
    refused_plans: tuple[str, ...] = ()
    """Why plans of this version are not used here: they are not signed, and keys are set."""

    @property
    def finder_changed(self) -> bool:
        """Whether the finder differs from the model's own: another smallest face, or a stride."""
        theirs = self.artifact.manifest.input.finder
        return self.finder_settings != theirs or self.settings.find_every > 1

    @property
    def default_sampling(self) -> Sampling:
        """The sampling that this model was calibrated with."""
        return Sampling(**self.artifact.manifest.input.sampling.model_dump())


def models_dir(settings: Settings) -> Path:
    """The folder of the models: RALF_MODELS_DIR, else the folder that ships with the code."""
    return Path(settings.models_dir or SHIPPED)


def cores(settings: Settings) -> int:
    """CPU threads to use: RALF_THREADS, else what this process may run on."""
    return settings.threads or len(os.sched_getaffinity(0))


def load(
    settings: Settings,
    *,
    model: str | None = None,
    device: str | None = None,
    min_face: int | None = None,
) -> Parts:
    """Open the model, build the parts for the device, and warm them.

    min_face overrides the model's smallest face; verdicts made so are marked uncalibrated.
    """
    torch.set_num_threads(cores(settings))
    device = device or settings.device
    try:
        artifact = resolve(models_dir(settings), model or settings.model)
        # None: both keys are in the environment, as for `ralf build`.
        public_key = settings.plan_public_key or None
        engine = load_engine(artifact, device=device, plan_public_key=public_key)
        refused = () if engine.device == "cpu" else tuple(plans.refused(artifact, public_key))
    except (ArtifactError, EngineError) as error:
        raise ModelUnavailable(str(error)) from error
    finder = artifact.manifest.input.finder
    if min_face is not None:
        finder = finder.model_copy(update={"min_face": min_face})
    # The engine's device, where `auto` is already resolved.
    face_finder: FaceFinder = Mtcnn(finder, device=engine.device)
    if settings.find_every > 1:
        face_finder = StridedFinder(face_finder, settings.find_every)
    parts = Parts(
        settings=settings,
        artifact=artifact,
        engine=engine,
        decoder=choose_decoder(settings, engine.device),
        finder=face_finder,
        finder_settings=finder,
        refused_plans=refused,
    )
    warm(parts)
    if engine.name == "torch-eager":
        why = "SLOW: no plan and no compiled kernels; build a plan on this GPU: ralf build --all"
        log.warning("engine.slow", device=engine.device, why=why)
    log.info(
        "runtime.loaded",
        model=f"{artifact.manifest.name}@{artifact.version}",
        engine=engine.name,
        precision=engine.precision,
        device=engine.device,
        decoder=parts.decoder.name,
    )
    return parts


def choose_decoder(settings: Settings, device: str) -> Decoder:
    """PyAV on a CPU; on a GPU each clip goes where it finishes first, or to the one pinned."""
    if settings.decoder not in ("auto", "pyav", "dali"):
        raise SettingsError(f"RALF_DECODER should be auto, pyav or dali, got {settings.decoder!r}")
    pyav = PyavDecoder(chunk_bytes=settings.chunk_bytes, threads=cores(settings))
    missing = why_no_dali(device)
    if settings.decoder == "pyav" or (missing and settings.decoder == "auto"):
        # On a CPU there is no other decoder to report about.
        if device != "cpu":
            log.info("decoder.chosen", decoder="pyav", why=missing or "RALF_DECODER=pyav")
        return pyav
    if missing:
        raise Infrastructure(f"RALF_DECODER=dali, but {missing}")
    dali = DaliDecoder(pyav, device=device, chunk_bytes=settings.gpu_chunk_bytes)
    try:
        # Here and not at the first clip: whatever DALI lacks must be known before the worker takes
        # a job.
        dali.warm()
    except Infrastructure as error:
        if settings.decoder == "dali":
            raise
        log.warning("decoder.failed", decoder="dali", error=str(error))
        return pyav
    if settings.decoder == "dali":
        return dali
    return RoutedDecoder(pyav, dali, cores=cores(settings))


def why_no_dali(device: str) -> str:
    """Why DALI cannot decode on this device; empty when it can."""
    if torch.device(device).type != "cuda":
        return f"the device is {device}, no GPU"
    if dali_version() is None:
        return "DALI is not installed; " + install_hint("gpu")
    # NVIDIA's container runtime gives a container the compute libraries by default, and the video
    # ones only where they are named.
    if not nvdec_present():
        return (
            "there is no libnvcuvid.so.1: in a container set "
            "NVIDIA_DRIVER_CAPABILITIES=video,compute,utility"
        )
    return ""


def warm(parts: Parts) -> None:
    """Score one black crop, so that kernels are chosen and memory is allocated."""
    size = parts.artifact.manifest.input.size
    logits = parts.engine(torch.zeros((1, 3, size, size), dtype=torch.uint8))
    if not np.isfinite(logits.numpy()).all():
        raise ModelUnavailable(
            f"{parts.artifact.manifest.name} gives {logits.tolist()} for a black crop; "
            "expected a finite logit; publish the model again"
        )


def with_decoder(parts: Parts, decoder: Decoder) -> Parts:
    """The same parts with another decoder."""
    return replace(parts, decoder=decoder)


def together(parts: Parts) -> Parts:
    """The same parts for several threads, whose crops share batches (batcher.py)."""
    return replace(parts, engine=Batcher(parts.engine))
