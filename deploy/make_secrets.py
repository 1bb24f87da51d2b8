"""Make all passwords of a deployment: one per Redis user, one for webhooks, one for Grafana.

    python deploy/make_secrets.py [FOLDER] [--host redis]

Writes these files into FOLDER, by default deploy/secrets/, and never overwrites one:

    users.acl       deploy/redis/users.acl with the hashes of the passwords, for Redis
    ROLE.env        RALF_REDIS_URL of producer, worker, janitor, deliverer and reader; the
                    deliverer's file also has the secret that signs webhooks. Kubernetes' Secrets
                    are made from these
    ROLE.redis_url, deliverer.webhook_secrets       each value alone, which Compose mounts
    grafana.env     the password of Grafana's user admin

Redis gets only hashes.  Each role's files go to the container of that role alone, as files: what
is in the environment of a container's first process can be read by every process of its user.  The
script uses only the standard library.
"""

import argparse
import base64
import hashlib
import os
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
USERS = HERE / "redis" / "users.acl"


def write_secrets(folder: Path, host: str = "redis") -> Path:
    """Make the folder and fill it; raises FileExistsError when it exists."""
    folder.mkdir(mode=0o700, parents=True)
    users = USERS.read_text()
    for name in re.findall(r"#([A-Z]+)\b", users):
        password = secrets.token_urlsafe(32)
        users = users.replace(f"#{name} ", f"#{hashlib.sha256(password.encode()).hexdigest()} ")
        role = name.lower()
        values = {"redis_url": f"redis://{role}:{password}@{host}:6379/0"}
        if role == "deliverer":
            key = base64.b64encode(secrets.token_bytes(32)).decode()
            values["webhook_secrets"] = f"*/default=whsec_{key}"
        lines = [f"RALF_{name.upper()}={value}" for name, value in values.items()]
        _write(folder / f"{role}.env", "\n".join(lines), 0o600)
        for setting, value in values.items():
            # The container's user must read the mounted file; the folder is closed to others here.
            _write(folder / f"{role}.{setting}", value, 0o644)
    # Redis runs as another user and must read this file; it contains only hashes.
    _write(folder / "users.acl", users.rstrip("\n"), 0o644)
    password = secrets.token_urlsafe(24)
    _write(folder / "grafana.env", f"GF_SECURITY_ADMIN_PASSWORD={password}", 0o600)
    return folder


def _write(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text + "\n")
    path.chmod(mode)


def main() -> int:
    """Write the files; 2 when the folder exists."""
    parser = argparse.ArgumentParser(description="Write passwords for a deployment.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "secrets")
    parser.add_argument("--host", default="redis", help="where Redis is (%(default)s)")
    options = parser.parse_args()
    try:
        print(write_secrets(options.folder, options.host))
    except FileExistsError:
        print(f"make_secrets: {options.folder} exists; remove it to rotate", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
