#!/usr/bin/env bash
# Every GPU record of Ralf, phase by phase, each within its own time limit.
#
# A phase that fails or runs out of time is noted in summary.txt, and the next one runs.  Records lie
# in FOLDER/records as they are made, so that whatever was reached is kept.
#
# A machine with Ralf installed (torch, triton; torch-tensorrt, DALI and PyAV for the later steps):
#
#     bench/gpu_all.sh all FOLDER
#
# A machine that reaches no package registry (as tried: Python 3.12, torch 2.11, triton, timm, no
# PyAV, no TensorRT, no DALI), to which files travel in parts of at most 64 MiB:
#
#     bench/gpu_all.sh pack           here, with a registry: makes .gpu/{0,r1,r2,d1,d2,d3}
#     bench/gpu_all.sh sizes          the checkout and each part against 64 MiB
#   there, with the checkout and the named part beside it, one after the other:
#     bench/gpu_all.sh torch  FOLDER .gpu/0     600 s   smoke, engine, destructor, blocks, levers
#     bench/gpu_all.sh find   FOLDER .gpu/r1    240 s   the face finder
#     bench/gpu_all.sh rtx    FOLDER .gpu/r2    420 s   plans by TensorRT-RTX, engines timed
#     bench/gpu_all.sh stash  FOLDER .gpu/d1    120 s   only keeps the part
#     bench/gpu_all.sh tests  FOLDER .gpu/d2    240 s   pytest -m gpu, without DALI
#     bench/gpu_all.sh walk   FOLDER .gpu/d3    600 s   whole clips, parity, decoders, soak
#   FOLDER is the same in each call, and must outlive it.  With OUT set, each call leaves
#   summary.txt, log.txt and records.tgz there.
#
# REHEARSE=1 bench/gpu_all.sh all FOLDER runs the same commands on a CPU at tiny sizes.
# BUDGET=seconds bounds one call; PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
usage="usage: bench/gpu_all.sh pack | sizes | all|torch|find|rtx|stash|tests|walk FOLDER [PART]"
step=${1:?$usage}
PART_BYTES=${PART_BYTES:-50000000}

pack() { # what the offline machine lacks, at the project's own versions
  rm -rf .gpu && mkdir -p .gpu/0/wheels .gpu/tmp/wheels .gpu/tmp/site .gpu/tmp/source
  local platforms=() glibc
  for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
  get() { # FOLDER REQUIREMENT…
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      "${platforms[@]}" -d "$1" "${@:2}"
  }
  pinned() { for name; do sed -n "s/^\($name==.*\)$/\1/ip" constraints.txt; done; }
  # shellcheck disable=SC2046
  get .gpu/0/wheels $(pinned pydantic pydantic_core annotated-types typing-inspection structlog redis rq \
    croniter av facenet-pytorch standardwebhooks Jinja2 MarkupSafe psutil pytest pytest-timeout iniconfig pluggy) || return 1
  local rtx
  rtx=$(sed -n 's/.*tensorrt-rtx-cu13==\([0-9.]*\).*/\1/p' pyproject.toml | head -1)
  get .gpu/tmp/wheels torch-tensorrt-rtx==2.11.0 "tensorrt-rtx-cu13-libs==$rtx" "tensorrt-rtx-cu13-bindings==$rtx" dllist || return 1
  unpack_wheels
  python3 -m pip download -q --no-deps -d .gpu/tmp/source "tensorrt-rtx-cu13==$rtx" || return 1
  tar xzf .gpu/tmp/source/tensorrt_rtx_cu13-*.tar.gz -C .gpu/tmp/source
  cp -r .gpu/tmp/source/tensorrt_rtx_cu13-*/tensorrt_rtx .gpu/tmp/site/
  rm -rf .gpu/tmp/site/tensorrt_rtx/plugin # it imports a module that 1.4.0.76's bindings lack
  local name
  for name in tensorrt_rtx tensorrt_rtx_cu13; do
    mkdir -p ".gpu/tmp/site/$name-$rtx.dist-info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "$rtx" >".gpu/tmp/site/$name-$rtx.dist-info/METADATA"
  done
  split_into r
  # shellcheck disable=SC2046
  get .gpu/tmp/wheels $(pinned nvidia-dali-cuda130 gast astunparse six optree nvtx makefun libcst) || return 1
  unpack_wheels
  rm -rf .gpu/tmp/site/nvidia/dali/{include,test}
  find .gpu/tmp/site/nvidia/dali \( -name 'backend_impl.cpython-*' -o -name 'python_function_plugin.cpython-*' \) \
    ! -name '*-312-*' -delete
  split_into d
  git describe --always --dirty --abbrev=12 >.gpu/0/commit
  rm -rf .gpu/tmp
  sizes
}
unpack_wheels() {
  local wheel
  for wheel in .gpu/tmp/wheels/*.whl; do unzip -q -o "$wheel" -d .gpu/tmp/site; done
  rm -f .gpu/tmp/wheels/*.whl
}
split_into() { # PREFIX: what lies in .gpu/tmp/site, compressed, in parts that a transfer takes
  local part
  tar c -C .gpu/tmp/site . | xz -T0 -4 >.gpu/tmp/all.txz
  split -b "$PART_BYTES" -d -a 1 --numeric-suffixes=1 .gpu/tmp/all.txz ".gpu/tmp/$1."
  for part in .gpu/tmp/"$1".[0-9]; do
    mkdir -p ".gpu/$1${part##*.}" && mv "$part" ".gpu/$1${part##*.}/part"
  done
  rm -rf .gpu/tmp/all.txz .gpu/tmp/site && mkdir -p .gpu/tmp/site
}
sizes() {
  local tree bytes part
  tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -1 | cut -f1)
  for part in .gpu/*/; do
    bytes=$(($(du -sb "$part" | cut -f1) + tree))
    printf '%-10s with the checkout %5d MiB: %s\n' "$part" $((bytes >> 20)) \
      "$([ "$bytes" -le 67108864 ] && echo ok || echo 'too large: lower PART_BYTES')"
  done
}
case $step in
pack | sizes) "$step"; exit ;;
all | torch | find | rtx | stash | tests | walk) ;;
*) echo "$usage" >&2; exit 2 ;;
esac

