#!/usr/bin/env bash
# One training chain on a GPU machine that reaches no package registry, in time boxes, and its model
# brought back.
#
#     bench/gpu_train.sh pack DATA…               here: faces, first weights, libraries, as .gpu_train/{1,2,…}
#     bench/gpu_train.sh sizes                    the checkout and each part against 64 MiB
#   there, with the checkout and the named part beside it, one after the other:
#     bench/gpu_train.sh stash FOLDER .gpu_train/1
#     bench/gpu_train.sh train FOLDER             trains; the same again goes on where the box ended
#   here, with what `train` left in OUT there:
#     bench/gpu_train.sh bring OUT MODELS         the version among the models, proven and promoted
#
# FOLDER is the same in each call, and must outlive it.  BUDGET (570) bounds one call in seconds: at
# its end the training writes a checkpoint, as it does every two minutes.  OUT gets version.tgz when
# the chain is done, else the newest judged weights; retrain.json has the minutes of each step.
# CHAIN (shipped_gpu), NAME (small-classifier), MINUTES (the chain's) and MORE say what is trained:
# MORE takes options of `ralf retrain`.  WEIGHTS is the file with ImageNet's weights, for `pack`.
# PYTHON names the interpreter, DEVICE the device (cuda), GPU_PARTS the folder of the parts.  REHEARSE=1
# packs no libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: bench/gpu_train.sh pack DATA… | sizes | stash FOLDER PART | train FOLDER | bring OUT MODELS"
verb=${1:?$usage}
PYTHON=${PYTHON:-python3} CHAIN=${CHAIN:-shipped_gpu} NAME=${NAME:-small-classifier}
parts=${GPU_PARTS:-.gpu_train}
most=$((16 << 20)) # bytes of one file that comes back

