"""Scores in, judgement out: tracks, segments, timeline, one score and one label.

    face logits ─▶ a level per track ─▶ calibrated ─▶ video = strongest decisive track ─▶ label

Where a segment of a track is at or above the threshold, the video is never `likely_authentic`: a
short forgery in a long clip hardly moves its track's level, but the segment shows it.

worker/scores.py says what a level is, and why more forged evidence never lowers it.  The maximum
over tracks keeps that property: another track can only raise a maximum.

A track with fewer than min_faces counted faces has no score and may not decide.  Where no track
may decide, the video is `inconclusive` and has no score, because readers would trust a number from
one tiny face too much.

A track whose faces are mostly occluded or in an unusual pose may call the video forged, and never
authentic: what hides a face hides a forgery.

Only numpy and the contract are needed here.  The order of the rows does not matter, so the Scores
of many segments of one stream can be joined (`Scores.concat`) and judged again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ralf.kernels.manifest import Aggregation, Calibration, Manifest
from ralf.worker.contract import Box, Label, Sample, Segment, Threshold, Timeline, Track
from ralf.worker.scores import NO_TIMES, Ints, Reals, Scores, calibrated, for_level, level
from ralf.worker.segments import ScoredFrames, segments_of, timeline_of
from ralf.worker.wording import NO_POLICY, clock, digits_for, score_text, side_text

__all__ = [
    "Judgement",
    "Scores",
    "calibrated",
    "judge",
    "judge_by",
    "suspicious",
    "threshold_for",
    "without_decision",
]

VIEWS: tuple[Literal["clear", "occluded", "unusual_pose"], ...] = get_args(
    Sample.model_fields["view"].annotation
)
MAX_TRACKS = 16
MAX_SAMPLES = 300
"""Listed per track; all are judged."""
MAX_SEGMENTS = 240
LONG_GAP_MS = 10_000
"""A forgery of this length matters to people, so it must not pass unseen without a warning."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The parts of a Verdict that come from the scores, under the same names."""

    label: Label
    score: float | None
    reason: str
    threshold: Threshold
    tracks: tuple[Track, ...]
    segments: tuple[Segment, ...]
    timeline: Timeline
    longest_gap_ms: int
    """The longest time between two sampled frames."""
    warnings: tuple[str, ...]
    track_names: dict[int, str]
    """The listed tracks' names by their number in the Scores."""


def threshold_for(thresholds: Mapping[str, float], policy: str) -> Threshold:
    """The manifest's threshold of that policy; 0.5 where the model brings none at all."""
    if not thresholds:
        return Threshold(policy=NO_POLICY, forged_at=0.5, authentic_below=0.5)
    # `low` is the lower end of the grey band, and no policy to decide by.
    if policy not in thresholds or policy == "low":
        have = ", ".join(sorted(set(thresholds) - {"low"})) or "none"
        raise ValueError(f"the model has no threshold for policy {policy!r}; it has: {have}")
    forged_at = thresholds[policy]
    low = thresholds.get("low", forged_at)
    # A stricter or laxer policy may lie on the other side of `low`: then there is no grey band.
    return Threshold(policy=policy, forged_at=forged_at, authentic_below=min(low, forged_at))


def judge(
    scores: Scores,
    sampled_s: Reals,
    *,
    width: int,
    height: int,
    duration_s: float,
    manifest: Manifest,
    calibration: Calibration | None = None,
    max_tracks: int = MAX_TRACKS,
    again_s: Reals = NO_TIMES,
) -> Judgement:
    """Judge a clip by its model's manifest.

    sampled_s are the times of all sampled frames, again_s those of the second pass among them.

    The boxes of the scores are in pixels of a frame of width × height.  Every track is judged;
    the max_tracks strongest are listed.  `calibration` is the manifest's at the clip's compression;
    None takes the one for clips whose compression is not known.
    """
    judgement = judge_by(
        scores,
        sampled_s,
        width=width,
        height=height,
        duration_s=duration_s,
        calibration=calibration or manifest.calibration.at(None),
        aggregation=manifest.aggregation,
        threshold=threshold_for(manifest.thresholds, manifest.policy),
        max_tracks=max_tracks,
        again_s=again_s,
    )
    if manifest.thresholds:
        return judgement
    unset = "no_threshold: the model brings no thresholds; 0.5 was used, which nothing supports"
    return replace(judgement, warnings=(unset, *judgement.warnings))


