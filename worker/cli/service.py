"""The commands of the service: submit, status, result, cancel, watch; worker, serve, deliver,
janitor, quarantine, chaos, fuzz.  Answers are JSON on stdout, one document a line.  Exit codes: 2
for a wrong request, 4 for a job that ended without a verdict, 5 where it may be tried again.

Nothing heavy is imported until a command runs.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ralf.worker.client import Client
    from ralf.worker.service.store import Store
    from ralf.worker.settings import Settings


CLIENT_CODES = (
    "Exit codes: 0 done; 2 a wrong request, no such job, or a job that has not ended; 4 the job "
    "ended without a verdict; 5 another try may succeed: Redis does not answer, the time of --wait "
    "is over, or what the job needed was out of reach."
)


def commands(subparsers: Any) -> None:
    """Add them all."""
    for add in (_submit, _ask, _worker, _serve, _deliver, _janitor, _quarantine, _chaos, _fuzz):
        add(subparsers)


def reaching(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Wrap a command: a Redis that does not answer is one line instead of a traceback."""

    def reach(args: argparse.Namespace) -> int:
        from redis.exceptions import RedisError

        from ralf.worker.errors import Infrastructure

        try:
            return run(args)
        except RedisError as error:
            raise Infrastructure(
                f"Redis does not answer: {error}; check RALF_REDIS_URL or --redis, and that it runs"
            ) from error

    return reach