pack() { # DATA…
  local number=0 folder all=$parts/tmp
  rm -rf "$parts" && mkdir -p "$all/data" "$all/wheels" "$all/models"
  for folder; do
    mkdir -p "$all/data/$number"
    # Only a table of faces and what lies beside it: a folder of data may hold others' data too.
    local name
    for name in faces.csv faces landmarks.npz groups.csv prepare.json; do
      [ ! -e "$folder/$name" ] || cp -rL "$folder/$name" "$all/data/$number/"
    done
    [ -e "$all/data/$number/faces.csv" ] || { echo "$folder has no faces.csv" >&2; return 1; }
    number=$((number + 1))
  done
  [ -z "${WEIGHTS:-}" ] || cp -L "$WEIGHTS" "$all/weights.safetensors"
  # The promoted version, which the gates compare with.
  [ ! -d "${MODELS:-models}/$NAME" ] || cp -r "${MODELS:-models}/$NAME" "$all/models/"
  [ -n "${REHEARSE:-}" ] || wheels "$all/wheels"
  tar c -C "$all" . | split -b "${PART_BYTES:-50000000}" -d -a 2 - "$parts/part."
  rm -rf "$all"
  number=1
  local piece
  for piece in "$parts"/part.*; do
    mkdir "$parts/$number" && mv "$piece" "$parts/$number/"
    number=$((number + 1))
  done
  sizes
}
wheels() { # FOLDER: the libraries that such a machine lacks, at the project's own versions
  local pinned=() platforms=() name glibc
  for name in pydantic pydantic_core annotated-types typing-inspection structlog av facenet-pytorch \
    psutil opencv-python-headless scikit-learn scipy; do
    pinned+=("$(sed -n "s/^\($name==.*\)$/\1/ip" constraints.txt | head -1)")
  done
  for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 -d "$1" $(printf '%s\n' "${pinned[@]}" | grep .)
}
sizes() {
  local tree bytes part
  tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -1 | cut -f1)
  for part in "$parts"/*/; do
    bytes=$(($(du -sb "$part" | cut -f1) + tree))
    printf '%-16s with the checkout %5d MiB: %s\n' "$part" $((bytes >> 20)) \
      "$([ "$bytes" -le 67108864 ] && echo ok || echo 'too large: lower PART_BYTES')"
  done
}
stash() { # FOLDER PART
  mkdir -p "$1/parts" && cp "$2"/part.* "$1/parts/" && ls -l "$1/parts"
}
train() { # FOLDER
  local folder out=${OUT:-$1/out} words status=0
  folder=$(cd "$1" && pwd) && mkdir -p "$out"
  if [ ! -e "$folder/unpacked" ]; then
    cat "$folder"/parts/part.* | tar x -C "$folder"
    mkdir -p "$folder/site"
    local wheel
    for wheel in "$folder"/wheels/*.whl; do
      [ ! -e "$wheel" ] || "$PYTHON" -m zipfile -e "$wheel" "$folder/site"
    done
    touch "$folder/unpacked"
  fi
  words=(--data "$folder"/data/* --name "$NAME" --targets cpu --out "$folder/run"
    --models "$folder/models" --device "${DEVICE:-cuda}")
  [ ! -e "$folder/weights.safetensors" ] || words+=(--set "${FIRST:-head}:init.backbone=$folder/weights.safetensors")
  [ -z "${MINUTES:-}" ] || words+=(--minutes "$MINUTES")
  # Behind the machine's own libraries: its torch is the one that knows its GPU.
  # INT first, for a whole checkpoint; 20 s later KILL, for a step that has none and starts anew.
  # shellcheck disable=SC2086
  PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD:$folder/site" timeout -s INT -k 20 $((${BUDGET:-570} - SECONDS)) \
    "$PYTHON" -m ralf retrain "$CHAIN" "${words[@]}" ${MORE:-} >"$folder/said.json" 2>>"$folder/log.txt" || status=$?
  hand_out "$folder" "$out"
  echo "ended with $status: $(tail -n 1 "$folder/log.txt")" | tee "$out/summary.txt"
  [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || status=130 # the box ended: the same again goes on
  return "$status"
}
hand_out() { # FOLDER OUT: what comes back, each file of 16 MiB at the most
  local file version
  rm -f "$2"/version.tgz "$2"/weights.safetensors
  tail -c 4000000 "$1/log.txt" >"$2/log.txt"
  for file in retrain.json card.json; do [ ! -e "$1/run/$file" ] || cp "$1/run/$file" "$2/"; done
  version=$("$PYTHON" - "$1/run/retrain.json" <<'PYTHON'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
done = json.loads(path.read_text())["done"] if path.exists() else {}
print(done["publish"]["facts"]["path"] if "publish" in done else "")
PYTHON
  )
  if [ -n "$version" ]; then
    tar cz -C "$(dirname "$version")" -f "$2/version.tgz" "$(basename "$version")"
    file=$2/version.tgz
  else # a chain that the box cut: what the newest training has by now, to begin another one from
    file=$(find "$1/run" -name best.safetensors -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -1 | cut -d' ' -f2- || true)
    [ -z "$file" ] || cp "$file" "$2/weights.safetensors"
    file=$2/weights.safetensors
  fi
  if [ -e "$file" ] && [ "$(stat -c %s "$file")" -gt $most ]; then
    echo "$file is larger than 16 MiB and may not come back" >>"$2/log.txt"
  fi
}
bring() { # OUT MODELS
  local version
  [ -e "$1/version.tgz" ] || { echo "$1 has no version.tgz: the chain was not done; see $1/log.txt" >&2; return 1; }
  version=$(tar tzf "$1/version.tgz" | sed -n '1s#/.*##p') # not head: it ends before tar does
  mkdir -p "$2/$NAME" && tar xzf "$1/version.tgz" -C "$2/$NAME"
  "$PYTHON" -m ralf models promote "$NAME@$version" --models "$2" ${FORCE:+--force}
}
shift
"$verb" "$@"