def judge_by(
    scores: Scores,
    sampled_s: Reals,
    *,
    width: int,
    height: int,
    duration_s: float,
    calibration: Calibration,
    aggregation: Aggregation,
    threshold: Threshold,
    max_tracks: int = MAX_TRACKS,
    again_s: Reals = NO_TIMES,
) -> Judgement:
    """The same from the parts of a manifest."""
    scored = ScoredFrames.of(
        scores, sampled_s, duration_s, calibration, aggregation.min_face_px, again_s=again_s
    )
    tracks = [
        _TrackScore.of(f"t{place}", rows, scored, aggregation)
        for place, rows in enumerate(_by_first_appearance(scored.scores), 1)
    ]
    segments = [
        segment
        for track in tracks
        # A track that may not decide has no segments either; _undecided_warnings reports it.
        if track.score is not None
        for segment in segments_of(track.name, track.votes, scored, threshold.forged_at)
    ]
    label, score, reason = _decide(tracks, segments, threshold, len(scored.frames_ms))
    # From here on the numbers are bounded.  Label and score are already decided, by all tracks.
    listed = _strongest(tracks, [track.rank for track in tracks], max_tracks)
    kept = _strongest(segments, [s.score for s in segments], MAX_SEGMENTS)
    return Judgement(
        label=label,
        score=score,
        reason=reason,
        threshold=threshold,
        tracks=tuple(track.document(scored, width, height, threshold) for track in listed),
        segments=tuple(sorted(kept, key=lambda s: (s.start_ms, s.track_id))),
        timeline=timeline_of(scored),
        longest_gap_ms=scored.longest_gap_ms,
        warnings=(
            *_sampling_warnings(scored),
            *_small_warnings(scored, aggregation),
            *_unclear_warnings(tracks, label),
            *_undecided_warnings(tracks, scored, label, threshold),
            *_bound_warnings("tracks", len(listed), len(tracks)),
            *_bound_warnings("segments", len(kept), len(segments)),
        ),
        track_names={int(scored.scores.track[s.rows[0]]): s.name for s in listed},
    )


@dataclass(frozen=True, eq=False)
class _TrackScore:
    """One track's rows, its score, and why it may not decide."""

    name: str
    rows: Ints
    """Rows of ScoredFrames, in time order."""
    votes: Ints
    """Those of its rows that count."""
    score: float | None
    score_max: float
    reason: str | None
    unclear: str | None
    """Why it may not call the video authentic."""

    @classmethod
    def of(
        cls,
        name: str,
        rows: Ints,
        scored: ScoredFrames,
        aggregation: Aggregation,
    ) -> "_TrackScore":
        votes = rows[scored.counted[rows]]
        score, reason = None, None
        if len(votes) >= aggregation.min_faces:
            chosen = for_level(votes, scored.scores.again, aggregation.min_faces)
            mean = level(scored.scores.logit[chosen], aggregation)
            score = float(calibrated(np.array([mean]), scored.calibration)[0])
        else:
            reason = _too_little(len(rows), len(votes), aggregation)
        top = float(scored.probability[rows].max())
        return cls(name, rows, votes, score, top, reason, _unclear(scored.scores.view[votes]))

    @property
    def rank(self) -> float:
        """Decisive tracks come before the others, each by strength."""
        # Scores are 0 to 1, so −1 to 0 and 1 to 2 never meet.
        return self.score_max - 1 if self.score is None else self.score + 1

    def decides(self, threshold: Threshold) -> bool:
        """Whether the video's label may come from this track."""
        if self.score is None:
            return False
        return self.unclear is None or self.score >= threshold.authentic_below

    def document(
        self, scored: ScoredFrames, width: int, height: int, threshold: Threshold
    ) -> Track:
        """The track as the contract has it, its samples thinned to what may be listed."""
        return Track(
            track_id=self.name,
            start_ms=int(scored.time_ms[self.rows[0]]),
            end_ms=int(scored.time_ms[self.rows[-1]]),
            faces=len(self.rows),
            score=self.score,
            score_max=self.score_max,
            decisive=self.decides(threshold),
            reason=self.reason or self.unclear,
            samples=tuple(
                _sample(scored, row, width, height)
                for row in _thinned(self.rows, scored.scores.logit)
            ),
        )