mkdir -p "${2:?$usage}/records" "$2/parts" "$2/bin"
folder=$(cd "$2" && pwd)
part=${3:-}
began=$(date +%s)
log=$folder/log.txt
summary=$folder/summary.txt
touch "$log" "$summary"
device=cuda
[ -z "${REHEARSE:-}" ] || device=cpu
month=$(date +%Y%m)
case $step in find | tests) budget=215 ;; rtx) budget=395 ;; stash) budget=100 ;; all) budget=7200 ;; *) budget=570 ;; esac
budget=${BUDGET:-$budget} # below the call's own limit, so that the records are packed in time

say() { printf '[%4d s] %s\n' $(($(date +%s) - began)) "$*" | tee -a "$summary"; }
pick() { if [ -n "${REHEARSE:-}" ]; then echo "$1"; else echo "$2"; fi; } # REHEARSAL REAL
hand_out() {
  [ -n "${OUT:-}" ] || return 0
  tar czf "$OUT/records.tgz" -C "$folder" records
  tail -c 12000000 "$log" >"$OUT/log.txt"
  cp "$summary" "$OUT/summary.txt"
}
trap hand_out EXIT

phase() { # NAME SECONDS COMMAND…   its output becomes records/NAME.out
  local name=$1 limit=$2 left status start what
  shift 2
  left=$((budget - ($(date +%s) - began)))
  if [ "$left" -lt 15 ]; then say "SKIPPED $name: $left s left"; return; fi
  [ "$limit" -le "$left" ] || limit=$left
  start=$(date +%s)
  echo "=== $name ($limit s): $*" >>"$log"
  timeout -k 5 "$limit" "$@" >"$folder/records/$name.out" 2> >(tee -a "$log" >"$folder/records/$name.err")
  status=$?
  case $status in
  0) what=ok ;;
  124 | 137) what="TOOK MORE THAN $limit s" ;;
  *) what="FAILED ($status): $(tail -n 1 "$folder/records/$name.err" | cut -c1-300)" ;;
  esac
  say "$name: $what, $(($(date +%s) - start)) s"
  hand_out
}

