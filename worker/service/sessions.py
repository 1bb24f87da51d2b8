"""Fold the segments of one stream into a rolling verdict, in whatever order they end.

    a job's end ─▶ digest of its verdict ─▶ session:TENANT:ID ─▶ fold ─▶ stream, alert

The script of a job's end stores a segment's digest under its number, in the same step as the
verdict; the fold is a pure function of what is stored.  So a repeated, late or missing segment
changes nothing else, and a process that dies between the two steps leaves a session marked as
changed, which the janitor folds.  Store.fold_session() does the reading and writing.

Tracks are joined at a border when one ends near it and another begins near it, in segments that
follow each other, with boxes that overlap.  A joined track's score is the highest of two things:
the level over all its faces, and its scores in single segments.  So faces that are too few to
decide in any one segment decide together, and an hour of an authentic face cannot hide a forged
minute.  As in a clip, a listed segment at or above the threshold forbids `likely_authentic`; at a
border its faces may lie on both sides.  The price: many segments are many chances for a false
alarm; choose the threshold's policy for that.

Scores are stored as logits of the calibrated score.  Calibration is affine, so a mean of those is
the calibrated mean.  A fold reads all segments so far, about 0.7 kB and 0.1 ms each: start a new
session after some ten thousand.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ralf.kernels.manifest import Aggregation, Calibration
from ralf.worker.contract import (
    Box,
    FailedSegment,
    Gap,
    Label,
    SessionPart,
    SessionTrack,
    SessionVerdict,
    Threshold,
    Verdict,
)
from ralf.worker.wording import clock, digits_for, score_text, side_text

OVERLAP = 0.3
"""Least intersection over union of the two boxes at a border."""
REACH_MS = 1000
"""A face may be unseen this long across a border, or REACH_STEPS sampling steps if longer."""
REACH_STEPS = 2.5
# Bounds the document only: tracks that are not listed are judged too.
LISTED = 64
EDGE = 0.5e-6
"""Half the last digit of a score: its logit stays finite."""


@dataclass(frozen=True)
class _Piece:
    """One track within one segment, on the stream's clock."""

    number: int
    name: str
    start_ms: int
    end_ms: int
    first: tuple[float, float, float, float]
    last: tuple[float, float, float, float]
    faces: int
    logits: tuple[float, ...]
    score: float | None
    score_max: float
    unclear: bool = False
    """Scored, and yet not decisive: occluded, or in an unusual pose."""


@dataclass(frozen=True)
class _Peak:
    """The strongest listed stretch of a segment's verdict, on the stream's clock."""

    start_ms: int
    end_ms: int
    name: str
    score: float


@dataclass(frozen=True)
class _Segment:
    """What a session keeps of one segment's verdict."""

    number: int
    offset_ms: int
    step_ms: float
    model: str
    partial: bool
    threshold: Threshold
    aggregation: Aggregation
    pieces: tuple[_Piece, ...]
    peak: _Peak | None


@dataclass(eq=False)
class _Chain:
    """Pieces that are one face, in the order of their segments."""

    pieces: list[_Piece] = field(default_factory=list)

    def listed(self, aggregation: Aggregation) -> SessionTrack:
        logits = [logit for piece in self.pieces for logit in piece.logits]
        decided = [piece.score for piece in self.pieces if piece.score is not None]
        if len(logits) >= aggregation.min_faces:
            decided.append(_level(logits, aggregation))
        return SessionTrack(
            track_id=f"{self.pieces[0].number}.{self.pieces[0].name}",
            start_ms=min(piece.start_ms for piece in self.pieces),
            end_ms=max(piece.end_ms for piece in self.pieces),
            faces=sum(piece.faces for piece in self.pieces),
            score=max(decided, default=None),
            score_max=max(piece.score_max for piece in self.pieces),
            decisive=bool(decided) and not any(piece.unclear for piece in self.pieces),
            segments=tuple(piece.number for piece in self.pieces),
        )


def digest(verdict: Verdict, part: SessionPart) -> str:
    """What the session keeps of a segment's verdict, as JSON."""
    step = verdict.media.duration_ms / max(1, verdict.made.frames_decoded)
    tracks = [
        {
            "name": track.track_id,
            "start_ms": track.start_ms + part.offset_ms,
            "end_ms": track.end_ms + part.offset_ms,
            "first": _corners(track.samples[0].box),
            "last": _corners(track.samples[-1].box),
            "faces": track.faces,
            # Without the second pass, which looked where scores are high.
            "logits": [
                _logit(sample.score)
                for sample in track.samples
                if sample.counted and not sample.second_pass
            ],
            "score": track.score,
            "unclear": track.score is not None and not track.decisive,
            "score_max": track.score_max,
        }
        for track in verdict.tracks
        # Without a sample there is no box by which it could be joined.
        if track.samples
    ]
    worst = max(verdict.segments, key=lambda segment: segment.score, default=None)
    kept = {
        "peak": worst
        and {
            "start_ms": worst.start_ms + part.offset_ms,
            "end_ms": worst.end_ms + part.offset_ms,
            "name": f"{part.number}.{worst.track_id}",
            "score": worst.score,
        },
        "offset_ms": part.offset_ms,
        "step_ms": round(step, 1),
        "model": f"{verdict.made.model}@{verdict.made.version}",
        "partial": verdict.partial,
        "threshold": verdict.threshold.model_dump(),
        "aggregation": verdict.made.aggregation,
        "tracks": tracks,
    }
    return json.dumps(kept, separators=(",", ":"))


