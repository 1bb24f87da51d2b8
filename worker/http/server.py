"""The HTTP server of `ralf serve --http`: routes, requests, answers.

    POST /jobs            a file (a form's part `file`, or the whole body) or JSON with a `url`
    GET /jobs/ID          where it stands, and the verdict
    GET /jobs/ID/page     the verdict as a page
    DELETE /jobs/ID       cancel it
    GET /                 the upload page;  /openapi.json;  /healthz

It is a client of the queue like any other.  An upload is written to disk while it comes, with the
worker's own cap and least rate, and becomes a `file:` URI under a root of this server's tenant.
"""

import asyncio
import json
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import structlog
from aiohttp import BodyPartReader, StreamReader, web
from aiohttp.multipart import MultipartReader
from pydantic import ValidationError
from redis.exceptions import RedisError

from ralf.worker import client as queue
from ralf.worker.contract import Evidence, Media, Verdict, first_fault
from ralf.worker.errors import HashMismatch, TooLarge
from ralf.worker.http.access import Access, Address, Refused
from ralf.worker.http.answers import (
    HEADERS,
    NOTHING,
    UPLOAD_PAGE,
    VERDICT_PAGE,
    Handler,
    asset,
    document,
    fixed,
    html,
    problem,
    refusal,
    upload_page,
    waiting_page,
)
from ralf.worker.http.documents import AS_JSON, Accepted, JobAnswer, Links, NewJob, openapi
from ralf.worker.http.uploads import TENANT, Uploads
from ralf.worker.page.page import page
from ralf.worker.service.download import Fetched, receiving
from ralf.worker.service.records import Status
from ralf.worker.settings import Settings

log = structlog.get_logger()

SILENT_S = 30.0
"""An upload of which nothing comes for so long is broken off."""
FIELD_BYTES = 64 * 1024
"""The most in a field of a form, and in a JSON body."""
FIELDS = 32
PIECE = 256 * 1024
SWEEP_S = 2.0
WAIT_MOST_S = 60.0
LOOK_S = 0.25
START_S = 30.0


