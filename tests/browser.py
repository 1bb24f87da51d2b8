"""A headless Chromium for tests, spoken to in its DevTools protocol."""

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.waiting import PATIENCE_S, until

NAMES = ("chromium", "chromium-browser", "google-chrome")


def program() -> str:
    """The browser's program; without one the test is skipped, an error with REQUIRE_BROWSER=1."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        why = f"none of {', '.join(NAMES)} is installed"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(f"REQUIRE_BROWSER=1, and {why}")
        pytest.skip(f"{why}; REQUIRE_BROWSER=1 makes this an error")
    return found


class Tab:
    """One tab; calls run on a loop of their own, so that a test reads as plain steps."""

    def __init__(self, loop: asyncio.AbstractEventLoop, line: aiohttp.ClientWebSocketResponse):
        self._loop, self._line, self._number = loop, line, 0
        self.complaints: list[str] = []
        """What the browser logged: errors of scripts, and what a policy forbade."""

    def do(self, method: str, **options: Any) -> Any:
        """Call a method of the protocol."""
        self._number += 1
        ask = self._ask(self._number, method, options)
        return asyncio.run_coroutine_threadsafe(ask, self._loop).result(PATIENCE_S)

    async def _ask(self, number: int, method: str, options: dict[str, Any]) -> Any:
        await self._line.send_json({"id": number, "method": method, "params": options})
        while True:
            said = await self._line.receive_json()
            if said.get("id") == number:
                assert "error" not in said, said["error"]
                return said["result"]
            if said.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}:
                self.complaints.append(str(said["params"]))

    def open(self, url: str) -> None:
        """Go to the address; the page may still be loading."""
        self.do("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        got = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until the expression is true; the page may change meanwhile."""

        def true() -> bool:
            with contextlib.suppress(AssertionError):
                return bool(self.run(script))
            return False

        until(true, lambda: (self.run("document.body.innerText"), self.complaints))

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in a field, as a person does."""
        found = self.do("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        self.do("DOM.setFileInputFiles", files=[str(file)], objectId=found["result"]["objectId"])

    def picture(self, path: Path, width: int, height: int = 800) -> None:
        """What the tab shows in a window of this width, whole page."""
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A browser with an empty profile in the folder, and a tab of it; gone afterwards."""
    command = [program(), "--headless=new", "--no-sandbox", "--disable-gpu", "--mute-audio"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-dev-shm-usage"]
    command += ["--no-first-run", "--disable-extensions", "--disable-background-networking"]
    port_file = folder / "DevToolsActivePort"
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with subprocess.Popen(
        [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until(lambda: port_file.exists() and port_file.read_text().count("\n"))
            port = port_file.read_text().split()[0]
            with _connected(loop, f"http://127.0.0.1:{port}") as line:
                one = Tab(loop, line)
                for domain in ("Page", "Runtime", "Log", "DOM"):
                    one.do(f"{domain}.enable")
                yield one
        finally:
            process.kill()
            process.wait()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@contextlib.contextmanager
def _connected(
    loop: asyncio.AbstractEventLoop, url: str
) -> Iterator[aiohttp.ClientWebSocketResponse]:
    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(PATIENCE_S)

    async def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    async def line(web: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        async with web.put(f"{url}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        return await web.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)

    web = wait(session())
    try:
        found = wait(line(web))
        yield found
        wait(found.close())
    finally:
        wait(web.close())