def fold(tenant: str, session_id: str, stored: Mapping[str, str]) -> SessionVerdict:
    """The rolling verdict of all that a session's hash holds, in whatever order it arrived."""
    segments = [_read(number, text) for number, text in _numbered(stored, "segment")]
    failed = [FailedSegment(number=n, code=code) for n, code in _numbered(stored, "failed")]
    last = int(stored["last"]) if "last" in stored else None
    missing = _missing(segments, [entry.number for entry in failed], last)
    # The model may change during a stream: the last segment's threshold judges all of it.
    policy = segments[-1] if segments else None
    chains = _join(segments)
    tracks = [chain.listed(policy.aggregation) for chain in chains] if policy else []
    label, score, reason = _decide(tracks, policy.threshold if policy else None)
    if (
        policy
        and label == "likely_authentic"
        and (peak := _contradiction(segments, chains, policy))
    ):
        when = f"from {clock(peak.start_ms)} to {clock(peak.end_ms)}"
        label = "inconclusive"
        reason = f"{reason[:-1]}; but {peak.name} scored {score_text(peak.score)} {when}."
    strongest = sorted(tracks, key=lambda track: (-(track.score or 0), -track.score_max))[:LISTED]
    return SessionVerdict(
        session_id=session_id,
        tenant=tenant,
        revision=int(stored.get("revision", 0)),
        label=label,
        score=score,
        reason=reason,
        threshold=policy.threshold if policy else None,
        tracks=tuple(sorted(strongest, key=lambda track: (track.start_ms, track.track_id))),
        segments=len(segments),
        complete=last is not None and not missing,
        missing=missing,
        late=_late(stored),
        repeated=tuple(number for number, _ in _numbered(stored, "repeated")),
        failed=tuple(failed),
        warnings=tuple(_warnings(segments, len(tracks))),
    )


def is_alert(verdict: SessionVerdict) -> bool:
    """Whether the session's alert is due; the script sends it once for each session."""
    return verdict.label == "likely_forged"


def facts(verdict: SessionVerdict) -> dict[str, Any]:
    """The short form in the stream and in alerts; client.session() reads the whole verdict."""
    return {
        "session_id": verdict.session_id,
        "tenant": verdict.tenant,
        "revision": verdict.revision,
        "label": verdict.label,
        "score": verdict.score,
        "segments": verdict.segments,
        "missing": sum(gap.last - gap.first + 1 for gap in verdict.missing),
        "complete": verdict.complete,
    }


def _read(number: int, text: str) -> _Segment:
    kept = json.loads(text)
    return _Segment(
        number=number,
        offset_ms=kept["offset_ms"],
        step_ms=kept["step_ms"],
        model=kept["model"],
        partial=kept["partial"],
        threshold=Threshold(**kept["threshold"]),
        aggregation=Aggregation(**kept["aggregation"]),
        # Digests of older workers have none.
        peak=_Peak(**kept["peak"]) if kept.get("peak") else None,
        pieces=tuple(
            _Piece(
                **{
                    **track,
                    "number": number,
                    "first": tuple(track["first"]),
                    "last": tuple(track["last"]),
                    "logits": tuple(track["logits"]),
                }
            )
            for track in kept["tracks"]
        ),
    )


def _numbered(stored: Mapping[str, str], kind: str) -> list[tuple[int, str]]:
    found = (name.split(":", 1) for name in stored if name.startswith(f"{kind}:"))
    return sorted((int(number), stored[f"{kind}:{number}"]) for _, number in found)


def _late(stored: Mapping[str, str]) -> tuple[int, ...]:
    by_arrival = sorted((int(order), number) for number, order in _numbered(stored, "order"))
    late, highest = [], -1
    for _, number in by_arrival:
        if number < highest:
            late.append(number)
        highest = max(highest, number)
    return tuple(sorted(late))


def _missing(
    segments: Sequence[_Segment], failed: Iterable[int], last: int | None
) -> tuple[Gap, ...]:
    """Runs of numbers that never came; numbers count from 0, unless the lowest starts the clock."""
    came = sorted({*(segment.number for segment in segments), *failed})
    if not came:
        return ()
    # A stream may count from any number: its first segment is the one that begins at 0 ms.
    opens = segments and segments[0].number == came[0] and segments[0].offset_ms == 0
    before = came[0] - 1 if opens else -1
    edges = [before, *came, *([last + 1] if last is not None and last > came[-1] else [])]
    return tuple(
        Gap(first=low + 1, last=high - 1) for low, high in pairwise(edges) if high - low > 1
    )


