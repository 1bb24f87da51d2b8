"""How long uploads wait for a worker, without a backfill and with one: real worker, shipped model.

    .venv/bin/python bench/backfill_waits.py CLIP [UPLOADS]

Prints JSON: seconds from submission to start of each upload, and a backfill job's length.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path

from ralf.worker.client import Client, connect
from ralf.worker.service.embedded import embedded
from ralf.worker.service.processes import as_environment
from ralf.worker.settings import Settings


def waits(client: Client, clip: str, uploads: int) -> dict[str, list[float]]:
    """One upload after the other, at moments that have nothing to do with the queue's."""
    found: dict[str, list[float]] = {"wait_s": [], "run_s": []}
    for _ in range(uploads):
        made = client.submit(clip, token=uuid.uuid4().hex)
        client.result(made.job_id, timeout=300)
        status = client.status(made.job_id)
        assert status.started_at is not None and status.ended_at is not None
        found["wait_s"].append(round(status.started_at - status.submitted_at, 3))
        found["run_s"].append(round(status.ended_at - status.started_at, 3))
        time.sleep(0.37)
    return found


def main(clip: Path, uploads: int) -> None:
    settings = replace(Settings.from_environment(), file_roots=("/",), log_level="warning")
    with (
        tempfile.TemporaryDirectory() as folder,
        embedded(settings, deliver=False) as service,
    ):
        client = connect(service.redis_url, settings=settings)
        uri = clip.resolve().as_uri()
        waits(client, uri, 2)  # warm
        record = {"without": waits(client, uri, uploads)}
        manifest = Path(folder, "m.csv")
        manifest.write_text("id,uri\n" + "".join(f"{n},{uri}\n" for n in range(100_000)))
        at = replace(settings, redis_url=service.redis_url)
        backfill = subprocess.Popen(
            [sys.executable, "-m", "ralf", "backfill", str(manifest)],
            env=as_environment(at, os.environ),
            stdout=subprocess.DEVNULL,
        )
        while not client.store.counts().running["backfill"]:
            time.sleep(0.1)
        record["with"] = waits(client, uri, uploads)
        backfill.terminate()
        backfill.wait()
        client.close()
    for kind, figures in record.items():
        for name, values in figures.items():
            ordered = sorted(values)
            print(f"{kind} {name}: median {ordered[len(ordered) // 2]}, most {ordered[-1]}")
    print(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12)
