#!/usr/bin/env bash
# Everything that only a card can show, in stages that fit a rented hour; each writes a log.
#
#   bash entrypoints/check_card.sh FOLDER [STAGE...]      default: all stages, in this order
#
# build      the CUDA module for the card in hand
# tests      all of tests/gpu
# bits       the same bits in any company, FD_LITE_CHECK_REPEATS times (default 10) in each of four processes at once
# kernels    experts of 21B and 300B against the ceilings of the run, in both modes of sums
# model      whole steps with dummy weights in both modes: 21B, and 300B where it fits
# perplexity of the demo model, card and CPU
# speculation  tokens a second with and without drafts; in deterministic mode, briefly, answers compared
# hybrid     experts in main memory: 21B with 4 GiB of the card, 300B with 24 where the host has 100 GB
# ranks      two cards: sums, failures, demo answers, 21B and half of 300B on one card and on two, 300B on two
# quantize   a dense and a MoE layer of 21B, without and under a calibration text: wall time
# storm      many clients at once, answers compared with lone runs, without drafts and with them
# memcheck, racecheck, initcheck  NVIDIA's compute-sanitizer over the tests of the ops
#
# A stage that fails does not stop the others; the exit status says whether one did.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} FD_LOG_DIR=$out/log
demo=fastdeploy_lite/assets/demo
command -v nvidia-smi >/dev/null && nvidia-smi -L || { echo "check_card.sh: no NVIDIA card here" >&2; exit 2; }
ops="tests/gpu/test_cuda_moe.py tests/gpu/test_cuda_moe_modes.py tests/gpu/test_cuda_digits.py
  tests/gpu/test_cuda_linear.py tests/gpu/test_cuda_attention.py
  tests/gpu/test_cuda_rows.py tests/gpu/test_cuda_sampling.py tests/gpu/test_cuda_weights.py"

fits() {  # GB of memory on the first card
  [ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)" -gt "$(($1 * 954))" ]
}

host_fits() {  # GB of main memory that is available
  [ "$(awk '/^MemAvailable/ {print $2}' /proc/meminfo)" -gt "$(($1 * 976563))" ]
}

bench_ranks() {  # shape, layers: one card against two
  for size in 1 2; do
    python entrypoints/bench_card.py --shape "$1" --layers "$2" --batches 1,8,64 -tp $size \
      --output "$out/ranks_$1_tp$size.json" || return 1
  done
}

bench_modes() {  # shape: by default, and with the same bits in any company
  python entrypoints/bench_card.py --shape "$1" --output "$out/model_$1.json" &&
    python entrypoints/bench_card.py --shape "$1" --deterministic --output "$out/model_$1_deterministic.json"
}

timed_quantize() {  # model, output, more options
  local model=$1 output=$2 started=$SECONDS
  shift 2
  cli quantize --model "$model" --output "$output" --scheme 2bits --device nvidia "$@" &&
    echo "quantize ${*:-without a text}: $((SECONDS - started)) s" && du -sh "$output"
}

sanitize() {  # with which tool
  # shellcheck disable=SC2086 - a list of files
  compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    python -m pytest -q -x -p no:cacheprovider --timeout 0 $ops ${FD_LITE_CHECK_TESTS:+-k "$FD_LITE_CHECK_TESTS"}
}

cli() {
  python -m fastdeploy_lite.entrypoints.cli.main "$@"
}

on_card() {  # tests skip without a card, and a skip must not pass for a success
  python -c 'import sys; from fastdeploy_lite import device as d; c = d.decide(); sys.exit(None if c.is_cuda else c.reason)'
}

