#!/usr/bin/env bash
# Resolves every extra, and every pair that the documents name, as pip would; installs nothing.
#
# Exit codes: 0 all resolve; 1 one does not; 3 one could not be asked for, since a server that it needs
# was not reached (then nothing is known about it, and the last line says so).
set -uo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
status=0 unknown=()
rm -f .not-resolved # its content is the last line, for whoever runs this

ask() { # EXTRAS with commas, and the constraints that apply to them
  local extras=() said name
  for name in ${1//,/ }; do extras+=(--extra "$name"); done
  shift
  if said=$(timeout 240 "$uv" pip compile --quiet --python-version 3.11 pyproject.toml "${extras[@]}" "$@" 2>&1 >/dev/null); then
    echo "resolve: [${extras[*]//--extra/}] ok"
  elif grep -qE 'No solution found|conflict|unsatisfiable' <<<"$said"; then
    echo "resolve: [${extras[*]//--extra/}] DOES NOT RESOLVE" >&2
    head -20 <<<"$said" >&2
    status=1
  else # no answer, or an answer that is none: a package that could not be fetched or built
    echo "resolve: [${extras[*]//--extra/}] not known: $(grep -m1 -E 'error|cause|timed' <<<"$said" || echo "no answer in 240 s")" >&2
    unknown+=("${extras[*]//--extra/}")
  fi
}

pinned=(--constraints constraints.txt)
for extras in service cpu rtx build train stores embedded completion dev deploy \
  cpu,stores cpu,embedded service,stores cpu,build build,stores train,build dev,deploy; do
  ask "$extras" "${pinned[@]}"
done
for extras in gpu-rtx gpu-rtx,build gpu-rtx,stores; do ask "$extras"; done
for extras in gpu gpu,build; do ask "$extras" "${pinned[@]}"; done
[ "$status" -eq 0 ] || exit 1
if [ ${#unknown[@]} -gt 0 ]; then
  echo "resolve: NOT CHECKED, a server was not reached:$(printf ' [%s ]' "${unknown[@]}")" | tee .not-resolved >&2
  exit 3
fi
