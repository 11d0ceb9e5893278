#!/usr/bin/env bash
# Set-up and all tests: linters, types, unit, end-to-end and fuzz tests.
#   bash entrypoints/test.sh [pytest arguments]      e.g. bash entrypoints/test.sh tests/unit -k scheduler
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
exec python -m pytest "$@"