class Server:
    """The handlers and what they share."""

    def __init__(self, client: queue.Client, uploads: Uploads, settings: Settings) -> None:
        self.client, self.uploads, self.settings = client, uploads, settings
        self.access = Access(settings.http_token, settings.http_names)
        self._coming = 0
        # Between naming an upload and noting its job nobody else may decide about the same file.
        self._naming = asyncio.Lock()

    def app(self) -> web.Application:
        """All routes, and the sweep of uploads."""
        app = web.Application(middlewares=[self._guarded])
        style = asset("upload.css", shared="page.css")
        described = json.dumps(openapi(token_needed=bool(self.settings.http_token)))
        app.add_routes(
            [
                web.post("/jobs", self.submit),
                web.get("/jobs/{job_id}", self.read),
                web.delete("/jobs/{job_id}", self.cancel),
                web.get("/jobs/{job_id}/page", self.page),
                web.get("/healthz", self.health),
                web.get("/openapi.json", fixed(described, "application/json")),
                web.get("/", fixed(upload_page(self.settings), "text/html", UPLOAD_PAGE)),
                web.get("/upload.css", fixed(style, "text/css")),
                web.get("/upload.js", fixed(asset("upload.js"), "text/javascript")),
            ]
        )
        app.cleanup_ctx.append(self._sweeping)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check who calls, and make every error an answer."""
        try:
            self.access.check(request.method, request.path, request.headers, request.query)
            answer = await handler(request)
        except web.HTTPException as error:
            # Of routes: "Not Found" becomes not_found.
            code = error.reason.lower().replace(" ", "_")
            answer = problem(Refused(error.status, code, f"{request.method}: {error.reason}"))
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
        # The border: whatever a handler raises becomes an answer.
        except Exception as error:  # noqa: BLE001
            answer = problem(refusal(error), getattr(error, "token", None))
        for name, value in ({"Content-Security-Policy": NOTHING} | dict(HEADERS)).items():
            answer.headers.setdefault(name, value)
        log.info("http.request", method=request.method, path=request.path, status=answer.status)
        return answer

    async def submit(self, request: web.Request) -> web.Response:
        """A file or a URL in, a job out."""
        if self._coming >= self.settings.http_uploads_at_once:
            raise Refused(
                429,
                "too_many_uploads",
                f"{self._coming} uploads come already, and no more are taken at once; "
                "try again soon",
                retry_after=5,
            )
        self._coming += 1
        try:
            await self._room(request.content_length or 0)
            new, file = await self._received(request)
            token = new.token or uuid.uuid4().hex
            made = await self._submitted(new, file, token)
        finally:
            self._coming -= 1
        links = self._links(made.job_id)
        body = Accepted(
            job_id=made.job_id,
            token=token,
            state=made.state,
            existing=made.existing,
            links=links,
        )
        return document(body, status=202, headers={"Location": links.self})

    async def _room(self, coming: int) -> None:
        """Refuse before anything is read: the queue or the folder is full, or it is too large."""
        if coming > self.settings.max_bytes + FIELDS * FIELD_BYTES:
            raise TooLarge(
                f"the upload has {coming} bytes; at most {self.settings.max_bytes} are taken"
            )
        with self.client.reaching():
            counts = await asyncio.to_thread(self.client.store.counts)
        # A backfill's jobs wait behind all others, however many there are.
        waiting = sum(n for name, n in counts.waiting.items() if name != "backfill")
        if waiting >= self.settings.http_queue_max:
            raise Refused(
                429, "queue_full", f"{waiting} jobs wait already; try again later", retry_after=30
            )
        held = self.uploads.held()
        if held + coming > self.settings.http_uploads_bytes:
            raise Refused(
                429,
                "uploads_full",
                f"{held} bytes of uploads wait for their verdicts, and at most "
                f"{self.settings.http_uploads_bytes} are kept; try again later",
                retry_after=30,
            )

    async def _received(self, request: web.Request) -> tuple[NewJob, Fetched | None]:
        """What is asked for, and the file unless it is a URL."""
        kind = request.content_type if "Content-Type" in request.headers else ""
        if kind == "application/json":
            text = b"".join([part async for part in _pieces(request.content, most=FIELD_BYTES)])
            try:
                new = NewJob.model_validate_json(text)
            except ValidationError as error:
                raise _invalid(error) from None
            if new.url is None:
                raise Refused(400, "bad_request", "url: expected in JSON; a file goes in a form")
            return new, None
        if kind == "multipart/form-data":
            return await self._from_form(await request.multipart())
        if kind and not kind.startswith(("video/", "application/octet-stream")):
            raise Refused(
                415,
                "content_type",
                "expected a form (curl -F file=@clip.mp4), JSON with a url, or the video itself as "
                f"video/* or application/octet-stream, got {kind}",
            )
        # First the fields: a wrong one is not worth an upload.
        new = _new_job(request.query)
        return new, await self._to_disk(request.content, new.sha256)

    async def _from_form(self, form: MultipartReader) -> tuple[NewJob, Fetched]:
        fields: dict[str, str] = {}
        file: Fetched | None = None
        try:
            for _ in range(FIELDS):
                try:
                    part = await form.next()
                except ValueError as error:
                    raise Refused(400, "bad_request", f"the form cannot be read: {error}") from None
                if part is None:
                    break
                name = part.name if isinstance(part, BodyPartReader) else None
                if name is None or not isinstance(part, BodyPartReader):
                    raise Refused(400, "bad_request", "expected a name for each part of the form")
                if name in fields or (name == "file" and file is not None):
                    raise Refused(400, "bad_request", f"{name}: expected once, came twice")
                if name == "file":
                    file = await self._to_disk(part, None)
                else:
                    text = b"".join([each async for each in _pieces(part, most=FIELD_BYTES)])
                    fields[name] = text.decode(errors="replace")
            else:
                raise Refused(400, "bad_request", f"expected at most {FIELDS - 1} parts")
            new = _new_job(fields)
            if file is None:
                raise Refused(400, "bad_request", "file: expected a part of this name in the form")
            if new.sha256 not in {None, file.sha256}:
                raise HashMismatch(
                    f"the upload's SHA-256 is {file.sha256}; the request says {new.sha256}"
                )
        except BaseException:
            if file is not None:
                file.path.unlink(missing_ok=True)
            raise
        return new, file

    async def _to_disk(self, source: StreamReader | BodyPartReader, sha256: str | None) -> Fetched:
        """Write it piece by piece; nothing stays on any error."""
        media = Media(uri="file:///upload", sha256=sha256)
        with receiving(media, self.uploads.folder, self.settings, lambda: None) as upload:
            async for piece in _pieces(source):
                upload.write(piece)
            if not upload.size:
                raise Refused(400, "bad_request", "expected a file, got no bytes")
        return upload.fetched

    async def _submitted(self, new: NewJob, file: Fetched | None, token: str) -> queue.Submission:
        """Put it into the queue; an upload stays only if a job reads it."""
        async with self._naming:
            path = None
            try:
                if file is None:
                    media = Media(uri=new.url or "", sha256=new.sha256)
                else:
                    path = await asyncio.to_thread(self.uploads.keep, file, token)
                    media = Media(uri=path.as_uri(), sha256=file.sha256, size_bytes=file.size_bytes)
                made = await asyncio.to_thread(
                    self.client.submit, media, token=token, tenant=TENANT, **new.options()
                )
            except queue.QueueUnavailable as error:
                # The job may have been stored, so its upload stays; the same token finds it.
                vars(error)["token"] = token
                raise
            except BaseException:
                if path is not None:
                    self.uploads.drop_unclaimed(path)
                elif file is not None:
                    file.path.unlink(missing_ok=True)
                raise
            if path is not None:
                self.uploads.belongs_to(path, made.job_id)
            return made

    async def read(self, request: web.Request) -> web.Response:
        """The job, after at most `wait` seconds."""
        seconds = _seconds(request.query.get("wait", "0"))
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        status = await self._status(request)
        while not status.ended and loop.time() < end:
            await asyncio.sleep(LOOK_S)
            status = await self._status(request)
        return await self._answer(status)

    async def cancel(self, request: web.Request) -> web.Response:
        """Stop it, unless it has ended."""
        status = await self._status(request)
        await asyncio.to_thread(self.client.cancel, status.job_id)
        return await self._answer(await self._status(request))

    async def page(self, request: web.Request) -> web.Response:
        """The verdict's page, or one that says that there is none yet."""
        status = await self._status(request)
        if status.state == "succeeded":
            verdict = await self._verdict(status)
            kept = await asyncio.to_thread(self.client.store.evidence, status.job_id)
            text = await asyncio.to_thread(page, verdict, kept or Evidence())
            return html(text, VERDICT_PAGE)
        return html(waiting_page(status), UPLOAD_PAGE, status=409 if status.ended else 202)

    async def health(self, _: web.Request) -> web.Response:
        """Whether the queue answers and has workers."""
        try:
            counts = await asyncio.to_thread(self.client.store.counts)
        except RedisError:
            return web.Response(status=503, text="Redis does not answer\n")
        workers = sum(counts.workers.values())
        words = f"Redis answers; {workers} workers\n"
        return web.Response(status=200 if workers else 503, text=words)

    async def _status(self, request: web.Request) -> Status:
        job_id = request.match_info["job_id"]
        status = await asyncio.to_thread(self.client.status, job_id)
        if status.tenant != TENANT:
            raise queue.NotFound(f"no job {job_id!r} came by HTTP")
        return status

    async def _verdict(self, status: Status) -> Verdict:
        return await asyncio.to_thread(self.client.result, status.job_id)

    async def _answer(self, status: Status) -> web.Response:
        verdict = await self._verdict(status) if status.state == "succeeded" else None
        return document(JobAnswer.of(status, verdict, self._links(status.job_id)))

    def _links(self, job_id: str) -> Links:
        path = f"/jobs/{job_id}/page"
        return Links(self=f"/jobs/{job_id}", page=path + self.access.page_query(path))

    async def _sweeping(self, _: web.Application) -> AsyncIterator[None]:
        """Remove uploads whose jobs have ended, while the server runs."""
        task = asyncio.create_task(self._sweep())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                async with self._naming:
                    ttl_s = self.settings.http_upload_ttl_s
                    await asyncio.to_thread(
                        self.uploads.sweep, self._ended, self.client.cancel, ttl_s
                    )
            except (queue.ClientError, OSError) as error:
                log.warning("http.sweep_failed", error=str(error))

    def _ended(self, job_id: str) -> bool:
        try:
            return self.client.status(job_id).ended
        except queue.NotFound:
            return True