def _by_first_appearance(scores: Scores) -> list[Ints]:
    """The rows of each track; two tracks that begin together are ordered left to right."""
    # The rows are sorted by time, then by left edge (ScoredFrames.of), so a track's first row gives
    # its place.  The tracker's own numbers play no part.
    _, first = np.unique(scores.track, return_index=True)
    return [np.flatnonzero(scores.track == scores.track[row]) for row in np.sort(first)]


def _strongest(items: Sequence[T], strength: Sequence[float], most: int) -> list[T]:
    """At most so many, the strongest, in the order they came."""
    # sorted() is stable: of equals the first stays, so the same scores always list the same.
    best = sorted(range(len(items)), key=lambda place: -strength[place])[:most]
    return [items[place] for place in sorted(best)]


def _thinned(rows: Ints, logit: Reals) -> list[int]:
    """At most MAX_SAMPLES rows: even over the track, the strongest of each part."""
    # The strongest of each part and not every n-th row, which could leave out the track's peak.
    parts = np.array_split(rows, min(len(rows), MAX_SAMPLES))
    return [int(part[np.argmax(logit[part])]) for part in parts]


def _sample(scored: ScoredFrames, row: int, width: int, height: int) -> Sample:
    scores = scored.scores
    # A face at the edge may have a box that reaches beyond the frame; the contract's fractions may
    # not.
    left, top, right, bottom = np.clip(scores.box[row] / (width, height, width, height), 0, 1)
    return Sample(
        time_ms=int(scored.time_ms[row]),
        frame=int(scores.frame[row]),
        box=Box(
            left=round(float(left), 5),
            top=round(float(top), 5),
            right=round(float(right), 5),
            bottom=round(float(bottom), 5),
        ),
        face_px=round(float(scores.face_px[row])),
        confidence=round(float(np.clip(scores.confidence[row], 0, 1)), 4),
        score=float(scored.probability[row]),
        counted=bool(scored.counted[row]),
        view=VIEWS[int(scores.view[row])],
        second_pass=bool(scores.again[row]),
    )


def _too_little(faces: int, votes: int, aggregation: Aggregation) -> str:
    need = f"{aggregation.min_faces} are needed"
    if votes == faces:
        return f"only {_count(faces, 'face')} sampled, {need}"
    return f"{votes} of {_count(faces, 'face')} at least {aggregation.min_face_px} px, {need}"


def _unclear(views: NDArray[np.int8]) -> str | None:
    """What most of the counted faces have that hides a forgery; None where they are clear."""
    hidden, turned = int((views == 1).sum()), int((views == 2).sum())
    if 2 * (hidden + turned) <= len(views):
        return None
    faces = _count(len(views), "face")
    if turned > hidden:
        return f"unusual pose: {turned} of {faces} are turned far or upside down"
    return f"occluded: {hidden} of {faces} are covered in part"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _decide(
    tracks: Sequence[_TrackScore],
    segments: Sequence[Segment],
    threshold: Threshold,
    frames: int,
) -> tuple[Label, float | None, str]:
    """The label, the score and the sentence that says what decided."""
    if not frames:
        return "inconclusive", None, "No frame could be looked at."
    if not tracks:
        return "no_faces", None, f"No face was found in {_count(frames, 'frame')}."
    decisive = [(s.score, s) for s in tracks if s.score is not None]
    if not decisive:
        best = max(tracks, key=lambda s: len(s.votes))
        return "inconclusive", None, f"No face can decide: {best.name} has {best.reason}."
    score, strongest = max(decisive, key=lambda pair: pair[0])
    who = (
        f"{strongest.name}, the strongest of {len(decisive)} tracks,"
        if decisive[1:]
        else f"{strongest.name}, the only track that counts,"
    )
    label, digits = threshold.decide(score), digits_for(threshold, score)
    over = _count(len(strongest.votes), "sampled frame")
    side = side_text(score, threshold, digits)
    reason = f"{who} scored {score_text(score, digits)} over {over}: {side}."
    clear = [s for _, s in decisive if s.unclear is None]
    if label == "likely_authentic" and not clear:
        return "inconclusive", score, f"{reason[:-1]}; but {strongest.name} is {strongest.unclear}."
    if label == "likely_authentic" and segments:
        # A forged minute among many authentic ones: the track's mean is low, and the minute is not.
        worst = max(segments, key=lambda segment: segment.score)
        high = score_text(worst.score, digits_for(threshold, worst.score))
        when = f"from {clock(worst.start_ms)} to {clock(worst.end_ms)}"
        return "inconclusive", score, f"{reason[:-1]}; but {worst.track_id} scored {high} {when}."
    return label, score, reason


