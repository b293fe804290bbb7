#!/usr/bin/env bash
# configure_kernel_tests.sh FOLDER [CMAKE ARGUMENTS]: the torch-free tests, ready to build in FOLDER.
# Environment: BUILD, the folder for builds.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift

googletest=$(scripts/googletest_prefix.sh "$BUILD/googletest")
mkdir -p "$folder"
if ! cmake -S tests/kernels -B "$folder" -G Ninja \
  -DCMAKE_PREFIX_PATH="$googletest" \
  -DCMAKE_CXX_COMPILER_LAUNCHER="$(command -v ccache || true)" \
  "$@" >"$folder/configure.log" 2>&1; then
  cat "$folder/configure.log" >&2
  exit 1
fi