@contextmanager
def serving(settings: Settings, uploads: Uploads, address: Address) -> Iterator[str]:
    """Answer at the address while the block runs, in a thread; gives the URL."""
    client = queue.connect(settings=settings)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(
        Server(client, uploads, settings).app(), access_log=None, shutdown_timeout=2.0
    )

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, address.host, address.port).start()
        return int(runner.addresses[0][1])

    async def stop() -> None:
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever, name="http", daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(START_S)
        host = f"[{address.host}]" if ":" in address.host else address.host
        yield f"http://{host}:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(START_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(START_S)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        client.close()


async def _pieces(source: StreamReader | BodyPartReader, most: int = 0) -> AsyncIterator[bytes]:
    """The bytes as they come; `most` bounds them, where it is not 0."""
    size = 0
    while True:
        try:
            async with asyncio.timeout(SILENT_S):
                read = source.read if isinstance(source, StreamReader) else source.read_chunk
                piece = await read(PIECE)
        except TimeoutError:
            raise Refused(408, "too_slow", f"nothing came for {SILENT_S:g} s") from None
        # OSError: the caller hung up.  ValueError: a form that breaks off.
        except (OSError, ValueError, web.RequestPayloadError) as error:
            raise Refused(400, "broken_off", f"the request broke off: {error}") from None
        if not piece:
            return
        size += len(piece)
        if most and size > most:
            raise Refused(413, "too_large", f"expected at most {most} bytes here")
        yield piece


def _new_job(fields: Mapping[str, str]) -> NewJob:
    """From the fields of a form or of a query."""
    if "url" in fields:
        raise Refused(400, "bad_request", "url: expected a file here; send a URL as JSON")
    given: dict[str, Any] = dict(fields)
    for name in AS_JSON & given.keys():
        try:
            given[name] = json.loads(given[name])
        # A RecursionError: nested too deep.
        except (ValueError, RecursionError):
            raise Refused(400, "bad_request", f"{name}: expected JSON") from None
    try:
        return NewJob.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise _invalid(error) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= WAIT_MOST_S:
        raise Refused(400, "bad_request", f"wait: expected 0 to {WAIT_MOST_S:g} seconds")
    return seconds


def _invalid(error: ValidationError) -> Refused:
    return Refused(400, "bad_request", f"{first_fault(error)}; see /openapi.json")
