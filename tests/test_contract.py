"""The documents on the wire: their exported schemas, and what they refuse."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from pydantic import BaseModel
from pydantic import ValidationError as Refused

from ralf.worker.contract import (
    FailedSegment,
    Gap,
    Job,
    Review,
    SessionTrack,
    SessionVerdict,
    Threshold,
    Verdict,
    dump,
)
from ralf.worker.pipeline import analyze
from ralf.worker.runtime import Parts
from ralf.worker.schemas import DOCUMENTS, schemas, with_field_table, write_schemas
from tests import verdicts

DOCS = Path(__file__).resolve().parent.parent / "docs"
SUBMITTED = "2025-11-20T07:30:00Z"
FREE = ("detectors", "finder", "calibration", "aggregation", "stages_ms")
"""Parts of `made` whose names are not the contract's."""


def job(**changes: Any) -> Job:
    """A job that uses every field."""
    fields = {
        "job_id": "job-1",
        "token": "upload-1",
        "media": {"uri": "s3://uploads/1.mp4", "sha256": "0" * 64, "size_bytes": 9},
        "tag": "4711",
        "sampling": {"mode": "fps", "fps": 2.0, "spans": [{"start_ms": 0, "end_ms": 900}]},
        "deadline": SUBMITTED,
        "callback": {"url": "https://example.org/hook"},
        "session": {"session_id": "live-1", "number": 3, "offset_ms": 12000},
        "stop_early": {},
        "model": "ralf-small",
        "submitted_at": SUBMITTED,
    }
    return Job.model_validate({**fields, **changes})


def review() -> Review:
    """A person who disagrees."""
    seen = verdicts.forged()
    return Review.model_validate(
        {
            "job_id": seen.job_id,
            "media_sha256": seen.media.sha256,
            "model": seen.made.model,
            "version": seen.made.version,
            "label": seen.label,
            "score": seen.score,
            "decision": "overturn",
            "tracks": [
                {
                    "track_id": "t1",
                    "label": "real",
                    "score": seen.tracks[0].score,
                    "start_ms": 0,
                    "end_ms": 10,
                    "faces": [{"time_ms": 0, "frame": 0, "box": seen.tracks[0].samples[0].box}],
                }
            ],
            "reviewed_at": SUBMITTED,
        }
    )


def session() -> SessionVerdict:
    """A stream of which a segment is missing and another failed."""
    return SessionVerdict(
        session_id="live-1",
        tenant="acme",
        revision=4,
        label="likely_forged",
        score=0.97,
        reason="0.t1, the strongest of 1, scored 0.97: at or above 0.80.",
        threshold=Threshold(policy="fpr_0.05", forged_at=0.8, authentic_below=0.2),
        tracks=(
            SessionTrack(
                track_id="0.t1",
                start_ms=0,
                end_ms=9000,
                faces=40,
                score=0.97,
                score_max=0.99,
                decisive=True,
                segments=(0, 1),
            ),
        ),
        segments=2,
        complete=False,
        missing=(Gap(first=2, last=3),),
        late=(0,),
        repeated=(1,),
        failed=(FailedSegment(number=4, code="corrupt_media"),),
    )


def samples() -> dict[str, list[BaseModel]]:
    """Documents of every kind."""
    seen = [
        verdicts.forged(),
        verdicts.authentic(),
        verdicts.undecided(),
        verdicts.faceless(),
    ]
    return {
        "job": [job(), job(sampling=None, session=None, callback=None, deadline=None)],
        "verdict": list(seen),
        "evidence": [verdicts.evidence(seen[0]), verdicts.evidence(seen[-1])],
        "review": [review()],
        "session": [session()],
    }


def schema(name: str) -> Any:
    """The schema as it is exported."""
    return json.loads((DOCS / f"{name}.schema.json").read_text())


def paths(document: Any, inside: str = "") -> set[str]:
    """The names of a document's fields, with those of the documents inside it."""
    found: set[str] = set()
    for name, value in document.items():
        found.add(inside + name)
        if name in FREE:
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                found |= paths(part, f"{inside}{name}.")
    return found


def test_the_verdict_in_the_documentation_has_the_fields_of_a_real_one(
    eager_parts: Parts, clip_of_two: Path
):
    """And it is one: the schema takes it, and so does the client."""
    page = (DOCS / "integration.md").read_text()
    (text,) = re.findall(r"```json\n(\{\n.*?)```", page, re.DOTALL)
    shown = json.loads(text)
    Draft202012Validator(schema("verdict")).validate(shown)
    real, _ = analyze(clip_of_two, eager_parts)

    assert Verdict.model_validate(shown).label == real.label == "likely_forged"
    assert paths(shown) == paths(json.loads(dump(real)))


