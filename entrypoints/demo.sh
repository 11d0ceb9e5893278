#!/usr/bin/env bash
# Set-up and the main job: answers prompts with the embedded 2-bit ERNIE-4.5-MoE checkpoint.
#   bash entrypoints/demo.sh [arguments of entrypoints/offline_inference.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""  # no extra; without it, this script's arguments
exec python entrypoints/offline_inference.py "$@"
