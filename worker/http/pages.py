"""The upload page, and what stands in the place of a verdict that is not there.

The page's script (upload.js) sends the file or the URL, shows how far upload and job are, and then
opens the verdict.  Page, style and script are three files, so that the policy needs no exception.
"""

from functools import cache
from html import escape
from importlib.resources import files
from string import Template

from ralf.worker.service.records import Status
from ralf.worker.settings import Settings

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">$refresh
<title>$title</title><link rel="stylesheet" href="/upload.css"></head>
"""
_WAITING = Template(
    _HEAD
    + """<body><main><p class="kicker">Ralf</p><h1>$title</h1>
<p class="reason">$words</p><p><a href="/">Check another video</a></p></main></body></html>
"""
)


@cache
def asset(name: str, *, shared: str = "") -> str:
    """A file of this folder, after one of the verdict's page."""
    before = files("ralf.worker.page").joinpath(shared).read_text("utf-8") if shared else ""
    return before + files("ralf.worker.http").joinpath(name).read_text("utf-8")


def upload_page(settings: Settings) -> str:
    """The page at /."""
    return Template(asset("upload.html")).substitute(
        most=_size(settings.max_bytes), hours=_hours(settings.http_upload_ttl_s)
    )


def waiting_page(status: Status) -> str:
    """A job without a verdict: why, or a page that looks again after two seconds."""
    if status.ended:
        failure = status.failure
        title = "No verdict"
        words = failure.message if failure else f"The job was {status.state}."
    else:
        title = "Not yet"
        words = f"The job is {status.state}. This page looks again every two seconds."
    refresh = "" if status.ended else '<meta http-equiv="refresh" content="2">'
    return _WAITING.substitute(title=title, words=escape(words), refresh=refresh)


def _size(count: int) -> str:
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _hours(seconds: int) -> str:
    return f"{seconds / 3600:.3g} hours"
