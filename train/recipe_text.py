"""Recipes as text: JSON there and back, changes by dotted name, and what differs between two.

The types are those of the recipe's own fields and of the network's own signature, so a field that
is added to either needs nothing here.  Reading is strict: an unknown name is an error, and so is a
missing one without a default, because a recipe that was guessed is not the one that was trained.
A new field gets a default that means what was done before it existed; so old runs still open.
"""

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from ralf.kernels import networks
from ralf.kernels.manifest import Network

T = TypeVar("T", bound=BaseModel)


class RecipeError(ValueError):
    """A recipe cannot be what was asked."""


def to_json(recipe: BaseModel) -> str:
    """The whole recipe, nothing left to defaults."""
    return json.dumps(recipe.model_dump(mode="json"), indent=2, ensure_ascii=False)


def from_json(text: str, kind: type[T]) -> T:
    """The recipe that to_json wrote; kind is its class."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise RecipeError(explained(error)) from error


def override(recipe: T, changes: Mapping[str, str]) -> T:
    """The recipe with fields replaced by dotted name: {"optimiser.lr": "3e-4"}.

    A bare name that only one part of the recipe has ("epochs") needs no prefix.
    """
    tree, known = json.loads(to_json(recipe)), _types(recipe)
    for name, text in changes.items():
        full = _full_name(known, name)
        *path, last = full.split(".")
        branch = tree
        for key in path:
            branch = branch[key]
        branch[last] = _parsed(text, known[full], full)
    # All at once, because some fields must agree: two sizes are then set together.
    return from_json(json.dumps(tree), type(recipe))


def names(recipe: BaseModel) -> list[str]:
    """Every dotted name that override takes."""
    return list(_types(recipe))


def differences(one: BaseModel, other: BaseModel) -> list[str]:
    """Each name whose values differ, with both values, as sentences."""
    left, right = _flat(one), _flat(other)
    return [
        f"{name}: {left.get(name, 'absent')!r} → {right.get(name, 'absent')!r}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, "absent") != right.get(name, "absent")
    ]


def explained(error: ValidationError, part: str = "") -> str:
    """Each fault as a clause: the field, what was expected and what came."""
    clauses = []
    for each in error.errors():
        name = ".".join(filter(None, (part, *map(str, each["loc"]))))
        said = each["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if each["type"] == "missing":
            clauses.append(f"{name} is missing")
        elif each["type"] == "extra_forbidden":
            clauses.append(f"{name} is not known")
        elif said.startswith("should"):
            clauses.append(f"{name} {said.split(', unable')[0]}, not {each['input']!r}")
        else:
            clauses.append(said)
    return "; ".join(clauses)


def _types(part: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The type of each field by its dotted name; a network's come from its signature."""
    found: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            found |= _types(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.annotation
    if isinstance(part, Network):
        options = networks.options(part.build)
        found |= {prefix + name: option.annotation for name, option in options.items()}
    return found


def _full_name(known: Mapping[str, Any], name: str) -> str:
    if name in known:
        return name
    # A short name is a convenience only while it means one field: two are refused by both names.
    ends = [full for full in known if full.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise RecipeError(f"{name!r} could be {' or '.join(ends)}: write the whole name")
    # Of a part that is there, its own names are enough; else all of them.
    part = name.rpartition(".")[0]
    near = [full for full in known if part and full.rpartition(".")[0] == part]
    raise RecipeError(f"no {name!r} in this recipe; known: {', '.join(near or known)}")


def _parsed(text: str, kind: Any, name: str) -> Any:
    """The text as JSON's value of that type; a tuple's members have commas between them."""
    if text.lower() in ("none", "") and NoneType in get_args(kind):
        return None
    several = get_origin(kind) is tuple
    given = [each for each in text.split(",") if each and text.lower() != "none"]
    try:
        found = TypeAdapter(kind).validate_python(given if several else text)
    except ValidationError as error:
        raise RecipeError(explained(error, name)) from error
    return list(found) if several else found


def _flat(part: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in part:
        if isinstance(value, BaseModel):
            found |= {f"{name}.{inner}": each for inner, each in _flat(value).items()}
        else:
            found[name] = value
    return found