def test_the_documentation_has_a_sentence_for_each_field_of_a_verdict():
    """`make schemas` writes them; the fields of the example are among them."""
    page = (DOCS / "integration.md").read_text()
    told = set(re.findall(r"^\| `([\w.\[\]]+)` \| \w.*\. \|$", page, re.MULTILINE))
    named = {path.replace("[]", "") for path in told}

    assert page == with_field_table(page)
    assert paths(json.loads(dump(verdicts.forged()))) <= named | {"session"}
    assert len(told) > 90


def undescribed(schema: dict[str, Any]) -> list[str]:
    """The fields of a schema, and of the documents inside it, that say nothing of themselves."""
    parts = {schema["title"]: schema, **schema.get("$defs", {})}
    return [
        f"{part}.{field}"
        for part, described in parts.items()
        for field, facts in described.get("properties", {}).items()
        if not facts.get("description", "").strip()
    ]


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_every_field_of_a_schema_says_what_it_is(name: str):
    """In a sentence; a field without one is found."""
    told = schema(f"{name}")
    some = next(iter(told["properties"].values()))

    assert undescribed(told) == []
    assert all(facts["description"].endswith(".") for facts in told["properties"].values())
    some.pop("description")
    assert len(undescribed(told)) == 1


@pytest.mark.parametrize("name", sorted(schemas()))
def test_the_exported_schema_is_up_to_date(name: str):
    """`python -m ralf.worker.schemas` writes them again."""
    assert (DOCS / name).read_text() == schemas()[name]


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_sample_documents_satisfy_the_exported_schema(name: str):
    """Judged by the jsonschema library, not by the classes that wrote the schema."""
    Draft202012Validator.check_schema(schema(name))
    validator = Draft202012Validator(schema(name))

    for document in samples()[name]:
        validator.validate(json.loads(dump(document)))


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_the_exported_schema_refuses_missing_fields(name: str):
    """Evidence alone has nothing that must be there."""
    validator = Draft202012Validator(schema(name))
    document = json.loads(dump(samples()[name][0]))

    if name != "evidence":
        with pytest.raises(ValidationError, match="is a required property"):
            validator.validate({"schema": document["schema"]})


def spots(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a document, the document itself first."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict | list):
            yield from spots(part)


def test_a_job_with_an_unknown_field_is_refused_wherever_the_field_is():
    """A typo must not become a default; by the class and by the exported schema."""
    validator = Draft202012Validator(schema("job"))
    whole = json.loads(dump(job()))

    for place in range(len(list(spots(whole)))):
        document = json.loads(dump(job()))
        list(spots(document))[place]["treshold"] = 1
        with pytest.raises(ValidationError, match=r"unexpected|not valid under any"):
            validator.validate(document)
        with pytest.raises(Refused, match="Extra inputs are not permitted"):
            Job.model_validate_json(json.dumps(document))


@pytest.mark.parametrize("name", sorted(set(DOCUMENTS) - {"job"}))
def test_a_document_of_the_next_version_is_read(name: str):
    """Workers are upgraded before backends: fields that were added anywhere are ignored."""
    for known in samples()[name]:
        document = json.loads(dump(known))
        free = [document["made"][part] for part in FREE] if name == "verdict" else []
        for place in list(spots(document)):
            if not any(place is part for part in free):
                place["added_in_the_next_version"] = {"of": ["any", "kind"]}

        Draft202012Validator(schema(name)).validate(document)
        assert known == DOCUMENTS[name].model_validate_json(json.dumps(document))


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_documents_come_back_as_they_went(name: str):
    """Through JSON and back, nothing is lost."""
    for document in samples()[name]:
        assert DOCUMENTS[name].model_validate_json(dump(document)) == document
        assert json.loads(dump(document))["schema"] == f"ralf.{name}/1"


def test_a_verdict_refuses_a_score_that_is_no_probability():
    """Neither above one nor NaN."""
    good = json.loads(dump(verdicts.authentic()))

    for score in (1.01, -0.1, "NaN"):
        with pytest.raises(Refused):
            Verdict.model_validate({**good, "score": score})


def test_the_command_writes_every_schema(tmp_path: Path):
    """To a folder of choice."""
    run = subprocess.run(
        [sys.executable, "-m", "ralf.worker.schemas", str(tmp_path)],
        cwd=DOCS.parent,
        capture_output=True,
        text=True,
        check=True,
    )

    assert sorted(schemas()) == sorted(path.name for path in tmp_path.iterdir())
    assert len(run.stdout.splitlines()) == len(schemas())
    assert [path.read_text() for path in write_schemas(tmp_path)] == list(schemas().values())