def answering(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Wrap a client's command: exit 2 for a wrong request, 4 for a job that has no verdict and
    would have none if it ran again, else what other errors give."""

    def answer(args: argparse.Namespace) -> int:
        from pydantic import ValidationError

        from ralf.worker import client
        from ralf.worker.errors import Interrupted, by_code

        try:
            return run(args)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            print(f"ralf: {where}: {first['msg']}", file=sys.stderr)
            return 2
        # Before NotFinished, its base: this one may be tried again, so it exits with 5.
        except client.TimedOut:
            raise
        except client.JobFailed as error:
            # Another run may succeed: 5, not 4.
            if issubclass(by_code().get(error.code, object), Interrupted):
                raise
            print(f"ralf: {error}", file=sys.stderr)
            return 4
        except (
            client.InvalidRequest,
            client.IdempotencyConflict,
            client.NotFound,
            client.NotFinished,
        ) as error:
            print(f"ralf: {error}", file=sys.stderr)
            return 2

    return answer


@contextmanager
def client_at(args: argparse.Namespace) -> Iterator["Client"]:
    """The client at --redis or RALF_REDIS_URL, closed at the end."""
    from ralf.worker.client import connect

    client = connect(_address(args))
    try:
        yield client
    finally:
        client.close()


def _address(args: argparse.Namespace) -> str | None:
    """--redis; or, where RALF_REDIS_URL names none, the service that runs here; else None."""
    import os

    from ralf.worker.service import serving_here
    from ralf.worker.settings import values_of

    if args.redis or "RALF_REDIS_URL" in values_of(os.environ):
        return str(args.redis) if args.redis else None
    return serving_here.address()


def redis_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redis", metavar="URL", help="use the Redis at this address instead of RALF_REDIS_URL"
    )


def _print(document: Any) -> None:
    print(json.dumps(document, default=str), flush=True)


def _submit(subparsers: Any) -> None:
    submit = subparsers.add_parser(
        "submit",
        help="put videos into the queue; print their jobs, or with --wait their verdicts",
        epilog=CLIENT_CODES,
    )
    submit.add_argument(
        "uris",
        nargs="+",
        metavar="URI",
        help="an http(s), s3, gs or file URI, or a path, that the workers can read",
    )
    submit.add_argument(
        "--token",
        help="your own id of the upload: sent again, it finds the same job; with several URIs it "
        "is the beginning of each token (default: made from the URI)",
    )
    submit.add_argument("--tag", help="your own text, which the verdict repeats")
    submit.add_argument("--tenant", default="default", help="whose job it is; tenants take turns")
    submit.add_argument(
        "--priority",
        choices=("high", "default", "backfill"),
        default="default",
        help="high has workers of its own; backfill waits until no other job does",
    )
    submit.add_argument(
        "--max-frames",
        type=int,
        metavar="N",
        help="judge at most N frames of each video (default: what the model says)",
    )
    submit.add_argument(
        "--stop-early",
        type=float,
        metavar="SCORE",
        help="stop once one person's score over 8 faces is SCORE (0 to 1) or more (default: judge "
        "the whole video)",
    )
    submit.add_argument(
        "--callback", metavar="URL", help="push the end of the job to this address as a webhook"
    )
    submit.add_argument(
        "--secret-id",
        default="default",
        metavar="ID",
        help="which secret of RALF_WEBHOOK_SECRETS signs the webhook",
    )
    submit.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help="wait up to so many seconds for each job, and print its verdict",
    )
    redis_option(submit)
    submit.set_defaults(run=answering(_run_submit))


def _run_submit(args: argparse.Namespace) -> int:
    from ralf.worker.client import request
    from ralf.worker.contract import Callback, EarlyStop, Sampling, dump

    uris = [_uri(name) for name in args.uris]
    tokens = _tokens(args.token, uris)
    sampling = None if args.max_frames is None else Sampling(max_frames=args.max_frames)
    stop_early = None if args.stop_early is None else EarlyStop(score=args.stop_early)
    callback = Callback(url=args.callback, secret_id=args.secret_id) if args.callback else None
    asked = [
        request(
            uri,
            token=token,
            tag=args.tag,
            tenant=args.tenant,
            priority=args.priority,
            sampling=sampling,
            stop_early=stop_early,
            callback=callback,
        )
        for uri, token in zip(uris, tokens, strict=True)
    ]
    # Every request was checked above, so that none is sent when one of them is wrong.
    with client_at(args) as client:
        submissions = client.submit_many(asked)
        if args.wait is None:
            for uri, made in zip(uris, submissions, strict=True):
                _print(
                    {
                        "job_id": made.job_id,
                        "state": made.state,
                        "existing": made.existing,
                        "uri": uri,
                    }
                )
            return 0
        for made in submissions:
            print(dump(client.result(made.job_id, timeout=args.wait)), flush=True)
    return 0


def _uri(name: str) -> str:
    """Make a path a file: URI; anything with a scheme stays as it is."""
    return name if "://" in name else Path(name).resolve().as_uri()


def _tokens(token: str | None, uris: list[str]) -> list[str]:
    """One for each; from the URI's hash, since a URI may be long, and signed: a credential."""
    if token is not None and len(uris) == 1:
        return [token]
    prefix = token or "uri"
    return [f"{prefix}:{hashlib.sha256(uri.encode()).hexdigest()[:32]}" for uri in uris]


def _ask(subparsers: Any) -> None:
    """status, result, cancel, watch: one job each."""
    table: list[tuple[str, str, Callable[[argparse.Namespace], int]]] = [
        ("status", "print a job's state, progress and failure", _run_status),
        ("result", "print a job's verdict", _run_result),
        ("cancel", "cancel a job that has not ended", _run_cancel),
        ("watch", "print a job's state at each change, until it ends", _run_watch),
    ]
    for name, help_text, run in table:
        parser = subparsers.add_parser(name, help=help_text, epilog=CLIENT_CODES)
        parser.add_argument("job", metavar="JOB", help="the job's id, which `ralf submit` printed")
        if name == "result":
            parser.add_argument(
                "--wait",
                type=float,
                metavar="SECONDS",
                help="wait up to so many seconds for the verdict (default: do not wait)",
            )
            parser.add_argument(
                "--report", metavar="PAGE", help="write the verdict to this HTML page as well"
            )
        if name == "watch":
            parser.add_argument(
                "--wait",
                type=float,
                metavar="SECONDS",
                help="give up after so many seconds (default: never)",
            )
        redis_option(parser)
        parser.set_defaults(run=answering(run))


def _run_status(args: argparse.Namespace) -> int:
    with client_at(args) as client:
        _print(client.status(args.job).model_dump(mode="json"))
    return 0


def _run_result(args: argparse.Namespace) -> int:
    from ralf.worker.contract import Evidence, dump

    with client_at(args) as client:
        verdict = client.result(args.job, timeout=args.wait)
        print(dump(verdict), flush=True)
        if args.report:
            from ralf.kernels.atomic_files import replace_text
            from ralf.worker.page.page import page  # Jinja2: a backend may not have it

            # Not client.evidence(), which raises where none is kept: the page needs no pictures.
            kept = client.store.evidence(args.job)
            replace_text(Path(args.report), page(verdict, kept or Evidence()))
    return 0


def _run_cancel(args: argparse.Namespace) -> int:
    with client_at(args) as client:
        _print({"job_id": args.job, "state": client.cancel(args.job)})
    return 0


def _run_watch(args: argparse.Namespace) -> int:
    with client_at(args) as client:
        for status in client.watch(args.job, timeout=args.wait):
            _print(status.model_dump(mode="json"))
    return 0


def _settings(args: argparse.Namespace) -> Any:
    from ralf.worker.settings import Settings

    settings = Settings.from_environment()
    changes = {"redis_url": args.redis, "models_dir": getattr(args, "models", None)}
    changes["model"] = getattr(args, "model", None)
    changes["shadow"] = getattr(args, "shadow", None)
    changes["shadow_share"] = getattr(args, "shadow_share", None)
    given = {name: value for name, value in changes.items() if value not in {None, ""}}
    return replace(settings, **given)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="serve this model instead of RALF_MODEL: NAME, NAME@VERSION"
    )
    parser.add_argument(
        "--models", metavar="DIR", help="take models from this folder instead of RALF_MODELS_DIR"
    )


