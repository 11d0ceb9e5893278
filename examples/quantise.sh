#!/usr/bin/env bash
# A bf16 checkpoint in 2 bits: what it costs in memory, in perplexity, and that it still answers.
#
#   bash examples/quantise.sh [FOLDER]
#
# The checkpoint is one of random weights; put a folder of ERNIE-4.5 MoE in its place.
set -euo pipefail
folder=${1:-$(mktemp -d)}

fastdeploy-lite random-model --output "$folder/bf16" --layers 3 --hidden-size 256 --experts 8
fastdeploy-lite quantize --model "$folder/bf16" --output "$folder/2bits" --scheme 2bits
fastdeploy-lite inspect "$folder/2bits"
du -sh "$folder/bf16" "$folder/2bits"

printf '%s\n' "床前明月光，疑是地上霜。" "举头望明月，低头思故乡。" > "$folder/text.txt"
fastdeploy-lite eval kl --model "$folder/2bits" --against "$folder/bf16" --text "$folder/text.txt"
fastdeploy-lite generate "床前明月光" --model "$folder/2bits" --max-tokens 8