# The offline machine: wheels and parts are unpacked beside the checkout.
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -n "$part" ] && [ -d "$part/wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$folder/site" "$part"/wheels/*.whl >>"$log" 2>&1 || say "pip could not install the wheels"
  cp "$part/commit" "$folder/commit"
fi
[ -z "$part" ] || [ ! -f "$part/part" ] || cp "$part/part" "$folder/parts/$(basename "$part")"
if [ -e "$folder/commit" ] && ! git rev-parse HEAD >/dev/null 2>&1; then # records ask git for the commit
  printf '#!/bin/sh\ncat %s/commit\n' "$folder" >"$folder/bin/git" && chmod +x "$folder/bin/git"
fi
join() { # PREFIX: unpack the parts r… or d… once they are all there
  ls "$folder/parts/$1"[0-9] >/dev/null 2>&1 || return 0
  [ ! -e "$folder/$1.joined" ] || return 0
  mkdir -p "$folder/site"
  if cat "$folder/parts/$1"[0-9] | "$python" -c '
import lzma, sys, tarfile
with lzma.open(sys.stdin.buffer) as text, tarfile.open(fileobj=text, mode="r|") as tar:
    tar.extractall(sys.argv[1], filter="tar")' "$folder/site" 2>>"$log"; then
    touch "$folder/$1.joined"
  else
    say "the parts $1 do not unpack: is one missing?"
  fi
}
export PATH="$folder/bin:$PATH" PYTHONPATH="$folder/site:$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XDG_CACHE_HOME="$folder/cache" TORCHINDUCTOR_CACHE_DIR="$folder/inductor" TRITON_CACHE_DIR="$folder/triton"
export RALF_LOG_LEVEL=warning

make_clips() { # in the background: rendering wants cores, not the GPU
  [ ! -e "$folder/clips.begun" ] || return 0
  touch "$folder/clips.begun"
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    "$1" -m tests.walk_clips "$2/clips" $3 && touch "$2/clips.done"
    [ -n "${REHEARSE:-}" ] || { "$1" -m tests.decode_clips "$2/decode" && touch "$2/decode.done"; }' \
    clips "$python" "$folder" "$(pick 64 "")" >"$folder/clips.log" 2>&1 </dev/null &
}
await() { # FILE SECONDS
  local _
  for _ in $(seq "$2"); do [ ! -e "$1" ] || return 0; sleep 1; done
  say "$(basename "$1") did not come in $2 s: $(tail -n 1 "$folder/clips.log" 2>/dev/null)"
}
bench() { echo "$python" -m ralf bench; }
marked() { # NAME SECONDS MARKS FILE…   the tests that need a device
  phase "$1" "$2" env ${REHEARSE:+PYTEST_ADDOPTS=} REQUIRE_GPU="$(pick 0 1)" "$python" -m pytest -q -p no:cacheprovider \
    --timeout=150 -m "$3" "${@:4}"
}

run_torch() { # torch and triton alone; what decides the engine's design comes first
  { nvidia-smi; nvidia-smi -q -d CLOCK,POWER; "$python" -m pip list; } >"$folder/records/machine.txt" 2>&1
  phase smoke 75 "$python" bench/gpu/smoke.py --device $device
  # shellcheck disable=SC2046
  phase engine_full 260 $(bench) engine --fresh "$(pick ralf-small ralf)" --device $device --out "$folder/records" \
    $(pick "--size 64 --repeats 1 --batch 1" "")
  # shellcheck disable=SC2046
  phase dct 50 $(bench) dct --tilings --device $device --out "$folder/records" $(pick "--size 64 --repeats 1" "")
  local level
  for level in "32 256" "64 128"; do
    # shellcheck disable=SC2046
    phase "residual_${level% *}_gpu_$month" 90 $(bench) residual --device $device \
      $(pick "--channels 16 --size 32 --blocks 1 --repeats 1" "--channels ${level% *} --size ${level#* }")
  done
  phase levers 30 "$python" bench/gpu/levers.py --device $device
  make_clips
}
run_find() {
  make_clips
  await "$folder/clips.done" 100
  phase "find_gpu_$month" 80 $(bench) find "$folder/clips/long.mp4" --device $device \
    --frames "$(pick 2 32)" --repeats "$(pick 1 3)"
}
run_rtx() {
  join r
  # shellcheck disable=SC2046
  phase "plans_$month" 330 "$python" bench/gpu/plans.py "$folder/models" --device $device $(pick --tiny "")
}
run_stash() { say "kept ${part:-nothing}"; }
run_tests() {
  local files=(tests/test_dct_triton.py tests/test_residual_triton.py tests/test_resample.py)
  [ -n "${REHEARSE:-}" ] || files+=(tests/test_engine_cuda.py tests/test_engine.py tests/test_mtcnn_cuda.py
    tests/test_engine_trt.py tests/test_bench_engine.py tests/test_bench_pipeline.py)
  marked tests_gpu 200 "$(pick "not gpu" gpu)" "${files[@]}"
}
run_walk() {
  join d
  make_clips
  await "$folder/clips.done" 60
  [ -z "${REHEARSE:-}" ] || export RALF_MODELS_DIR="$folder/clips/models" RALF_MODEL=untrained
  phase "pipeline_gpu_$month" 130 $(bench) pipeline "$folder/clips/long.mp4" --device $device \
    --frames "$(pick 2 32)" --at-once "$(pick 2 16)" --repeats "$(pick 1 3)"
  [ -n "${REHEARSE:-}" ] || await "$folder/decode.done" 60
  marked parity 90 "$(pick dali "gpu or dali")" tests/test_parity.py tests/test_decode_dali.py tests/test_routing.py
  [ -n "${REHEARSE:-}" ] || phase "decode_gpu_$month" 130 $(bench) decode --device cuda "$folder"/decode/*
  phase "soak_gpu_$month" 140 $(bench) pipeline "$folder"/clips/small/* --device $device \
    --frames "$(pick 2 16)" --at-once 4 --repeats 1 --soak "$(pick 40 2000)" --soak-seconds "$(pick 20 90)"
}

if [ "$step" = all ]; then
  for each in torch find rtx tests walk; do "run_$each"; done
else
  "run_$step"
fi
for made in "$folder"/records/*_"$month".out; do
  [ ! -s "$made" ] || cp "$made" "${made%.out}.json"
done
if grep -q "FAILED\|TOOK MORE\|SKIPPED" "$summary"; then exit 1; fi
