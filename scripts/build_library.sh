#!/usr/bin/env bash
# The library and its Python module, in place. Environment: BUILD, the build folder; MAX_JOBS;
# TORCH_EXT_PREFIX, where else CMake shall look. The python on PATH is the one whose torch it is built
# for. Arguments go to CMake.
set -euo pipefail
cd "$(dirname "$0")/.."

# Without importing torch, which takes seconds.
torch=$(python -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
launcher=$(command -v ccache || true)
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD/csrc}

mkdir -p "$BUILD"
if ! cmake -S . -B "$BUILD" -G Ninja \
  -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$torch${TORCH_EXT_PREFIX:+;$TORCH_EXT_PREFIX}" \
  -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" -DCMAKE_CUDA_COMPILER_LAUNCHER="$launcher" \
  -DPython_EXECUTABLE="$(command -v python)" \
  -DTORCH_EXT_PYTHON=ON -DTORCH_EXT_INPLACE=ON \
  "$@" >"$BUILD/configure.log" 2>&1; then
  cat "$BUILD/configure.log" >&2
  exit 1
fi
grep -h '^-- torch_ext' "$BUILD/configure.log" || true
cmake --build "$BUILD" --parallel "${MAX_JOBS:-1}"
