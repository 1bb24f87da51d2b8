"""The upload page in a real browser: a file chosen, dropped, followed, and its verdict's page."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ralf.worker.contract import Progress
from ralf.worker.service.store import Store
from tests.browser import Tab, tab
from tests.documents import a_failure, a_track, a_verdict, an_evidence
from tests.test_http import TOKEN, Caller, opened
from tests.test_store import claim
from tests.waiting import until

__all__ = ["opened"]
READY = "!document.getElementById('ask')?.hidden && document.readyState == 'complete'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One for all tests here: it takes seconds to start."""
    with tab(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a person uploads."""
    path = tmp_path_factory.mktemp("clip") / "holiday <b>clip.mp4"
    path.write_bytes(bytes(300_000))
    return path


def text(of: str) -> str:
    """What an element shows, as an expression."""
    return f"document.getElementById('{of}').textContent"


def queued(store: Store) -> None:
    """Wait for a job."""
    until(lambda: sum(store.counts().waiting.values()))


def test_a_file_is_followed_from_the_page_to_its_verdict_and_back(
    browser: Tab, opened: Callable[..., Caller], store: Store, clip: Path
):
    """Progress as the worker tells it; Back leads to a page that takes the same file again."""
    browser.complaints.clear()
    browser.open(opened().url)
    browser.until(READY)
    browser.choose("#file", clip)
    queued(store)
    browser.until(f"{text('step')} == 'Waiting for a worker'")
    running = claim(store)
    store.beat(
        running,
        progress=Progress(stage="analyze", percent=40, frames_done=12, frames_total=32, faces=3),
    )
    browser.until(f"{text('detail')} == '12 of 32 frames, 3 faces'")
    at = browser.run("[document.getElementById('bar').value, location.hash]")
    verdict = a_verdict([a_track([0.9, 0.9, 0.9])], job_id=running.job_id, tag=running.job.tag)
    store.end(running, verdict, evidence=an_evidence())
    browser.until("location.pathname.endsWith('/page') && document.readyState == 'complete'")
    title = browser.run("document.title")
    # Its own script runs; it has no origin, so it could not read an answer of this server.
    browser.run("document.querySelector('[name=decision]').click()")
    browser.run("document.querySelector('#review-form [type=submit]').click()")
    saved = browser.run(text("review-saved"))
    origin = browser.run("self.origin")
    browser.run("history.back()")
    browser.until(READY)
    browser.choose("#file", clip)
    queued(store)

    assert at == [40, f"#job={running.job_id}"]
    assert "Likely forged" in title and clip.name in title
    assert (saved[:8], origin) == ("Saved as", "null")
    assert browser.complaints == []


def test_a_job_that_fails_is_said_with_its_reason_and_cancel_works(
    browser: Tab, opened: Callable[..., Caller], store: Store, clip: Path
):
    """The page is then ready for another."""
    call = opened()
    browser.open(call.url)
    browser.until(READY)
    browser.choose("#file", clip)
    queued(store)
    store.end(claim(store), a_failure("corrupt_media", "it is <i>not</i> a video"))
    browser.until(f"{text('ended-words')} == 'it is <i>not</i> a video'")
    browser.run("document.getElementById('again').click()")
    browser.choose("#file", clip)
    queued(store)
    browser.until(f"{text('step')} == 'Waiting for a worker'")
    browser.run("document.getElementById('cancel').click()")
    browser.until(f"{text('ended-title')} == 'Cancelled'")

    assert sum(store.counts().waiting.values()) == 0


def test_a_dropped_file_and_a_pasted_address_become_jobs(
    browser: Tab, opened: Callable[..., Caller], store: Store
):
    """Each with its name as tag; a signed address without its query."""
    call = opened()
    dropped = (
        "(() => { const data = new DataTransfer(); data.items.add(new File(['clip'], 'a.mp4'));"
        "document.dispatchEvent(new DragEvent('drop', {dataTransfer: data})); })()"
    )
    pasted = (
        "document.getElementById('url').value = 'https://media.example/1.mp4?Signature=s';"
        "document.querySelector('#ask button').click()"
    )
    tags = []
    for act in (dropped, pasted):
        browser.open(call.url)
        browser.until(READY)
        browser.run(act)
        queued(store)
        tags.append(claim(store).job.tag)

    assert tags == ["a.mp4", "https://media.example/1.mp4"]


def test_the_page_asks_for_the_token_and_opens_the_verdict_with_it(
    browser: Tab, opened: Callable[..., Caller], store: Store, clip: Path
):
    """A wrong one is asked for again; the link to the verdict carries a key, not the token."""
    call = opened(http_token=TOKEN)
    browser.open(call.url)
    browser.until(READY)
    browser.choose("#file", clip)
    for token in ("wrong", TOKEN):
        browser.until("!document.getElementById('token-form').hidden")
        browser.run(f"document.getElementById('token').value = '{token}'")
        browser.run("document.querySelector('#token-form button').click()")
    queued(store)
    running = claim(store)
    store.end(running, a_verdict(job_id=running.job_id), evidence=an_evidence())
    browser.until("location.pathname.endsWith('/page') && document.title.includes('Likely')")

    assert TOKEN not in browser.run("location.href")
    assert "key=" in browser.run("location.search")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_at_the_side(
    browser: Tab, opened: Callable[..., Caller], tmp_path: Path, width: int
):
    """On a screen and on a telephone, and what is pressed is large enough for a finger."""
    browser.open(opened().url)
    browser.until(READY)
    browser.picture(tmp_path / "page.png", width)
    wide, *heights = browser.run(
        "[document.documentElement.scrollWidth, ...['url', 'drop'].map("
        "(name) => document.getElementById(name).getBoundingClientRect().height)]"
    )

    assert wide <= width
    assert min(heights) >= 40
