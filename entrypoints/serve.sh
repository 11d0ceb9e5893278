#!/usr/bin/env bash
# Set-up and the OpenAI-compatible server; without arguments it serves the embedded demo model.
#   bash entrypoints/serve.sh [--model DIR --port 8180 ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""  # no extra; without it, this script's arguments
if [[ " $* " != *" --model"* && " $* " != *" --config"* ]]; then set -- --model demo "$@"; fi
exec python -m fastdeploy_lite.entrypoints.openai.api_server "$@"
