"""HTML that cannot be broken by what is put into it.

Every string that is not already Html is text and gets escaped, so no caller has to remember to.
Control characters and half surrogates, which no page can show, become a visible mark.
"""

import html
import json
import re
from typing import Any

UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
VOID = frozenset({"img", "input", "meta"})
SHAPES = frozenset({"rect", "line", "circle", "polyline", "path"})


class Html(str):
    """A piece of finished HTML."""

    __slots__ = ()


def text(value: object) -> Html:
    """The value as escaped text; Html stays as it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))))


def foreign(value: object) -> Html:
    """Text from outside: isolated, so that right-to-left marks cannot turn the words around it."""
    return tag("bdi", value)


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """An element.  class_ is class, data_x is data-x; None leaves out, True is the bare name."""
    parts = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(attribute)
        elif value is not None and value is not False:
            parts.append(f'{attribute}="{text(value)}"')
    opening = f"<{' '.join(parts)}>"
    if name in VOID:
        return Html(opening)
    if name in SHAPES and not inside:
        return Html(f"{opening[:-1]}/>")
    return Html(f"{opening}{join(*inside)}</{name}>")


def join(*pieces: object) -> Html:
    """Pieces side by side; None is nothing."""
    return Html("".join(text(piece) for piece in pieces if piece is not None))


def section(name: str, heading: str, *inside: object) -> Html:
    """A part of the page under its heading; the name is its class and must be unique."""
    title = tag("h2", heading, id=f"{name}-heading")
    return tag("section", title, *inside, class_=name, aria_labelledby=f"{name}-heading")


def data(value: Any) -> Html:
    """A value as JSON for a script element: nothing in it can end the element."""
    plain = json.dumps(value, ensure_ascii=True)
    return Html(plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
