"""A small Dockerfile parser, used to run the steps without a container engine: see prove_image.py.

A stage is a list of instructions.  Heredocs, ONBUILD, SHELL and ADD are not supported.  An unknown
instruction is an error, so that no step is silently skipped.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

RUN_BY_US = frozenset({"ARG", "COPY", "ENV", "RUN", "USER", "WORKDIR"})
NOTED = frozenset({"CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK"})


class NotUnderstood(ValueError):
    """The Dockerfile uses an instruction or a form that this parser does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, with its continuation lines joined."""

    word: str
    text: str


@dataclass
class Stage:
    """FROM … AS name, and the instructions up to the next FROM."""

    name: str
    base: str
    steps: list[Instruction] = field(default_factory=list)


def parse(text: str) -> dict[str, Stage]:
    """The stages by name, in order."""
    stages: dict[str, Stage] = {}
    globals_: dict[str, str] = {}
    current: Stage | None = None
    for word, rest in _lines(text):
        if word == "FROM":
            base, _, name = (part.strip() for part in re.split(r"(\bAS\b)", rest, maxsplit=1))
            current = stages[name] = Stage(name, expand(base, globals_))
        elif current is None:
            if word != "ARG":
                raise NotUnderstood(f"only ARG may stand before the first FROM, got {word}")
            key, _, value = rest.partition("=")
            globals_[key] = value
        elif word in RUN_BY_US | NOTED:
            current.steps.append(Instruction(word, rest))
        else:
            raise NotUnderstood(f"{word} {rest[:60]!r}; add it to deploy/dockerfile.py")
    return stages


def _lines(text: str) -> list[tuple[str, str]]:
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", kept)
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines())
        if word
    ]


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME} by their values, as ENV, WORKDIR and FROM do."""
    return re.sub(
        r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text
    )


def pairs(text: str, values: Mapping[str, str]) -> dict[str, str]:
    """The names and values that an ENV instruction sets."""
    return dict(expand(part, values).split("=", 1) for part in shlex.split(text))


def command(text: str) -> list[str]:
    """The exec form of CMD or ENTRYPOINT."""
    words = json.loads(text)
    if not isinstance(words, list):
        raise NotUnderstood(f"expected the exec form, a JSON list, got {text[:60]!r}")
    return [str(word) for word in words]


def health_command(text: str) -> list[str]:
    """The command of a HEALTHCHECK, without its options."""
    return command(text[text.index("CMD") + len("CMD") :])


def lineage(stages: Mapping[str, Stage], name: str) -> list[Stage]:
    """The stage and the stages it is built on, the base first."""
    found = [stages[name]]
    while found[0].base in stages:
        found.insert(0, stages[found[0].base])
    return found


def last(stages: Mapping[str, Stage], name: str, word: str) -> str:
    """The last such instruction, which is the one in force; '' when there is none."""
    texts = [step.text for one in lineage(stages, name) for step in one.steps if step.word == word]
    return texts[-1] if texts else ""


def read(path: Path) -> dict[str, Stage]:
    """Parse the stages of a file."""
    return parse(path.read_text())
