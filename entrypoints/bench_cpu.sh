#!/usr/bin/env bash
# Prints the CPU's tables of docs/performance.md again, on a machine that does nothing else:
#
#     bash entrypoints/bench_cpu.sh FOLDER [LLAMA_BENCH]
#
# FOLDER takes the models and a log a table. LLAMA_BENCH is llama.cpp's program; without it the
# comparison is left out (how to build it: entrypoints/bench_peers.py --help). LAYERS=8 makes the
# models of the last two tables smaller than 28 layers (about 8 GB of memory each).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:?usage: bash entrypoints/bench_cpu.sh FOLDER [LLAMA_BENCH]}
llama_bench=${2:-}
layers=${LAYERS:-28}
mkdir -p "$folder"

run() {  # NAME COMMAND...: prints the command and its table, kept in FOLDER/NAME.log
  local name=$1
  shift
  echo "== $*"
  "$@" 2>&1 | tee "$folder/$name.log"
}

uptime
isas=$(python -c 'from fastdeploy_lite import _ops_cpu as o; print(",".join(o.available_isas()[:0:-1]))')
run linears python entrypoints/bench_ops.py --isas "${isas:-plain}" --threads 1,2 \
  --kinds ccq,int4,int8,bf16 --tokens 1,256 --rounds 5
run small-pages env FD_LITE_HUGE_PAGES=0 python entrypoints/bench_ops.py --isas "${isas%%,*}" \
  --threads 1,2 --kinds ccq,int4,int8,bf16 --tokens 1 --rounds 5
run load python entrypoints/bench_load.py --model "$folder/random-21b-$layers" --layers "$layers"
if [ -n "$llama_bench" ]; then
  for type in Q2_K IQ2_XXS; do
    run "peer-$type" python entrypoints/bench_peers.py --llama-bench "$llama_bench" --layers "$layers" \
      --type "$type" --gguf "$folder/$type-$layers.gguf"
    rm -f "$folder/$type-$layers.gguf"
  done
fi
uptime
