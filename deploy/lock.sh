#!/usr/bin/env bash
# `make locks`: for each image and for CI, every package with its version and the hashes of its files.
#
# pip installs from deploy/locks with --require-hashes, so that a registry cannot hand out another
# file under the same name. Versions are those of constraints.txt; the files of all platforms and of
# Python 3.11 and later are listed. Run it after a change of pyproject.toml or constraints.txt.
# `deploy/lock.sh --check` says whether a lock is out of date and writes no lock: exit code 1 where one is,
# 3 where a server was not reached (then nothing is known; .not-resolved gets the line that says so).
#
# No lock can be made for the extra gpu: standard TensorRT's package fetches the library from a server
# of NVIDIA's while it is built, so a hash of the package says nothing about the library.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
out=deploy/locks
check=$([ "${1:-}" != --check ] || echo yes)
[ -z "$check" ] || { out=$(mktemp -d); trap 'rm -r "$out"' EXIT; cp deploy/locks/*.txt "$out"; }
mkdir -p "$out"

lock() { # NAME CONSTRAINTS ARGUMENT…
  local said
  said=$(timeout 240 "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
    --no-emit-index-url \
    --constraints "$2" --output-file "$out/$1.txt" "${@:3}" 2>&1 >/dev/null) && return
  echo "$said" >&2
  [ -n "$check" ] && ! grep -qE 'No solution found|conflict|unsatisfiable' <<<"$said" || exit 1
  echo "lock.sh: NOT CHECKED whether deploy/locks/$1.txt is up to date: a server was not reached" |
    tee -a .not-resolved >&2
  exit 3
}
older=$(mktemp)
{ grep -vE '^(torch|torchvision|triton|numpy)==' constraints.txt; echo 'torch==2.11.0'; } >"$older"

echo 'setuptools>=77' | lock build constraints.txt -
lock client constraints.txt pyproject.toml --extra service
# torch apart, since a build may take it from another index; the cpu lock is without it and NVIDIA's libraries.
printf 'torch\ntorchvision\n' | lock torch constraints.txt -
apart=()
for name in torch torchvision triton $(grep -oE '^(nvidia|cuda)-[a-z0-9-]+' "$out/torch.txt"); do
  apart+=(--no-emit-package "$name")
done
lock cpu constraints.txt pyproject.toml --extra cpu --extra stores "${apart[@]}"
lock gpu-rtx "$older" pyproject.toml --extra gpu-rtx --extra stores
lock dev constraints.txt pyproject.toml --extra dev
lock dev-torch-2.11 "$older" pyproject.toml --extra dev
rm "$older"

if [ -n "$check" ]; then
  diff --brief --recursive deploy/locks "$out" || { echo "lock.sh: run make locks" >&2; exit 1; }
fi
