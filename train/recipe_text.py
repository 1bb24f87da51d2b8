"""Recipes as text: JSON there and back, and overrides by dotted name with their types checked.

Both walk the dataclasses' own type hints, so a field added to a recipe needs nothing here.
Decoding is strict: an unknown name is an error, and so is a missing one without a default, since
a recipe that was guessed back together is not the one that was trained.  A field that is new gets
a default that means what was done before it was there, so runs of an older version still open.
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

T = TypeVar("T")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
READERS = {bool: lambda text: TRUTH.get(text.lower()), int: int, float: float}


class RecipeError(ValueError):
    """A recipe cannot be what was asked."""


def to_json(recipe: Any) -> str:
    """The whole recipe, nothing left to defaults."""
    return json.dumps(_plain(recipe), indent=2, ensure_ascii=False)


def from_json(text: str, kind: type[T]) -> T:
    """The recipe that to_json wrote; kind is its class."""
    return _typed(json.loads(text), kind, "recipe")  # type: ignore[no-any-return]


def override(recipe: T, changes: Mapping[str, str]) -> T:
    """The recipe with fields replaced by dotted name: {"optimiser.lr": "3e-4"}.

    A bare name that only one part of the recipe has ("epochs") needs no prefix.
    """
    # All at once: sizes that must agree are then set together.
    tree: dict[str, Any] = {}
    for name, text in changes.items():
        *path, last = _full_name(recipe, name).split(".")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = (name, text)
    return _changed(recipe, tree)  # type: ignore[no-any-return]


def names(recipe: Any, prefix: str = "") -> list[str]:
    """Every dotted name that override takes."""
    found: list[str] = []
    for key, value in _fields(recipe).items():
        nested = dataclasses.is_dataclass(value) or isinstance(value, BaseModel)
        found += names(value, f"{prefix}{key}.") if nested else [prefix + key]
    return found


def differences(one: Any, other: Any) -> list[str]:
    """Each name whose values differ, with both values, as sentences."""
    left, right = _flat(one), _flat(other)
    return [
        f"{name}: {left.get(name, 'absent')!r} → {right.get(name, 'absent')!r}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, "absent") != right.get(name, "absent")
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, part in _fields(value).items():
        if dataclasses.is_dataclass(part) or isinstance(part, BaseModel):
            flat |= _flat(part, f"{prefix}{key}.")
        else:
            flat[prefix + key] = part
    return flat


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, BaseModel):
        own = {name: getattr(value, name) for name in type(value).model_fields}
        return own | (value.model_extra or {})
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _full_name(recipe: Any, name: str) -> str:
    known = names(recipe)
    if name in known:
        return name
    ends = [full for full in known if full.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise RecipeError(f"{name!r} could be {' or '.join(ends)}: write the whole name")
    raise RecipeError(f"no {name!r} in this recipe; known: {', '.join(known)}")


def _changed(part: Any, tree: Mapping[str, Any]) -> Any:
    """The part with the leaves of the tree, (asked name, text), parsed and put in."""
    now = _fields(part)
    new = {
        key: _changed(now[key], leaf)
        if isinstance(leaf, dict)
        else _parse(leaf[1], _hint(part, key), leaf[0])
        for key, leaf in tree.items()
    }
    if not isinstance(part, BaseModel):
        return dataclasses.replace(part, **new)
    try:
        return type(part).model_validate(now | new)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{where}={first['input']}: {first['msg']}") from error


def _hint(part: Any, key: str) -> Any:
    """The type of a field; a network's dimensions have that of their value."""
    if not isinstance(part, BaseModel):
        return get_type_hints(type(part))[key]
    field = type(part).model_fields.get(key)
    return field.annotation if field else type(_fields(part)[key])


def _parse(text: str, hint: Any, name: str) -> Any:
    """The text as the hinted type, or an error that says what was expected."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in inner and text.lower() in ("none", ""):
            return None
        return _parse(text, next(each for each in inner if each is not type(None)), name)
    if hasattr(hint, "__metadata__"):
        return _parse(text, hint.__origin__, name)
    if origin is tuple:
        return _parse_tuple(text, inner, name)
    if origin is Literal or hint in WORDS:
        expected, values = (", ".join(map(str, inner)), inner) if inner else (WORDS[hint], ())
        try:
            parsed = READERS.get(hint, str)(text)
        except ValueError:
            parsed = None
        if parsed is None or (values and parsed not in values):
            raise RecipeError(f"{name} should be {expected}, not {text!r}")
        return parsed
    raise RecipeError(f"{name} cannot be given as text; set its parts")


def _parse_tuple(text: str, inner: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    parts = [] if text.lower() == "none" else [part for part in text.split(",") if part]
    if Ellipsis not in inner and len(parts) != len(inner):
        raise RecipeError(f"{name} should be {len(inner)} values with commas, not {text!r}")
    kinds = [inner[0]] * len(parts) if Ellipsis in inner else inner
    return tuple(_parse(part, kind, name) for part, kind in zip(parts, kinds, strict=True))


def _plain(value: Any) -> Any:
    """Only what JSON knows."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in _fields(value).items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _typed(value: Any, hint: Any, name: str) -> Any:
    """What JSON gave, as the hinted type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _typed(value, _member(value, inner, name), name)
    if origin is tuple:
        kinds = [inner[0]] * len(value) if Ellipsis in inner else inner
        return tuple(_typed(part, kind, name) for part, kind in zip(value, kinds, strict=True))
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint.model_validate(value)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        fields = {field.name: field for field in dataclasses.fields(hint)}  # type: ignore[arg-type]
        needed = {key for key, field in fields.items() if _no_default(field)}
        got = set(value) if isinstance(value, dict) else {repr(value)}
        if got - fields.keys() or needed - got:
            raise RecipeError(
                f"{name} should have {sorted(fields)}; missing {sorted(needed - got)}, "
                f"unknown {sorted(got - fields.keys())}"
            )
        return hint(**{key: _typed(value[key], hints[key], f"{name}.{key}") for key in got})  # type: ignore[operator]
    return float(value) if hint is float else value


def _no_default(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _member(value: Any, members: tuple[Any, ...], name: str) -> Any:
    """Which part of a union is meant; dataclasses say it by their `kind`."""
    real = [each for each in members if each is not type(None)]
    if len(real) == 1:
        return real[0]
    kinds = {get_type_hints(each)["kind"].__args__[0]: each for each in real}
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in kinds:
        raise RecipeError(f"{name}.kind should be one of {sorted(kinds)}, not {kind!r}")
    return kinds[kind]
