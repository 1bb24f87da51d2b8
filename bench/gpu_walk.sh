#!/usr/bin/env bash
# On a machine with a GPU: the walk's tests, then the finder, whole clips and a soak, measured.
#   bench/gpu_walk.sh [FOLDER]      records go to FOLDER (bench/); under ten minutes; the tests'
#                                   outcome is its exit code.  RALF_MODEL and RALF_MODELS_DIR name
#                                   the model; without them it is an untrained one of the same size.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=${1:-bench}
when=$(date +%Y%m)
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
outcome=0
REQUIRE_GPU=1 "$python" -m pytest -q -m gpu \
  tests/test_mtcnn_cuda.py tests/test_resample.py tests/test_bench_pipeline.py || outcome=$?
"$python" -m tests.walk_clips "$made"
export RALF_MODELS_DIR=${RALF_MODELS_DIR:-$made/models} RALF_MODEL=${RALF_MODEL:-untrained}
measure() { # NAME, and what to measure
  "$python" -m ralf bench "${@:2}" >"$made/$1.json"
  mv "$made/$1.json" "$folder/$1_$when.json"
  cat "$folder/$1_$when.json"
}
measure find_gpu find "$made/long.mp4" --device cuda --frames 32 --repeats 3
measure pipeline_gpu pipeline "$made/long.mp4" --device cuda --frames 32 --at-once 8 --stride
measure soak_gpu pipeline "$made"/small/* --device cuda --frames 16 --at-once 8 --repeats 1 \
  --soak 2000 --soak-seconds 200
exit "$outcome"
