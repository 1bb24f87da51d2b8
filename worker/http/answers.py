"""What is answered: pages, documents, refusals, and the headers of each.

The upload page's script (upload.js) sends the file or the URL, shows how far upload and job are,
and then opens the verdict.  Page, style and script are three files, so that the policy needs no
exception.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from string import Template

import structlog
from aiohttp import web
from pydantic import BaseModel

from ralf.worker import client as queue
from ralf.worker.contract import dump
from ralf.worker.errors import FetchFailed, HashMismatch, TooLarge
from ralf.worker.http.access import Refused
from ralf.worker.http.documents import Problem
from ralf.worker.service.records import Status
from ralf.worker.settings import Settings

log = structlog.get_logger()

HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "ralf",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'"
UPLOAD_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# An origin of its own: a script in it, if there were one, could not call this server. The page's
# own meta element says the rest.
VERDICT_PAGE = (
    "sandbox allow-scripts allow-forms allow-downloads; base-uri 'none'; frame-ancestors 'none'"
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_STATUSES: Mapping[type[Exception], tuple[int, str, int]] = {
    queue.NotFound: (404, "not_found", 0),
    queue.JobFailed: (409, "no_verdict", 0),
    queue.IdempotencyConflict: (409, "token_conflict", 0),
    queue.InvalidRequest: (400, "bad_request", 0),
    TooLarge: (413, TooLarge.code, 0),
    HashMismatch: (422, HashMismatch.code, 0),
    FetchFailed: (408, "too_slow", 0),
    queue.ClientError: (503, "queue_unavailable", 5),
}
"""Status, code and Retry-After of each error; of two that fit, the first."""
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


def refusal(error: Exception) -> Refused:
    """The answer to an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, FetchFailed) and isinstance(error.__cause__, OSError):
        log.error("http.not_written", error=str(error))
        return Refused(507, "not_written", str(error))
    for kind, (status, code, retry_after) in _STATUSES.items():
        if isinstance(error, kind):
            return Refused(status, code, str(error), retry_after)
    log.error("http.broke", exc_info=error)
    return Refused(500, "internal_error", "an error in Ralf; its log has the details")


def problem(refused: Refused, token: str | None = None) -> web.Response:
    body = Problem(code=refused.code, message=refused.message, token=token)
    headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return document(body, status=refused.status, headers=headers)


def document(
    body: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        status=status, text=dump(body), content_type="application/json", headers=headers
    )


def html(text: str, policy: str, *, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        text=text,
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": policy},
    )


def fixed(text: str, kind: str, policy: str = NOTHING) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(
            text=text,
            content_type=kind,
            charset="utf-8",
            headers={"Content-Security-Policy": policy},
        )

    return answer


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
