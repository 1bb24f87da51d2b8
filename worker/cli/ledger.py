"""The ledger of a backfill: how each row ended, in one SQLite file that a kill cannot damage.

A row is known by its id.  Its end is written once, in a transaction that is on the disk before the
job in Redis is let go; so a row whose end is missing is sent again under the same token, and gets
the same job.  One process writes at a time: the file is locked while it is open.
"""

import csv
import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ralf.worker.errors import RalfError

State = Literal["judged", "failed", "again"]


class LedgerError(RalfError):
    """The ledger cannot be used for what was asked."""


@dataclass(frozen=True)
class End:
    """How one row ended; `again` asks for one more attempt."""

    id: str
    uri: str
    state: State
    attempt: int
    job_id: str = ""
    label: str | None = None
    score: float | None = None
    model: str | None = None
    """NAME@VERSION."""
    code: str | None = None
    message: str | None = None
    old_label: str | None = None
    old_score: float | None = None
    old_model: str | None = None


@dataclass(frozen=True)
class Old:
    """An earlier verdict on a row."""

    id: str
    label: str | None
    score: float | None
    model: str | None


COLUMNS = tuple(one.name for one in fields(End))
_TABLES = f"""
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ends ({", ".join(COLUMNS)}, PRIMARY KEY (id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS old (id PRIMARY KEY, label, score, model) WITHOUT ROWID;
"""
_COMPARED = "state = 'judged' AND old_label IS NOT NULL"
_CHANGED = f"{_COMPARED} AND old_label <> label"


class Ledger:
    """All reads and writes of the file."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        """options: what tokens and bodies are made of; a ledger belongs to one set of them."""
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            # A committed end survives a loss of power: its job in Redis is let go after it.
            self._db.execute("PRAGMA synchronous = FULL")
            with self._transaction():
                for statement in filter(str.strip, _TABLES.split(";")):
                    self._db.execute(statement)
                given = json.dumps(options, sort_keys=True)
                made = [("campaign", uuid.uuid4().hex[:12]), ("options", given)]
                self._db.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", made)
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"cannot write the ledger {path} ({error}); is another backfill using it?"
            ) from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{path} should be a ledger of `ralf backfill`: {error}") from error
        stored = dict(self._db.execute("SELECT name, value FROM meta"))
        self.campaign: str = stored["campaign"]
        if stored["options"] != given:
            raise LedgerError(
                f"the ledger {path} was begun with {stored['options']}, and this is {given}; "
                "use the same options, or another ledger to judge everything again"
            )

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def attempts(self, ids: Sequence[str]) -> dict[str, tuple[State, int]]:
        """State and attempt of those rows that the ledger knows."""
        marks = ", ".join("?" * len(ids))
        found = self._db.execute(f"SELECT id, state, attempt FROM ends WHERE id IN ({marks})", ids)
        return {row_id: (state, attempt) for row_id, state, attempt in found}

    def write(self, ends: Iterable[End]) -> list[End]:
        """Write ends that are not there yet, on the disk when this returns; gives those written."""
        marks = ", ".join("?" * len(COLUMNS))
        updated = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS)
        statement = (
            f"INSERT INTO ends VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET {updated} "
            "WHERE ends.state = 'again' AND ends.attempt = excluded.attempt"
        )
        with self._transaction():
            return [end for end in ends if self._db.execute(statement, astuple(end)).rowcount]

    def ask_again(self, codes: Sequence[str] = ()) -> int:
        """Give failed rows one more attempt, those of these codes or all; gives their number."""
        which = f" AND code IN ({', '.join('?' * len(codes))})" if codes else ""
        with self._transaction():
            asked = self._db.execute(
                "UPDATE ends SET state = 'again', attempt = attempt + 1 "
                f"WHERE state = 'failed'{which}",
                codes,
            )
        return asked.rowcount

    def keep_old(self, verdicts: Iterable[Old]) -> None:
        """Remember earlier verdicts to compare with; a later one of a row replaces it."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO old VALUES (?, ?, ?, ?)", map(astuple, verdicts)
            )

    def old(self, ids: Sequence[str]) -> dict[str, Old]:
        """The earlier verdicts on these rows, where they are known."""
        marks = ", ".join("?" * len(ids))
        found = self._db.execute(f"SELECT * FROM old WHERE id IN ({marks})", ids)
        return {row[0]: Old(*row) for row in found}

    def counts(self) -> dict[str, int]:
        """How many rows are in each state, and how many labels changed."""
        states = dict(self._db.execute("SELECT state, count(*) FROM ends GROUP BY state"))
        changed = self._one(f"SELECT count(*) FROM ends WHERE {_CHANGED}")
        empty = {"judged": 0, "failed": 0, "again": 0}
        return {**empty, **states, "changed": changed}

    def report(self) -> dict[str, Any]:
        """What came of it: labels by model, failures by code, changes by model."""
        counts = self.counts()
        by_label = "SELECT model, label, count(*) FROM ends WHERE state = 'judged' GROUP BY 1, 2"
        by_code = "SELECT code, count(*) FROM ends WHERE state = 'failed' GROUP BY 1 ORDER BY 1"
        changes = (
            "SELECT old_model, model, old_label, label, count(*) AS rows FROM ends "
            f"WHERE {_CHANGED} GROUP BY 1, 2, 3, 4 ORDER BY rows DESC"
        )
        labels: dict[str, dict[str, int]] = {}
        for model, label, rows in self._db.execute(by_label):
            labels.setdefault(model or "unknown", {})[label] = rows
        names = ("old_model", "model", "old_label", "label", "rows")
        return {
            "schema": "ralf.backfill/1",
            "campaign": self.campaign,
            "judged": counts["judged"],
            "failed": dict(self._db.execute(by_code)),
            "to_retry": counts["again"],
            "compared": self._one(f"SELECT count(*) FROM ends WHERE {_COMPARED}"),
            "changed": counts["changed"],
            "labels": labels,
            "changes": [dict(zip(names, row, strict=True)) for row in self._db.execute(changes)],
        }

    def write_results(self, path: Path) -> None:
        """Every row as CSV; --old of a later backfill reads it."""
        part = path.with_name(path.name + ".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [*COLUMNS, "changed"])
            table.writeheader()
            for end in self._ends():
                known = end.state == "judged" and end.old_label is not None
                changed = ("yes" if end.old_label != end.label else "no") if known else ""
                table.writerow({**asdict(end), "changed": changed})
        part.replace(path)

    def _ends(self) -> Iterator[End]:
        for row in self._db.execute("SELECT * FROM ends ORDER BY id"):
            yield End(*row)

    def _one(self, query: str) -> int:
        (value,) = self._db.execute(query).fetchone()
        return int(value)

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK after an error."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
