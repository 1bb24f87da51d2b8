"""The operator's commands: worker, serve, deliver, janitor, quarantine.  Answers are JSON on
stdout, one document a line.  Exit code 2 for a wrong request.

Nothing heavy is imported until a command runs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralf.worker.cli.queue import address_of, announced, print_document, redis_option

if TYPE_CHECKING:
    from ralf.worker.service.store import Store
    from ralf.worker.settings import Settings


def commands(subparsers: Any) -> None:
    """Add them all."""
    for add in (_worker, _serve, _deliver, _janitor, _quarantine):
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
    from ralf.worker.service.embedded import embedded, on_redis
    from ralf.worker.service.sandbox import refuse_inspection

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
            say(f"http; {http.start(running.redis_url)}")
        say(f"serving; RALF_REDIS_URL={running.redis_url}")
        while not stop.wait(0.5):
            ended = running.ended()
            if ended:
                raise Infrastructure(f"{ended}; its messages are above")
    return 0


def say(text: str) -> None:
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
            from ralf.worker.http.uploads import Uploads, upload_folder
        except ImportError as error:
            hint = install_hint("http")
            raise Infrastructure(f"--http needs {error.name}, which is missing: {hint}") from error
        self._address = Address.read(text)
        self._address.check(settings)
        telemetry.configure(settings)
        folder = stack.enter_context(upload_folder(settings, data))
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
                print_document(asdict(letter))
        elif args.disabled:
            for tenant, url in outbox.disabled_endpoints():
                print_document({"tenant": tenant, "url": url})
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
    url = address_of(args) or settings.redis_url
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
        print_document(vars(Janitor(store, store.settings).run_once()))
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
                print_document(
                    {"job_id": one.job.job_id, "code": one.code, "at": one.at, "why": one.message}
                )
            return 0
        if args.what == "show":
            found = quarantine.show(args.job)
            if found is None:
                print(f"ralf: {missing.format(args.job)}", file=sys.stderr)
                return 2
            print_document(
                {**asdict(found), "job": found.job.model_dump(mode="json", by_alias=True)}
            )
            return 0
        return _each(
            [args.job], quarantine.retry if args.what == "retry" else quarantine.drop, missing
        )
