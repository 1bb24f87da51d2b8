#!/usr/bin/env bash
# Compare five detectors and the mean of three, trained on the same number of the same faces: the
# plain classifier, RALF as published, RALF with the crop beside the residual (what ships), FDFL,
# RCL-inspired.
#   bench/compare_detectors.sh DATA[,DATA…] OUT [FACES] [SIZE]
# All have the same backbone (EfficientNet-Lite0) and see FACES crops (24000) of SIZE pixels (128).
# The plain classifier takes the place that Xception has on a GPU.  A stopped run continues with the
# same command.  The record is OUT/detectors.json.  With fewer than a thousand faces nothing is learnt,
# and calibration refuses.
#   HELD_OUT   the generator that none may see: a family, or a method of forgeries on disk
#   BACKBONE   first weights: a safetensors file with timm's names, or `imagenet` from timm's hub
#   LIMIT      judge only this many people;  SEED   seed of the trainings (0)
#   STEPS      steps of each training instead of FACES/16, to rehearse the script: what is then refused
#              because nothing was learnt (a calibration, the mean of three) is left out
set -euo pipefail
mapfile -t data < <(tr , '\n' <<<"$1" | xargs -d '\n' realpath)
out=$(realpath -m "$2") faces=${3:-24000} size=${4:-128}
cd "$(dirname "$0")/.."
ralf() { "${PYTHON:-.venv/bin/python}" -m ralf "$@"; }
export RALF_MODELS_DIR=$out/models
batch=16
steps=${STEPS:-$((faces / batch))}
mkdir -p "$out"
learn() { # MODEL RECIPE [--set …]
  ralf train "$2" --data "${data[@]}" --out "$out/runs/$1" --device cpu --workers 1 \
    --set "schedule.steps=$steps" --set schedule.evaluate_every=3 --set "data.batch=$batch" \
    --set "network.size=$size" --set "data.input.size=$size" --set optimiser.ema=0.99 \
    --set schedule.select=last ${HELD_OUT:+--set "data.held_out=$HELD_OUT"} \
    --set "seed=${SEED:-0}" --set "init.backbone=${BACKBONE:-imagenet}" "${@:3}"
  ralf publish "$out/runs/$1" --name "$1" --data "${data[@]}" --promote
  local made
  made=$(ralf calibrate "$1" --data "${data[@]}" --split val --device cpu) || rehearsed
  [ -z "$made" ] || ralf models promote "$1@$(basename "$made")"
}
rehearsed() { [ -n "${STEPS:-}" ]; } # whether a failure may be passed over
learn classifier small_classifier
learn ralf ralf_small_cpu --set network.sees=residual
learn ralf_both ralf_small_cpu
learn fdfl fdfl_small
learn rcl rcl_small
models=(classifier ralf ralf_both fdfl rcl)
if ralf ensemble ralf fdfl rcl --name trio --data "${data[@]}" --split val --promote; then
  models+=(trio)
else
  rehearsed
fi
ralf evaluate "${models[@]}" --data "${data[@]}" --table detectors --split test \
  --out "$out" ${LIMIT:+--limit "$LIMIT"} | tee "$out/detectors.txt"