def _worker(subparsers: Any) -> None:
    worker = subparsers.add_parser(
        "worker",
        help="take jobs from Redis and judge them, until SIGTERM or Ctrl-C",
        description="Takes jobs from Redis and judges them. A worker process fetches the upload; "
        "a child process, which holds the model and no credentials, judges it.",
    )
    worker.add_argument(
        "--priority",
        choices=("high", "default", "backfill"),
        default="default",
        help="take jobs of this priority; default takes backfill too when it has nothing else",
    )
    worker.add_argument("--burst", action="store_true", help="stop when the queue is empty")
    worker.add_argument("--max-jobs", type=int, metavar="N", help="stop after N jobs")
    worker.add_argument(
        "--shared",
        type=Path,
        metavar="DIR",
        help="share one child process with all workers that name the same folder",
    )
    worker.add_argument(
        "--capacity",
        type=int,
        metavar="N",
        help="how many jobs the shared child process judges at once (default: 1 with --shared, "
        "all with --parents)",
    )
    worker.add_argument(
        "--parents",
        type=int,
        metavar="N",
        help="start N worker processes that share one child process, as one GPU needs",
    )
    worker.add_argument(
        "--high", type=int, default=0, metavar="N", help="N of --parents take priority high"
    )
    worker.add_argument(
        "--shadow",
        metavar="VERSION",
        help="score some jobs with this version too, without effect on verdicts (default: "
        "RALF_SHADOW)",
    )
    worker.add_argument(
        "--shadow-share",
        type=float,
        metavar="SHARE",
        help="share of the jobs for --shadow, 0 to 1 (default: RALF_SHADOW_SHARE)",
    )
    # For chaos, benches and tests: functions that crash or hang on purpose instead of the model.
    worker.add_argument(
        "--bodies", choices=("moderate", "test"), default="moderate", help=argparse.SUPPRESS
    )
    redis_option(worker)
    _model(worker)
    worker.set_defaults(run=reaching(_run_worker))


