#!/usr/bin/env bash
# From a folder of faces to the model that ships: `make model DATA=…`.
#
#   classifier ─▶ two branches ─▶ their mean ─▶ detector ─▶ draft ─▶ made clips ─▶ calibrated
#              ─▶ card ─▶ models/ralf-small
#
# Every step goes on where it was broken off: type the same command again.  MINUTES bounds each of
# the trainings in one command; the next command goes on from there.
#
#   two CPU cores (what ships):  DATA=faces train/model.sh              about three hours
#   one GPU (the larger one):    DATA=faces RECIPE=ralf_small CLASSIFIER_STEPS=4000 STEPS=6000 \
#                                MINUTES=5 train/model.sh               not measured
set -euo pipefail
cd "$(dirname "$0")/.."

: "${DATA:?a folder with faces.csv, or an index: see README, \"Training\"}"
RUNS=${RUNS:-runs}
MODELS=${MODELS:-models}
NAME=${NAME:-ralf-small}
RECIPE=${RECIPE:-ralf_small_cpu}
GOLDEN=${GOLDEN:-civilservice}
MINUTES=${MINUTES:-}
BACKBONE=${BACKBONE:-imagenet}         # a safetensors file in timm's names where the hub is not reached
CLASSIFIER_STEPS=${CLASSIFIER_STEPS:-3000}
BRANCH_STEPS=${BRANCH_STEPS:-1150}     # of each of the two that go on from the classifier
STEPS=${STEPS:-}
FRAMES=8                               # of each made clip
BIN=${BIN:-.venv/bin}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

processes=$("$BIN/python" -c 'import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count()))')
ended() { # what a training says on stdout: what follows it wants it finished
  local said
  said=$(cat)
  echo "$said"
  [[ $said != *out_of_time* ]] || { echo "model.sh: out of time; the same command goes on" >&2; exit 3; }
}
train() { # RECIPE RUN options: one process a device, or a core
  "$BIN/torchrun" --standalone --nproc-per-node="$processes" -m ralf train "$1" --data "$DATA" \
    --out "$2" ${MINUTES:+--minutes "$MINUTES"} "${@:3}" | ended
}
branch() { # SEED: goes on from the classifier, a process on its own
  local processes=1
  train small_classifier "$RUNS/branch$1" --set "init.network=$RUNS/classifier" \
    --set "seed=$1" --set data.batch=16 --set "schedule.steps=$BRANCH_STEPS" \
    --set data.augment.other=0.7 --set schedule.evaluate_every=16 --set schedule.select=last \
    --set optimiser.lr=3e-4 --set optimiser.ema=0.995
}

train small_classifier "$RUNS/classifier" --set "init.backbone=$BACKBONE" --set data.batch=16 \
  --set "schedule.steps=$CLASSIFIER_STEPS" --set schedule.evaluate_every=5 --set schedule.select=last \
  --set optimiser.ema=0.99
branch 31 &
branch 32 || { failed=$?; wait $! || true; exit "$failed"; } # neither is left running alone
wait $!
train "$RECIPE" "$RUNS/$NAME" --set "init.backbone=$RUNS/branch31,$RUNS/branch32" \
  ${STEPS:+--set "schedule.steps=$STEPS"}

clips() { # SPLIT options: stills set in motion, encoded, and cut by the worker's own finder
  "$BIN/ralf" data clips "$DATA" --split "$1" --out "$RUNS/clips/$1" --crf 23,40 "${@:2}"
  "$BIN/ralf" data prepare "$RUNS/clips/$1/index.csv" --out "$RUNS/crops/$1" --frames "$FRAMES"
}
seen=self_blend,inner,swap,mouth,eyes,reenact,resample,smooth,spectrum
clips val --families "$seen"
clips test --families "$seen,boundary,boundary,boundary"

last() { tail -n 1; } # the version's folder is the last line on stdout
draft=$("$BIN/ralf" publish "$RUNS/$NAME" --name "$NAME" --models "$RUNS/drafts" | last)
draft=$("$BIN/ralf" calibrate "$draft" --models "$RUNS/drafts" --data "$RUNS/crops/val/index.csv" \
  --split val --fitted-on "made clips of the val people, H.264 at crf 23 and 40" | last)
"$BIN/ralf" evaluate "$draft" --table card --split test --device cpu --out "$RUNS/card" \
  --data "$DATA" "$RUNS/crops/test/index.csv"
"$BIN/ralf" publish "$RUNS/$NAME" --name "$NAME" --models "$MODELS" --promote --data "$DATA" \
  --golden-from "$GOLDEN" --calibration-of "$draft" --metrics "$RUNS/card/card.json"
