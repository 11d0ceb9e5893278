#!/usr/bin/env bash
# Set-up and all tests: linters, types, unit, end-to-end and fuzz tests.
#   bash entrypoints/test.sh [pytest arguments]      e.g. bash entrypoints/test.sh tests/unit -k scheduler
# Without arguments and with two cores or more, two halves of them run side by side.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
# The page is tested in a real browser; where it cannot be installed those tests say so and skip.
if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "setup: installing Chromium for the tests of the page"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
      --no-install-recommends chromium chromium-driver; } >.venv/chromium.log 2>&1 ||
    echo "setup: Chromium could not be installed; the output is in .venv/chromium.log" >&2
fi
# Tests start hundreds of interpreters; without this each of them might compile the package anew.
unset PYTHONDONTWRITEBYTECODE
# A card is asked how much of its memory is free: what else uses it would change the answer.
if [ $# = 0 ] && [ "$(nproc)" -gt 1 ] && [ ! -e /dev/nvidiactl ]; then
  exec python tests/side_by_side.py
fi
exec python -m pytest "$@"
