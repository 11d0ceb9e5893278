#!/usr/bin/env bash
# Builds the CPU module with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the
# sources under build/, and runs the tests of the native ops there: any report is a failure.
#
#   bash entrypoints/sanitize.sh [pytest arguments]      default: tests/unit/ops
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test

copy=build/sanitized
mkdir -p "$copy"
git ls-files -z -- custom_ops fastdeploy_lite tests setup.py pyproject.toml README.md |
  xargs -0 cp --parents --update --target-directory="$copy"
cd "$copy"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
CXXFLAGS="$flags" FD_BUILD_OPTIMIZATION=-O1 FD_BUILDING_ARCS=none python setup.py -q build_ext --inplace

# Python itself is not instrumented: the run-time libraries come first, and what the interpreter
# keeps until its end is no leak of the module's.
compiler=${CXX:-g++}
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
export LD_PRELOAD PYTHONPATH=$PWD
# Paddle frees with delete what it made with new[] when it ends: only that pairing is not checked.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:alloc_dealloc_mismatch=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
python -c 'import fastdeploy_lite._ops_cpu as m; assert "sanitized" in m.__file__, m.__file__'
python -m pytest -q -p no:cacheprovider "${@:-tests/unit/ops}"
