"""The contract's documents as JSON Schema, and a verdict's fields as a table: `make schemas`.

python -m ralf.worker.schemas [FOLDER]      write them into docs/, or into that folder
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ralf.worker.contract import Evidence, Job, Review, SessionVerdict, Verdict

DOCUMENTS: dict[str, type[BaseModel]] = {
    "job": Job,
    "verdict": Verdict,
    "evidence": Evidence,
    "review": Review,
    "session": SessionVerdict,
}


def schemas() -> dict[str, str]:
    """File name → JSON Schema of each document, as text that is the same each time."""
    found = {}
    for name, document in DOCUMENTS.items():
        schema = document.model_json_schema(by_alias=True)
        if document is not Job:
            # Sampling and Span are strict in a Job; here, too, a newer Ralf may add to them.
            for part in schema.get("$defs", {}).values():
                if part.get("additionalProperties") is False:
                    del part["additionalProperties"]
        whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
        text = json.dumps(whole, indent=2, ensure_ascii=False)
        found[f"{name}.schema.json"] = f"{text}\n"
    return found


def field_rows(schema: Mapping[str, Any], inside: str = "", whole: Any = None) -> Iterator[str]:
    """A row of a Markdown table for each field of a schema, and of the documents inside it."""
    whole = whole or schema
    for name, facts in schema["properties"].items():
        path = f"{inside}{name}"
        yield f"| `{path}` | {' '.join(facts['description'].split())} |"
        kinds = facts.get("anyOf", [facts])
        for kind in kinds:
            many = "items" in kind
            part = (kind["items"] if many else kind).get("$ref", "").rpartition("/")[2]
            if part:
                yield from field_rows(whole["$defs"][part], f"{path}{'[]' * many}.", whole)


def with_field_table(page: str) -> str:
    """The page with today's table of a verdict's fields between its two marks."""
    before, begin, rest = page.partition("<!-- fields: make schemas -->\n")
    _, end, after = rest.partition("<!-- end of fields -->\n")
    rows = field_rows(Verdict.model_json_schema(by_alias=True))
    table = "\n".join(["", "| field | |", "|---|---|", *rows, "", ""])
    return before + begin + table + end + after


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema into the folder, and the fields of a verdict into its integration.md."""
    texts = schemas()
    page = folder / "integration.md"
    if page.exists():
        texts[page.name] = with_field_table(page.read_text(encoding="utf-8"))
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parent.parent / "docs"
    for path in write_schemas(chosen):
        print(path)