stage() {
  case $1 in build) ;; *) on_card || return 1 ;; esac
  case $1 in
    build) python setup.py -q build_ext --inplace ;;
    tests) python -m pytest -q -p no:cacheprovider tests/gpu ;;
    bits)
      local each processes=() bad=0
      for each in 1 2 3 4; do
        FD_LITE_CHECK_REPEATS=${FD_LITE_CHECK_REPEATS:-10} python -m pytest -q -p no:cacheprovider \
          tests/gpu/test_cuda_invariance.py tests/gpu/test_cuda_modes.py \
          -k 'TestOnTheCard or bits_in_any_company' >"$out/bits_$each.log" 2>&1 &
        processes+=($!)
      done
      for each in "${processes[@]}"; do wait "$each" || bad=1; done
      tail -n 8 "$out"/bits_?.log
      return $bad ;;
    quantize)
      local bf16 work
      work=$(mktemp -d) && bf16=$work/bf16 || return 1
      gunzip -c fastdeploy_lite/assets/calibration.jsonl.gz >"$work/text.jsonl" &&
        cli random-model --output "$bf16" --shape 21b --layers 2 &&
        timed_quantize "$bf16" "$work/free" &&
        timed_quantize "$bf16" "$work/calibrated" --calibration "${FD_LITE_CHECK_TEXT:-$work/text.jsonl}"
      local status=$?
      rm -rf "$work"
      return $status ;;
    kernels)
      cli bench kernels --shape 21b --json "$out/kernels_21b.json" &&
        cli bench kernels --shape 300b --json "$out/kernels_300b.json" ;;
    model)
      bench_modes 21b &&
        if fits 120; then bench_modes 300b
        else echo "300b: not run, it needs a card of 120 GB"; fi ;;
    hybrid)
      python -m pytest -q -s -p no:cacheprovider tests/gpu/test_cuda_offload.py \
        tests/gpu/test_cuda_invariance.py::TestBesideMainMemory &&
        python entrypoints/bench_offload.py --shape 21b --card-gib 4 --output "$out/hybrid_21b.json" &&
        if host_fits 100; then
          python entrypoints/bench_offload.py --shape 300b --card-gib 24 --output "$out/hybrid_300b.json"
        else echo "300b: not run, it needs 100 GB of main memory"; fi ;;
    perplexity)
      gunzip -c fastdeploy_lite/assets/calibration.jsonl.gz >"$out/text.jsonl" || return 1
      for device in "" "--device cpu"; do
        # shellcheck disable=SC2086 - two words or none
        cli eval perplexity --model $demo $device --text "${FD_LITE_CHECK_TEXT:-$out/text.jsonl}" \
          --limit 60000 || return 1
      done ;;
    speculation)
      python entrypoints/bench_speculation.py --profile --json "$out/speculation.json" &&
        FD_DETERMINISTIC_MODE=1 python entrypoints/bench_speculation.py --rounds 2 ;;
    ranks)
      if [ "$(nvidia-smi -L | wc -l)" -lt 2 ]; then
        echo "ranks: not run, it needs two cards"
        return 0
      fi
      local bad=0
      python entrypoints/bench_card.py --shape 300b --batches 1,8,64 -tp 2 \
        --output "$out/ranks_300b_whole.json" || bad=1
      python entrypoints/bench_ranks.py -tp 2 --output "$out/sums.json" || bad=1
      bench_ranks 300b 27 || bad=1
      bench_ranks 21b 28 || bad=1
      python -m pytest -q -s -p no:cacheprovider --durations=0 tests/gpu/test_cuda_ranks.py || bad=1
      return $bad ;;
    storm)
      python tests/e2e/storm.py --clients 64 --seconds "${FD_LITE_CHECK_SECONDS:-60}" &&
        python tests/e2e/storm.py --clients 64 --seconds "${FD_LITE_CHECK_SECONDS:-60}" \
          -- --speculative-config '{"method": "suffix"}' ;;
    racecheck) FD_LITE_RACECHECK=1 sanitize "$1" ;;
    memcheck | initcheck) sanitize "$1" ;;
    *) echo "no stage of this name: $1" >&2; return 2 ;;
  esac
}

failed=0
[ $# -gt 0 ] || set -- build tests bits kernels model hybrid ranks perplexity speculation quantize storm memcheck racecheck
for name in "$@"; do
  started=$SECONDS
  stage "$name" >"$out/$name.log" 2>&1
  status=$?
  [ $status = 0 ] || failed=1
  echo "== $name: status $status, $((SECONDS - started)) s, $out/$name.log"
  tail -n "${FD_LITE_CHECK_LINES:-25}" "$out/$name.log"
done
exit $failed
