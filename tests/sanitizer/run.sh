#!/usr/bin/env bash
# The native library under AddressSanitizer and UndefinedBehaviorSanitizer: builds it into a temporary folder and runs
# the tests of the kernels and of the segment tree with it. Linux and GCC; minutes.
#
#   tests/sanitizer/run.sh [PYTEST ARGUMENTS]      instead of the list below
#
# PYTHON names the interpreter (default: python), SANITIZE what to check (default: address,undefined).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}
compiler=${CXX:-c++}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# -s below: what ends the process must be seen.
tests=(
  tests/kernels/linear_logprob/test_cpu.py
  tests/kernels/tree_attention/test_op.py
  tests/kernels/fused_layers/test_op.py
  tests/kernels/branching/test_op.py
  tests/kernels/policy_loss/test_op.py
  tests/kernels/branching/test_future_value.py
  tests/rollout/native/test_attention.py
  tests/rollout/native/test_layers.py
  tests/rollout/native/test_sampler.py
  tests/rollout/native/test_segment_tree.py
  tests/rollout/native/test_tree_faults.py
)

cmake -S "$root" -B "$folder/build" -DAPPO_SANITIZE="${SANITIZE:-address,undefined}" \
  -DPython_EXECUTABLE="$(command -v "$python")" -DCMAKE_INSTALL_PREFIX="$folder/native" >"$folder/log"
cmake --build "$folder/build" --target install --parallel >>"$folder/log" || { cat "$folder/log" && exit 1; }

# The interpreter knows nothing of sanitizers: theirs must be the first libraries, and a C++ library must be there for
# them to find what throws. Leaks are those of Python.
for name in libasan.so libubsan.so libstdc++.so; do
  preload+="${preload:+:}$(realpath "$("$compiler" -print-file-name=$name)")"
done
cd "$root"
export APPO_NATIVE_DIR=$folder/native PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS:-}
LD_PRELOAD=$preload "$python" -c "
import sys
from appo._kernels.common import native
module, reason = native.load()
sys.exit(0 if module else f'the library was not loaded: {reason}')"
# A process whose address space is limited has no room for the shadow memory: without the tests of "no memory".
[ $# -gt 0 ] || set -- -k "not no_memory" "${tests[@]}"
LD_PRELOAD=$preload "$python" -m pytest -q -s -p no:cacheprovider "$@"
