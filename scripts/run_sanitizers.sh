#!/usr/bin/env bash
# The torch-free tests under the address and undefined-behaviour sanitizers. Environment: BUILD, the
# folder for builds; MAX_JOBS. Arguments go to ctest.
set -euo pipefail
cd "$(dirname "$0")/.."
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD/csrc}

scripts/configure_kernel_tests.sh "$BUILD/sanitized" -DTORCH_EXT_SANITIZE=ON
cmake --build "$BUILD/sanitized" --parallel "${MAX_JOBS:-1}"
# Where the processor has the instructions themselves, their emulation finds nothing more here.
options=()
grep -qw avx512_bf16 /proc/cpuinfo && options=(--exclude-regex emulated_avx512)
ctest --test-dir "$BUILD/sanitized" --output-on-failure --parallel "$(nproc)" "${options[@]}" "$@"
