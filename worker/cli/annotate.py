"""`ralf scan --annotated`: the video again, every frame of it, with what the verdict says drawn in.

Each face has a box, its track's name and the score of the nearest sample.  Between two samples the
box moves in a straight line; a face that was not found in between has no box there.  The sound is
left out: the video is for the eyes of a reviewer.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ralf.worker.contract import Sample, Track, Verdict
from ralf.worker.media.decode_pyav import PyavDecoder
from ralf.worker.media.probe import probe
from ralf.worker.media.sampling import pixels_read, refuse_work
from ralf.worker.media.still import ImageDecoder
from ralf.worker.media.types import Clip, Frames, Probe
from ralf.worker.settings import Settings
from ralf.worker.wording import LABEL_WORDS

RED, BLUE, AMBER, GREY = (200, 30, 45), (0, 110, 160), (190, 120, 0), (90, 90, 90)
COLOURS = {"likely_forged": RED, "likely_authentic": BLUE}
# MPEG's usual clock: the times of clips with a variable rate fit it as well.
TICKS = 90_000
STILL_S = 1.0
"""How long a still is shown."""


def annotate(
    path: Path, place: Path, verdict: Verdict, settings: Settings, image: Probe | None = None
) -> None:
    """Write the annotated video as an MP4; `image` is the probe of a file that is an image."""
    probed = image or probe(path, settings)
    clip = Clip(probed, verdict.made.sampling)
    every = np.arange(probed.frame_count)
    # The scan decoded samples only. This decodes every frame, so the bound is checked again.
    refuse_work(pixels_read(probed, every), settings)
    decoder = ImageDecoder(settings) if image else PyavDecoder(settings.chunk_bytes)
    drawn = _drawn(decoder.frames(clip, every), verdict)
    # Written beside its place, so that a reader never sees half a video.
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".annotated-") as folder:
        whole = Path(folder, "video.mp4")
        _encode(drawn, whole, probed)
        whole.replace(place)


def _drawn(chunks: Iterator[Frames], verdict: Verdict) -> Iterator[tuple[float, Image.Image]]:
    pen: _Pen | None = None
    for chunk in chunks:
        for time_s, pixels in zip(chunk.times_s, chunk.pixels, strict=True):
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            pen = pen or _Pen(verdict, picture.size)
            pen.draw(picture, 1000 * float(time_s))
            yield float(time_s), picture


def _encode(frames: Iterator[tuple[float, Image.Image]], place: Path, probed: Probe) -> None:
    """H.264 with the clip's own times; odd sides are filled up, since 4:2:0 wants even ones."""
    width, height = probed.width + probed.width % 2, probed.height + probed.height % 2
    # Broadcast rates such as 29.97 are fractions over 1001.
    rate = Fraction(probed.frame_rate or 25).limit_denominator(1001)
    # faststart puts the index first, so that a browser plays before it has the whole file.
    with av.open(str(place), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream(
            "libx264", rate=rate, options={"crf": "20", "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        # Without the tag a player guesses the matrix, and colours shift.
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        last = -1
        for time_s, picture in _shown_for_a_while(frames, probed):
            tick = round(time_s * TICKS)
            if tick <= last:  # frames that share a time: a player shows one
                continue
            last = tick
            pixels = np.asarray(picture)
            even = ((0, height - picture.height), (0, width - picture.width), (0, 0))
            frame = av.VideoFrame.from_ndarray(np.pad(pixels, even, "edge"), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.colorspace = av.video.reformatter.Colorspace.ITU709
            frame.pts, frame.time_base = tick, Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _shown_for_a_while(
    frames: Iterator[tuple[float, Image.Image]], probed: Probe
) -> Iterator[tuple[float, Image.Image]]:
    """The frames; a still twice, because a video of one frame is over before it is seen."""
    for time_s, picture in frames:
        yield time_s, picture
        if probed.frame_count == 1:
            yield time_s + STILL_S, picture


@dataclass(frozen=True)
class _Path:
    """Where a track's face is at any time."""

    track: Track
    times_ms: NDArray[np.float64]
    boxes: NDArray[np.float64]  # [n, 4] left, top, right, bottom as fractions of the frame
    reach_ms: float
    """How long before and after a sample its box is shown."""

    @classmethod
    def of(cls, track: Track, reach_ms: float) -> "_Path":
        samples = sorted(track.samples, key=lambda sample: sample.time_ms)
        boxes = [(s.box.left, s.box.top, s.box.right, s.box.bottom) for s in samples]
        return cls(
            track.model_copy(update={"samples": tuple(samples)}),
            np.array([sample.time_ms for sample in samples], np.float64),
            np.array(boxes, np.float64),
            reach_ms,
        )

    def at(self, time_ms: float) -> tuple[NDArray[np.float64], Sample] | None:
        """The box at this time, and the nearest sample; None where the face was not found."""
        after = int(np.searchsorted(self.times_ms, time_ms))
        low, high = max(after - 1, 0), min(after, len(self.times_ms) - 1)
        nearest = min(low, high, key=lambda row: abs(self.times_ms[row] - time_ms))
        gap = self.times_ms[high] - self.times_ms[low]
        # Between two samples that lie far apart the face was not found, so it has no box there.
        inside = self.times_ms[0] <= time_ms <= self.times_ms[-1] and gap <= 3 * self.reach_ms
        if not inside and abs(self.times_ms[nearest] - time_ms) > self.reach_ms:
            return None
        share = np.clip((time_ms - self.times_ms[low]) / gap, 0, 1) if gap and inside else 0.0
        start = self.boxes[low] if inside else self.boxes[nearest]
        return start + share * (self.boxes[high] - start), self.track.samples[nearest]


class _Pen:
    """Draws one verdict on frames of one size."""

    def __init__(self, verdict: Verdict, size: tuple[int, int]) -> None:
        self.verdict = verdict
        self.size = size
        self.line = max(2, min(size) // 140)
        self.font = ImageFont.load_default(max(12, min(size) // 24))
        gap = verdict.made.longest_gap_ms or 0
        spacing = max(gap, verdict.media.duration_ms / max(verdict.made.frames_decoded, 1), 1.0)
        self.paths = [_Path.of(track, spacing) for track in verdict.tracks if track.samples]

    def draw(self, picture: Image.Image, time_ms: float) -> None:
        """Every face that is there at this time, and the verdict below."""
        canvas = ImageDraw.Draw(picture)
        # The strongest is drawn last, so that no other box hides its name.
        for path in sorted(self.paths, key=lambda path: path.track.score or 0.0):
            if (found := path.at(time_ms)) is not None:
                self._face(canvas, path.track, *found)
        score = "" if self.verdict.score is None else f" {self.verdict.score:.2f}"
        text = f"{LABEL_WORDS[self.verdict.label]}{score}"
        self._text(canvas, (0, self.size[1]), text, COLOURS.get(self.verdict.label, AMBER))

    def _face(
        self, canvas: ImageDraw.ImageDraw, track: Track, box: NDArray[np.float64], sample: Sample
    ) -> None:
        left, top, right, bottom = (box * (*self.size, *self.size)).round().astype(int).tolist()
        colour = GREY
        if track.score is not None and sample.counted:
            colour = COLOURS.get(self.verdict.threshold.decide(sample.score), AMBER)
        # A white rim, because a red box on a red wall is not seen.
        rim = (left - 1, top - 1, right + 1, bottom + 1)
        canvas.rectangle(rim, outline="white", width=self.line + 2)
        canvas.rectangle((left, top, right, bottom), outline=colour, width=self.line)
        self._text(canvas, (left, top), f"{track.track_id}  {sample.score:.2f}", colour)

    def _text(
        self, canvas: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, ...]
    ) -> None:
        """White on the colour; its lower left corner at a point, moved into the picture."""
        pad = self.line + 2
        width_of_text = self.font.getlength(text)
        ascent, descent = self.font.getmetrics()
        width, height = round(width_of_text) + 2 * pad, ascent + descent + pad
        left = min(max(at[0], 0), max(self.size[0] - width, 0))
        top = min(max(at[1] - height, 0), max(self.size[1] - height, 0))
        field = (left, top, left + width, top + height)
        canvas.rectangle(field, fill=colour, outline="white", width=max(1, self.line // 2))
        canvas.text((left + pad, top + pad // 2), text, font=self.font, fill="white")
