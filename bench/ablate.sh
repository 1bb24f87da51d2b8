#!/usr/bin/env bash
# What each ingredient of the training data is worth: train the plain classifier with all of them,
# then with one left out at a time, and judge all of these on the same faces.
#   bench/ablate.sh DATA OUT [FACES] [SIZE]
# Each training sees FACES crops (6000) of SIZE pixels (128); JOBS trainings (2) run at once, with one
# thread each.  A stopped run continues with the same command.  The record is OUT/detectors.json.
#   BACKBONE   first weights: a safetensors file with timm's names, or `imagenet` from timm's hub
#   LIMIT      judge only this many people;  SEED   seed of the trainings (0)
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2") faces=${3:-6000} size=${4:-128}
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 data out size steps=$((faces / 16))
ralf() { "${PYTHON:-.venv/bin/python}" -m ralf "$@"; }
learn() { # RUN [NAME=VALUE …]
  local run=$1 changes=()
  shift
  for change in "$@"; do changes+=(--set "$change"); done
  ralf train small_classifier --data "$data" --out "$out/$run" --device cpu \
    --set "schedule.steps=$steps" --set schedule.evaluate_every=1000 --set schedule.select=last \
    --set data.batch=16 --set "network.size=$size" --set "data.input.size=$size" \
    --set optimiser.ema=0.99 --set "seed=${SEED:-0}" \
    --set "init.backbone=${BACKBONE:-imagenet}" "${changes[@]}"
}
export -f ralf learn
arms=(
  "all"
  "no_h264 data.augment.h264=0"
  "no_upload_damage data.augment.h264=0 data.augment.jpeg=0 data.augment.resize=0 data.augment.blur=0 data.augment.noise=0"
  "no_others data.augment.other=0"
  "self_blend_alone data.families=self_blend data.shares="
  "swap_alone data.families=swap data.shares="
  "even_shares data.shares="
  "unpaired data.pairing=balanced"
  "one_margin data.augment.margins="
  "batch_norms optimiser.norms=batch"
  "no_average optimiser.ema="
)
mkdir -p "$out"
# shellcheck disable=SC2016 # the inner shell must expand them
printf '%s\n' "${arms[@]}" | xargs -P "${JOBS:-2}" -I{} bash -c 'set -e; read -ra words <<<"{}"; learn "${words[@]}"'
runs=()
for arm in "${arms[@]}"; do runs+=("$out/${arm%% *}"); done
OMP_NUM_THREADS=${JOBS:-2} ralf evaluate "${runs[@]}" --data "$data" --table detectors --split test \
  --out "$out" ${LIMIT:+--limit "$LIMIT"} | tee "$out/ablation.txt"