def _join(segments: Sequence[_Segment]) -> list[_Chain]:
    """One chain a face; a piece is joined to at most one before it and one after it."""
    chains: list[_Chain] = []
    open_ends: dict[str, _Chain] = {}
    before: _Segment | None = None
    for segment in segments:
        follows = before is not None and segment.number == before.number + 1
        matches = _matches(before, segment) if before is not None and follows else {}
        ends: dict[str, _Chain] = {}
        for piece in segment.pieces:
            partner = matches.get(piece.name)
            if partner is None:
                chain = _Chain()
                chains.append(chain)
            else:
                chain = open_ends[partner]
            chain.pieces.append(piece)
            ends[piece.name] = chain
        # Only this segment's tracks stay open: a face that is in none of them begins a new track.
        before, open_ends = segment, ends
    return chains


def _matches(before: _Segment, after: _Segment) -> dict[str, str]:
    """For tracks of `after`, the track of `before` that each goes on from: best overlap first."""
    from ralf.worker.boxes import overlap  # numpy: a client that imports store.py has none

    reach = max(REACH_MS, REACH_STEPS * max(before.step_ms, after.step_ms))
    shared = overlap([old.last for old in before.pieces], [new.first for new in after.pieces])
    # The names break ties, so that the same segments give the same tracks in whatever order they
    # end.
    pairs = sorted(
        (
            (-float(shared[i, j]), old.name, new.name)
            for i, old in enumerate(before.pieces)
            for j, new in enumerate(after.pieces)
            if abs(new.start_ms - old.end_ms) <= reach
        ),
    )
    matches: dict[str, str] = {}
    for negated, old, new in pairs:
        if -negated >= OVERLAP and new not in matches and old not in matches.values():
            matches[new] = old
    return matches


def _decide(
    tracks: Sequence[SessionTrack], threshold: Threshold | None
) -> tuple[Label, float | None, str]:
    if threshold is None:
        return "inconclusive", None, "No segment has a verdict yet."
    if not tracks:
        return "no_faces", None, "No face was found in any segment so far."
    # A scored track that may not decide is occluded, or in an unusual pose.
    decisive = [(track.score, track) for track in tracks if track.score is not None]
    if not decisive:
        return "inconclusive", None, "No face was seen often enough to decide."
    score, track = max(decisive, key=lambda pair: pair[0])
    digits = digits_for(threshold, score)
    said = f"{track.track_id}, the strongest of {len(decisive)}, scored {score_text(score, digits)}"
    label, why = threshold.decide(score), side_text(score, threshold, digits)
    if label == "likely_authentic" and not any(track.decisive for _, track in decisive):
        return "inconclusive", score, f"{said}: {why}; but its faces are not clearly seen."
    return label, score, f"{said}: {why}."


def _contradiction(
    segments: Sequence[_Segment], chains: Sequence[_Chain], policy: _Segment
) -> _Peak | None:
    """The strongest stretch at or above the threshold, within a segment or across a border."""
    peaks = [segment.peak for segment in segments if segment.peak is not None]
    for chain in chains:
        for old, new in pairwise(chain.pieces):
            # The rule of worker/segments.py at the border: the median of three neighbours.
            near = (*old.logits[-2:], *new.logits[:2])
            middle = max(
                (sorted(three)[1] for three in zip(near, near[1:], near[2:], strict=False)),
                default=EDGE,
            )
            score = _level([middle], policy.aggregation) if len(near) > 2 else 0.0
            if score >= policy.threshold.forged_at:
                name = f"{chain.pieces[0].number}.{chain.pieces[0].name}"
                peaks.append(_Peak(old.end_ms, max(new.start_ms, old.end_ms + 1), name, score))
    return max(peaks, key=lambda peak: peak.score, default=None)


def _warnings(segments: Sequence[_Segment], tracks: int) -> Iterable[str]:
    models = sorted({segment.model for segment in segments})
    if len(models) > 1:
        yield f"mixed_models: segments were scored by {', '.join(models)}"
    partial = [segment.number for segment in segments if segment.partial]
    if partial:
        yield f"partial_segments: {len(partial)} segments were not analysed to their end"
    if tracks > LISTED:
        yield f"tracks_omitted: the {LISTED} strongest of {tracks} are listed; all were judged"


def _level(logits: Sequence[float], aggregation: Aggregation) -> float:
    # Not at the top: store.py imports this file, and a client has no numpy.
    import numpy as np

    from ralf.worker.scores import calibrated, level

    return float(calibrated(np.array([level(np.array(logits), aggregation)]), Calibration())[0])


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.left, box.top, box.right, box.bottom


def _logit(score: float) -> float:
    kept = min(max(score, EDGE), 1 - EDGE)
    return round(math.log(kept / (1 - kept)), 7)
