#!/usr/bin/env bash
# Print each base image that this repository names, with `same` when its tag still has the pinned
# digest, else `moved` and the new line to use. Needs docker with buildx. Changes no file.
set -euo pipefail
cd "$(dirname "$0")/.."
grep --recursive --only-matching --no-filename --extended-regexp \
  '[a-z0-9./-]+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}' Dockerfile deploy/compose.yaml deploy/k8s |
  sort --unique |
  while IFS=@ read -r tag pinned; do
    now=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$tag")
    if [ "$now" = "$pinned" ]; then echo "same  $tag"; else echo "moved $tag@$now"; fi
  done
