"""Read verdicts from the stream as a member of a group: each goes to one consumer, none is lost.

    python docs/examples/stream_consumer.py redis://127.0.0.1:6379/0 --group review --name a

Prints one JSON line for each entry.  An entry is acknowledged after its effect.  If a consumer dies
in between, another consumer claims the entry after a minute and handles it again, so make the
effect idempotent by job_id.  With --drain it stops when no entry is left.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError


def entries(redis: Any, stream: str, group: str, name: str, idle_ms: int) -> Iterator[Any]:
    """Yield (id, fields) for ever: first what dead consumers left, then new ones; None if none."""
    make_group(redis, stream, group)
    while True:
        _, left, *_ = redis.xautoclaim(stream, group, name, idle_ms, count=100)
        new = redis.xreadgroup(group, name, {stream: ">"}, count=100, block=1000)
        found = [*left, *(new[0][1] if new else [])]
        yield from found or [None]


def make_group(redis: Any, stream: str, group: str) -> None:
    """Make the group, where this user may; the user `reader` of docs/redis.md may not."""
    try:
        redis.xgroup_create(stream, group, id="0", mkstream=True)
    except NoPermissionError:
        pass  # the operator has made it, or the first read says that it is missing
    except ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def handle(entry: dict[str, Any]) -> None:
    """Put your effect here."""
    print(json.dumps(entry), flush=True)


def main() -> None:
    """Consume entries until interrupted."""
    parser = argparse.ArgumentParser(description="Consume Ralf's verdicts.")
    parser.add_argument("redis", help="URL of the service's Redis")
    parser.add_argument("--stream", default="ralf:verdicts")
    parser.add_argument("--group", default="review")
    parser.add_argument("--name", default="a", help="this consumer's name, unique in its group")
    parser.add_argument("--idle-ms", type=int, default=60_000, help="claim after this time")
    parser.add_argument("--drain", action="store_true", help="stop when no entry is left")
    options = parser.parse_args()
    with Redis.from_url(options.redis, decode_responses=True) as redis:
        for found in entries(redis, options.stream, options.group, options.name, options.idle_ms):
            if found is None:
                if options.drain:
                    return
                continue
            number, fields = found
            if fields:  # an entry that was trimmed from the stream has none
                handle({**fields, "data": json.loads(fields["data"])})
            redis.xack(options.stream, options.group, number)


if __name__ == "__main__":
    main()