def _run_worker(args: argparse.Namespace) -> int:
    if args.parents is not None:
        return _run_parents(args)
    from ralf.worker.service.serve import run_worker

    return run_worker(
        _settings(args),
        args.priority,
        bodies=args.bodies,
        shared=args.shared,
        capacity=args.capacity or 1,
        burst=args.burst,
        max_jobs=args.max_jobs,
    )


def _run_parents(args: argparse.Namespace) -> int:
    from ralf.worker.service.worker_group import run_group

    alone = args.burst or args.max_jobs or args.shared
    if not 0 <= args.high <= args.parents or args.parents < 1 or alone:
        print(
            "ralf: --parents takes as many as --high or more, and neither --burst, --max-jobs "
            "nor --shared",
            file=sys.stderr,
        )
        return 2
    rest = args.parents - args.high
    priorities = ["high"] * args.high + [args.priority] * rest
    return run_group(_settings(args), priorities, capacity=args.capacity, bodies=args.bodies)


def _serve(subparsers: Any) -> None:
    serve = subparsers.add_parser(
        "serve",
        help="run workers and a deliverer on this machine; on request Redis and an upload page too",
        description="Runs workers and a deliverer on this machine until SIGTERM or Ctrl-C. It "
        "prints `serving` when it is ready.",
    )
    serve.add_argument(
        "--embedded", action="store_true", help="start a Redis for this machine alone as well"
    )
    serve.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="keep the jobs and verdicts of --embedded in this folder (default: forget them at the "
        "end)",
    )
    serve.add_argument(
        "--http",
        metavar="ADDRESS:PORT",
        help="serve an upload page and REST there, for example at 127.0.0.1:8080",
    )
    redis_option(serve)
    _model(serve)
    serve.set_defaults(run=reaching(_run_serve))


def _run_serve(args: argparse.Namespace) -> int:
    import signal
    import threading

    from ralf.worker.errors import Infrastructure
    from ralf.worker.service.processes import embedded, on_redis
    from ralf.worker.service.sandbox import refuse_inspection
    from ralf.worker.service.serving_here import announced

    if args.data is not None and not args.embedded:
        print("ralf: --data is for the Redis of --embedded", file=sys.stderr)
        return 2
    refuse_inspection()
    stop = threading.Event()
    # Before anything is started: SIGTERM must stop what it started in order, at any time.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with ExitStack() as stack:
        settings = _settings(args)
        http = _Http(args.http, settings, args.data, stack) if args.http else None
        for_workers = http.for_workers if http else settings
        if args.embedded:
            running = stack.enter_context(embedded(for_workers, data=args.data))
            stack.enter_context(announced(running.redis_url))
        else:
            _ping(for_workers)
            running = stack.enter_context(on_redis(for_workers))
        if http:
            _say(f"http; {http.start(running.redis_url)}")
        _say(f"serving; RALF_REDIS_URL={running.redis_url}")
        while not stop.wait(0.5):
            ended = running.ended()
            if ended:
                raise Infrastructure(f"{ended}; its messages are above")
    return 0


def _say(text: str) -> None:
    """One write for the whole line: print() makes two, and a worker's log can come between."""
    sys.stderr.write(f"ralf: {text}\n")
    sys.stderr.flush()


class _Http:
    """The HTTP server of `serve`: checked before the workers start, opened after them."""

    def __init__(
        self, text: str, settings: "Settings", data: Path | None, stack: ExitStack
    ) -> None:
        from ralf import install_hint
        from ralf.worker import telemetry
        from ralf.worker.errors import Infrastructure

        try:
            from ralf.worker.http import server
            from ralf.worker.http.access import Address
            from ralf.worker.http.uploads import Uploads
        except ImportError as error:
            hint = install_hint("http")
            raise Infrastructure(f"--http needs {error.name}, which is missing: {hint}") from error
        self._address = Address.read(text)
        self._address.check(settings)
        telemetry.configure(settings)
        folder = stack.enter_context(server.upload_folder(settings, data))
        self._uploads = stack.enter_context(Uploads.opened(folder))
        self.for_workers = self._uploads.for_workers(settings)
        self._serving, self._settings, self._stack = server.serving, settings, stack

    def start(self, redis_url: str) -> str:
        """Listen; gives the URL."""
        settings = replace(self._settings, redis_url=redis_url)
        return self._stack.enter_context(self._serving(settings, self._uploads, self._address))


