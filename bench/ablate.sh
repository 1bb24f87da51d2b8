#!/usr/bin/env bash
# What each ingredient of the training data is worth: train the plain classifier with all of them,
# then with one left out at a time, and judge all of these on the same faces.
#   bench/ablate.sh DATA[,DATA…] OUT [FACES] [SIZE]
# Each training sees FACES crops (6000) of SIZE pixels (128); JOBS trainings (2) run at once, with one
# thread each.  A stopped run continues with the same command.  The record is OUT/detectors.json.
# Where the data has forgeries on disk, two arms more say what these and the blended ones are worth.
#   ARMS       more arms, a line each, as "name NAME=VALUE …"
#   RECIPE     what is trained (small_classifier);  HELD_OUT   the generator that none may see
#   BACKBONE   first weights: a safetensors file with timm's names, or `imagenet` from timm's hub
#   LIMIT      judge only this many people;  SEED   seed of the trainings (0)
#   STEPS      steps of each training instead of FACES/16, to rehearse the script: STEPS=2 ONLY="all swap_alone"
#   ONLY       these arms alone, by name
set -euo pipefail
data=$(tr , '\n' <<<"$1" | xargs -d '\n' realpath) out=$(realpath -m "$2") faces=${3:-6000} size=${4:-128}
mapfile -t paths <<<"$data"
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 data out size steps=${STEPS:-$((faces / 16))}
ralf() { "${PYTHON:-.venv/bin/python}" -m ralf "$@"; }
learn() { # RUN [NAME=VALUE …]
  local run=$1 changes=() paths
  shift
  mapfile -t paths <<<"$data" # a function of another shell: arrays are not exported
  [ -z "${HELD_OUT:-}" ] || changes+=(--set "data.held_out=$HELD_OUT")
  for change in "$@"; do changes+=(--set "$change"); done
  ralf train "${RECIPE:-small_classifier}" --data "${paths[@]}" --out "$out/$run" --device cpu \
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
if ralf data index "${paths[@]}" --only label=1 --only split=train --out "$out/forged.csv" 2>/dev/null >&2; then
  arms+=("blended_alone data.blended_share=1" "disk_alone data.families= data.shares=")
fi
[ -z "${ARMS:-}" ] || mapfile -t -O "${#arms[@]}" arms <<<"$ARMS"
if [ -n "${ONLY:-}" ]; then
  mapfile -t arms < <(printf '%s\n' "${arms[@]}" | grep -E "^(${ONLY// /|})( |$)")
fi
[ "${#arms[@]}" -gt 0 ] || { echo "ONLY='$ONLY' names no arm" >&2 && exit 2; }
# shellcheck disable=SC2016 # the inner shell must expand them
printf '%s\n' "${arms[@]}" | xargs -P "${JOBS:-2}" -I{} bash -c 'set -e; read -ra words <<<"{}"; learn "${words[@]}"'
runs=()
for arm in "${arms[@]}"; do runs+=("$out/${arm%% *}"); done
OMP_NUM_THREADS=${JOBS:-2} ralf evaluate "${runs[@]}" --data "${paths[@]}" --table detectors --split test \
  --out "$out" ${LIMIT:+--limit "$LIMIT"} | tee "$out/ablation.txt"
