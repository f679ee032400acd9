#!/usr/bin/env bash
# The first hour's first minutes, timed: clone, environment, installation, the first clip with empty
# caches, the second clip. Prints seconds by the clock and of the CPU; run it on a machine that does
# nothing else.
#
#   bash docs/scripts/first_clip.sh [REPOSITORY]
set -euo pipefail
repository=${1:-$(git -C "$(dirname "$0")" rev-parse --show-toplevel)}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export TDJAX_CACHE=$folder/cache TIMEFORMAT="%R s by the clock, %U + %S s of the CPU"
timed() { printf '%s: ' "$1"; shift; time "$@" >log.txt 2>&1 || { cat log.txt; exit 1; }; }
all() {
  timed "git clone" git clone -q "$repository" tdjax
  cd tdjax
  timed "python3 -m venv .venv" python3 -m venv .venv
  timed "pip install -e ." .venv/bin/pip install -q -e .
  timed "first clip" .venv/bin/tdjax generate
}
time all
printf 'all of it until here, above\n'
timed "second clip" .venv/bin/tdjax generate