def _ping(settings: "Settings") -> None:
    """Raise RedisError where Redis does not answer: workers would wait for it in silence."""
    from ralf.worker.service.connection import connect

    redis = connect(settings.redis_url, attempts=1, ca_file=settings.redis_ca_file)
    try:
        redis.ping()
    finally:
        redis.close()


def _deliver(subparsers: Any) -> None:
    deliver = subparsers.add_parser(
        "deliver",
        help="push webhooks until SIGTERM or Ctrl-C; or list, retry and drop those that failed",
        description="Without an option: pushes webhooks until SIGTERM or Ctrl-C. A webhook that "
        "was given up is a dead letter.",
    )
    what = deliver.add_mutually_exclusive_group()
    what.add_argument("--dead", action="store_true", help="list dead letters with their reasons")
    what.add_argument(
        "--redeliver", metavar="ID", help="try this dead letter again, or all of them"
    )
    what.add_argument("--drop", metavar="ID", help="delete this dead letter")
    what.add_argument(
        "--disabled", action="store_true", help="list the addresses that answered 410 Gone"
    )
    what.add_argument(
        "--enable",
        nargs=2,
        metavar=("TENANT", "URL"),
        help="push to this address of this tenant again",
    )
    redis_option(deliver)
    deliver.set_defaults(run=reaching(_run_deliver))


def _run_deliver(args: argparse.Namespace) -> int:
    from ralf.worker.service.deliver import Outbox
    from ralf.worker.service.serve import run_deliverer

    with _store(args) as store:
        outbox = Outbox(store)
        if args.dead:
            for letter in outbox.dead():
                _print(asdict(letter))
        elif args.disabled:
            for tenant, url in outbox.disabled_endpoints():
                _print({"tenant": tenant, "url": url})
        elif args.redeliver:
            letters = outbox.dead()
            wanted = [x.id for x in letters] if args.redeliver == "all" else [args.redeliver]
            return _each(wanted, outbox.redeliver, "no dead letter {}; see ralf deliver --dead")
        elif args.drop:
            return _each([args.drop], outbox.drop, "no dead letter {}; see ralf deliver --dead")
        elif args.enable:
            done = outbox.enable_endpoint(*args.enable)
            print("enabled" if done else "was not disabled")
        else:
            return run_deliverer(_settings(args))
    return 0


def _each(names: list[str], do: Callable[[str], Any], missing: str) -> int:
    worst = 0
    for name in names:
        if do(name):
            print(name)
        else:
            print(f"ralf: {missing.format(name)}", file=sys.stderr)
            worst = 2
    return worst


@contextmanager
def _store(args: argparse.Namespace) -> Iterator["Store"]:
    """The store itself, for the operator's commands."""
    from ralf.worker.service.connection import connect
    from ralf.worker.service.store import Store

    settings = _settings(args)
    url = _address(args) or settings.redis_url
    # Not connect()'s ten: a person waits for the answer.
    redis = connect(url, attempts=3, ca_file=settings.redis_ca_file)
    try:
        yield Store(redis, settings)
    finally:
        redis.close()


def _janitor(subparsers: Any) -> None:
    janitor = subparsers.add_parser(
        "janitor",
        help="return jobs whose worker is gone to the queue, until SIGTERM or Ctrl-C",
        description="Returns jobs whose worker is gone to the queue. Every worker has a janitor of "
        "its own; this command runs one where there is no worker.",
    )
    janitor.add_argument(
        "--once", action="store_true", help="look once, print what was found, and end"
    )
    redis_option(janitor)
    janitor.set_defaults(run=reaching(_run_janitor))


