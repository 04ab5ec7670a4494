#!/usr/bin/env bash
# Installs what benchmarks compare with, each into an environment of its own under .venv-peers/ (kept between runs):
# inference servers for `python -m benchmarks.serving`, Olive for `python -m benchmarks.compression`.
# A peer that does not install is named, and the others go on.
#   benchmarks/peers.sh [NAME...]        default: all
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
RUNTIME=$("$PYTHON" -c 'import onnxruntime; print(f"onnxruntime=={onnxruntime.__version__}")')
declare -A PACKAGES=(
  [mlserver]="mlserver"
  [bentoml]="bentoml"
  [litserve]="litserve"
  [kserve]="kserve"
  [olive]="olive-ai torch==2.13.0 requests"
)

failed=()
for name in "${@:-${!PACKAGES[@]}}"; do
  if [ $# -eq 0 ]; then for each in mlserver bentoml litserve kserve olive; do "$0" "$each" || failed+=("$each"); done; break; fi
  folder=.venv-peers/$name
  [ -n "${PACKAGES[$name]:-}" ] || { echo "unknown peer $name"; failed+=("$name"); continue; }
  [ -e "$folder/.installed" ] && { echo "$name: already installed"; continue; }
  rm -rf "$folder" && "$PYTHON" -m venv "$folder" || { failed+=("$name"); continue; }
  if "$folder/bin/pip" install --quiet --disable-pip-version-check ${PACKAGES[$name]} "$RUNTIME" numpy \
      >"$folder/install.log" 2>&1; then
    "$folder/bin/pip" freeze --disable-pip-version-check >"$folder/.installed"
    echo "$name: installed"
  else
    echo "$name: does not install: $(grep -i error "$folder/install.log" | tail -1)"
    failed+=("$name")
  fi
done
[ ${#failed[@]} -eq 0 ]
