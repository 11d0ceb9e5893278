# Sourced by demo.sh, test.sh and serve.sh: one idempotent set-up of the project into .venv.
#
#   source entrypoints/setup_env.sh EXTRA      e.g. `source entrypoints/setup_env.sh test`; "" for none:
#                                              a file that is sourced without arguments sees its caller's
#
# Needs Python 3.10-3.12 (with venv) and g++; PYTHON=/path/to/python picks an interpreter.
# Runs again only when the build inputs, the interpreter or the extras changed.

project_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project_root"

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3.10 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip
raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.10, 3.11 or 3.12 with venv found; install one or set PYTHON=/path/to/python" >&2
  return 1
}

build_inputs_digest() {
  {
    echo "$1 $2 ${FD_BUILDING_ARCS:-}"
    "$1" --version
    find setup.py pyproject.toml custom_ops -type f \
      \( -name '*.py' -o -name '*.toml' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' \) \
      -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum | cut -d' ' -f1
}

setup_project() {
  local extras=$1 python digest stamp=.venv/.setup_stamp
  if [ -x .venv/bin/python ]; then python=$project_root/.venv/bin/python; else python=$(find_python); fi
  if ! command -v "${CXX:-g++}" >/dev/null; then
    echo "setup: no C++ compiler found (${CXX:-g++}); install g++ (Debian/Ubuntu: apt-get install g++)" >&2
    return 1
  fi
  if [ ! -x .venv/bin/python ]; then
    echo "setup: creating .venv with $python"
    "$python" -m venv .venv
    python=$project_root/.venv/bin/python
  fi
  digest=$(build_inputs_digest "$python" "$extras")
  if [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ]; then return; fi
  echo "setup: installing the project and its dependencies into .venv (some minutes the first time)"
  local log=.venv/setup.log
  if ! .venv/bin/python -m pip install --disable-pip-version-check --editable ".${extras:+[$extras]}" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "setup: the installation failed; the whole output is in $log" >&2
    return 1
  fi
  echo "$digest" > "$stamp"
}

setup_project "${1-}"
export PATH="$project_root/.venv/bin:$PATH"
