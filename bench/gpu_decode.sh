#!/usr/bin/env bash
# On a machine with a GPU and DALI: the parity tests, then DALI against PyAV clip by clip.
#   bench/gpu_decode.sh [RECORD.json]      under ten minutes; the tests' outcome is its exit code
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
record=${1:-bench/decode_gpu_$(date +%Y%m).json}
clips=$(mktemp -d)
trap 'rm -rf "$clips"' EXIT
outcome=0
REQUIRE_GPU=1 REQUIRE_DALI=1 "$python" -m pytest -m 'gpu or dali' \
  tests/test_parity.py tests/test_decode_dali.py tests/test_routing.py || outcome=$?
"$python" -m tests.decode_clips "$clips"
"$python" -m ralf bench decode --device cuda "$clips"/* >"$record.part"
mv "$record.part" "$record"
cat "$record"
exit "$outcome"