def _sampling_warnings(scored: ScoredFrames) -> list[str]:
    gap_ms = scored.longest_gap_ms
    if gap_ms <= LONG_GAP_MS:
        return []
    gap = f"up to {gap_ms / 1000:.1f} s lie between two sampled frames"
    return [f"sparse_sampling: {gap}; a forgery that is shorter could be missed"]


def _small_warnings(scored: ScoredFrames, aggregation: Aggregation) -> list[str]:
    small = int((~scored.counted).sum())
    if not small:
        return []
    faces, least = _count(len(scored.counted), "face"), aggregation.min_face_px
    return [f"small_faces: {small} of {faces} are smaller than {least} px and did not count"]


def _unclear_warnings(tracks: Sequence[_TrackScore], label: Label) -> list[str]:
    """An authentic verdict says whose face was not seen well enough for it."""
    if label != "likely_authentic":
        return []
    hidden = [s for s in tracks if s.score is not None and s.unclear]
    return [f"unclear_track: {s.name} does not count: {s.unclear}" for s in hidden][:MAX_TRACKS]


def _undecided_warnings(
    tracks: Sequence[_TrackScore], scored: ScoredFrames, label: Label, threshold: Threshold
) -> list[str]:
    """An authentic verdict must not hide a short track that scores as forged."""
    if label != "likely_authentic":
        return []
    return [
        f"undecided_track: {s.name} reaches {scored.probability[s.votes].max():.3f} but may not "
        f"decide: {s.reason}"
        for s in tracks
        if s.score is None
        and len(s.votes)
        and scored.probability[s.votes].max() >= threshold.forged_at
        # Bounded, because a slide show makes a track of each slide.
    ][:MAX_TRACKS]


def _bound_warnings(what: str, listed: int, found: int) -> list[str]:
    if listed == found:
        return []
    return [f"{what}_omitted: the {listed} strongest of {found} {what} are listed; all were judged"]


def without_decision(judgement: Judgement) -> Judgement:
    """The same scores, but no track decides: the model was never trained."""
    # The finder says that there is no face, and it is trained.
    if judgement.label == "no_faces":
        return judgement
    why = {"decisive": False, "reason": "the model was never trained"}
    return replace(
        judgement,
        label="inconclusive",
        reason="The model was never trained, so its score decides nothing.",
        tracks=tuple(track.model_copy(update=why) for track in judgement.tracks),
        # A segment would call a stretch of time forged.
        segments=(),
    )


def suspicious(
    scores: Scores, judgement: Judgement, calibration: Calibration, manifest: Manifest
) -> NDArray[np.float64]:
    """Times of counted faces that are not clearly authentic, the highest score first.

    None where the clip is called forged already, and none within a segment, which is known.
    """
    if judgement.label == "likely_forged":
        return np.zeros(0)
    high = calibrated(scores.logit, calibration) >= judgement.threshold.authentic_below
    high &= scores.face_px >= manifest.aggregation.min_face_px
    for segment in judgement.segments:
        inside = scores.time_s * 1000 >= segment.start_ms
        high &= ~(inside & (scores.time_s * 1000 <= segment.end_ms))
    rows = np.flatnonzero(high)
    order = np.lexsort((scores.time_s[rows], -scores.logit[rows]))
    return np.asarray(scores.time_s[rows[order]], np.float64)
