"""One http(s) URL into an Intake: redirects judged, breaks mended.

Each redirect is judged like the first URL, and https never leads to http.  A download that breaks
off goes on where it stopped (Range and If-Range, RFC 9110) when the server named this version of
the file by a strong ETag or a date; each time the whole chain of redirects is walked anew.
4xx is final, but for 408, 425 and 429; those and 5xx are the job's to try again.
"""

import email.utils
import re
import time
from contextlib import suppress
from urllib.parse import urljoin

from ralf.worker.errors import FetchDenied, FetchFailed
from ralf.worker.service.egress import Answer, Egress, EgressDenied, EgressFailed, Target
from ralf.worker.service.intake import Intake
from ralf.worker.settings import Settings

CHUNK = 1 << 20
RESUMES = 5
"""How often a broken download goes on before the job itself is retried."""
PAUSE_S = 0.5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRANSIENT = frozenset({408, 425, 429})

_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+|\*)")
_STRONG = re.compile(r'"[\x21\x23-\x7e]{1,500}"')


class Download:
    """One URL into the intake, going on after a break where the server allows."""

    def __init__(
        self, url: str, egress: Egress, settings: Settings, deadline: float, intake: Intake
    ) -> None:
        self.url, self.egress, self.settings = url, egress, settings
        self.deadline, self.intake = deadline, intake
        self._validator = ""
        """What the server calls this version of the file; empty: it cannot be resumed."""

    def run(self) -> None:
        for turn in range(RESUMES + 1):
            try:
                with self._answer() as answer:
                    self._take(answer)
                return
            except EgressDenied as error:
                raise FetchDenied(str(error)) from error
            except (EgressFailed, FetchFailed) as error:
                self.intake.watch()
                if turn == RESUMES or not self.intake.size or not self._validator:
                    raise FetchFailed(str(error)) from error
                self._pause(PAUSE_S * 2**turn)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.intake.watch()
            time.sleep(min(left, 0.2))

    def _answer(self) -> Answer:
        """The first answer that is no redirect."""
        target = self.egress.target(self.url)
        for _ in range(self.settings.fetch_redirects + 1):
            answer = self.egress.request(
                "GET",
                target,
                headers=self._headers(),
                deadline=self.deadline,
                allowance=2 * self.intake.most + CHUNK,  # chunked framing adds to the body
                watch=self.intake.watch,
            )
            if answer.status not in REDIRECTS:
                return answer
            with answer:
                target = self._redirected(target, answer.header("Location"))
        raise FetchDenied(
            f"{target} is behind more than {self.settings.fetch_redirects} redirects; "
            "submit the last URL"
        )

    def _redirected(self, target: Target, location: str) -> Target:
        if not location or re.search(r"[\x00-\x20\x7f-\xff\\]", location):
            raise FetchDenied(f"{target} redirects to something that is not a URL")
        following = self.egress.target(urljoin(target.url, location))
        if target.scheme == "https" and following.scheme != "https":
            raise FetchDenied(f"{target} redirects from https to http")
        return following

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if self.intake.size and self._validator:
            headers |= {"Range": f"bytes={self.intake.size}-", "If-Range": self._validator}
        return headers

    def _take(self, answer: Answer) -> None:
        self._judge(answer)
        total = answer.length
        if answer.status == 206:
            total = self._continued(answer)
        elif self.intake.size:
            self.intake.restart()
        if total is not None:
            self.intake.expect(total)
        self._validator = _validator(answer) or (self._validator if answer.status == 206 else "")
        while part := answer.read(CHUNK):
            self.intake.write(part)
        if total is not None and self.intake.size != total:
            raise FetchFailed(f"{answer.target}: {self.intake.size} of {total} bytes came")

    def _judge(self, answer: Answer) -> None:
        status = answer.status
        if status >= 500 or status in TRANSIENT or (status == 416 and self.intake.size):
            raise FetchFailed(f"{answer.target} answered {status}")
        if status != 200 and not (status == 206 and self.intake.size):
            raise FetchDenied(f"{answer.target} answered {status}, expected 200")
        if answer.header("Content-Encoding").lower() not in {"", "identity"}:
            raise FetchDenied(f"{answer.target} sends it compressed though asked not to")

    def _continued(self, answer: Answer) -> int | None:
        """It goes on: from the right byte of the same file? Gives the whole file's size."""
        found = _RANGE.fullmatch(answer.header("Content-Range"))
        if found is None or int(found[1]) != self.intake.size:
            self._validator = ""
            raise FetchFailed(f"{answer.target} goes on at another byte than was asked")
        if _validator(answer) not in {"", self._validator}:
            self._validator = ""
            raise FetchFailed(f"{answer.target} changed while it was fetched")
        return None if found[3] == "*" else int(found[3])


def _validator(answer: Answer) -> str:
    tag, date = answer.header("ETag"), answer.header("Last-Modified")
    if _STRONG.fullmatch(tag):
        return tag
    with suppress(ValueError):
        return email.utils.format_datetime(email.utils.parsedate_to_datetime(date), usegmt=True)
    return ""