def _run_janitor(args: argparse.Namespace) -> int:
    from ralf.worker.service.janitor import Janitor
    from ralf.worker.service.serve import run_janitor

    if not args.once:
        return run_janitor(_settings(args))
    with _store(args) as store:
        _print(vars(Janitor(store, store.settings).run_once()))
    return 0


def _quarantine(subparsers: Any) -> None:
    quarantine = subparsers.add_parser(
        "quarantine", help="list, retry or drop the jobs that crashed their child process twice"
    )
    what = quarantine.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, help_text in (
        ("list", "print one line for each job"),
        ("show", "print all that is known about a job, with its child's last output"),
        ("retry", "run a job once more, and forget its crashes"),
        ("drop", "remove a job from the quarantine"),
    ):
        one = what.add_parser(name, help=help_text)
        if name != "list":
            one.add_argument("job", metavar="JOB", help="the job's id, from `quarantine list`")
        redis_option(one)
    quarantine.set_defaults(run=reaching(_run_quarantine))


def _run_quarantine(args: argparse.Namespace) -> int:
    from ralf.worker.service.quarantine import Quarantine

    missing = "no job {} in quarantine; see ralf quarantine list"
    with _store(args) as store:
        quarantine = Quarantine(store)
        if args.what == "list":
            for one in quarantine.list():
                _print(
                    {"job_id": one.job.job_id, "code": one.code, "at": one.at, "why": one.message}
                )
            return 0
        if args.what == "show":
            found = quarantine.show(args.job)
            if found is None:
                print(f"ralf: {missing.format(args.job)}", file=sys.stderr)
                return 2
            _print({**asdict(found), "job": found.job.model_dump(mode="json", by_alias=True)})
            return 0
        return _each(
            [args.job], quarantine.retry if args.what == "retry" else quarantine.drop, missing
        )


def _chaos(subparsers: Any) -> None:
    chaos = subparsers.add_parser(
        "chaos",
        help="test: kill processes of a service of its own at random, and prove that no job is "
        "lost",
    )
    chaos.add_argument("--jobs", type=int, default=300, metavar="N", help="submit N jobs")
    chaos.add_argument(
        "--workers",
        type=int,
        default=3,
        metavar="N",
        help="start N workers, two or more; the last takes priority high",
    )
    chaos.add_argument(
        "--share",
        action="store_true",
        help="let the workers of priority default share one child process",
    )
    chaos.add_argument(
        "--seed", type=int, default=0, metavar="N", help="choose another mix of jobs and faults"
    )
    chaos.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="give up after N minutes (default: 10, with --default-timings 60)",
    )
    chaos.add_argument(
        "--default-timings",
        action="store_true",
        help="use the leases and delays of production, which takes longer",
    )
    chaos.set_defaults(run=_run_chaos)


def _run_chaos(args: argparse.Namespace) -> int:
    from ralf.worker.chaos.run import run

    return run(args)


def _fuzz(subparsers: Any) -> None:
    fuzz = subparsers.add_parser(
        "fuzz",
        help="test: judge damaged files, and report each that ends without a named error",
    )
    fuzz.add_argument(
        "--mutants", type=int, default=10_000, metavar="N", help="judge N damaged files in all"
    )
    fuzz.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        metavar="N",
        help="stop after N minutes (default: %(default)g)",
    )
    fuzz.add_argument(
        "--seed", type=int, default=0, metavar="N", help="choose another series of damaged files"
    )
    fuzz.add_argument(
        "--children", type=int, default=2, metavar="N", help="judge in N child processes"
    )
    fuzz.add_argument(
        "--folder",
        default="fuzz",
        metavar="DIR",
        help="write results and the reported files there; the same folder continues a run",
    )
    fuzz.add_argument(
        "--only", type=int, metavar="NUMBER", help="make and judge this one damaged file again"
    )
    fuzz.set_defaults(run=_run_fuzz)


def _run_fuzz(args: argparse.Namespace) -> int:
    from ralf.worker.chaos.fuzz import run

    return run(args)
