#!/usr/bin/env bash
# The CUDA kernels for every architecture, and what the compiler made of them; no GPU is asked for.
# Environment: BUILD, the folder for builds; MAX_JOBS. The python on PATH is the one whose torch it is
# built for. Where torch has no CUDA or there is no nvcc, that is said, and nothing else happens.
set -euo pipefail
cd "$(dirname "$0")/.."
launcher=$(command -v ccache || true)
torch=$(python -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
folder=${BUILD:-build}/cuda_kernels
mkdir -p "$folder"

if ! cmake -S . -B "$folder" -DTORCH_EXT_CUDA=ON -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$torch" -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" -DCMAKE_CUDA_COMPILER_LAUNCHER="$launcher" \
  -DCMAKE_CUDA_FLAGS="-Xptxas -v" >"$folder/configure.log" 2>&1; then
  # CMake breaks its messages into lines.
  said=$(tr -s '\n ' ' ' <"$folder/configure.log")
  missing='TORCH_EXT_CUDA=ON, but '
  missing+='(no nvcc was found|LibTorch in [^ ]* is built without CUDA|nvcc [^ ]* cannot compile for a LibTorch of CUDA [0-9]+)'
  if [[ $said =~ $missing ]]; then
    echo "torch_ext: the CUDA kernels are not checked: ${BASH_REMATCH[1]}"
    exit 0
  fi
  cat "$folder/configure.log" >&2
  exit 1
fi
grep -h '^-- torch_ext' "$folder/configure.log"

# From scratch where there is no ccache: a report comes only from what is compiled.
cmake --build "$folder" --target clean
if ! cmake --build "$folder" --target torch_ext_cuda_kernels --parallel "${MAX_JOBS:-1}" \
  >"$folder/build.log" 2>&1; then
  cat "$folder/build.log" >&2
  exit 1
fi
# The compiler's own warnings, not ptxas' report.
grep -h 'warning' "$folder/build.log" || true
find "$folder" -path '*torch_ext_cuda_kernels.dir*' -name '*.o' -print0 |
  xargs -0 python scripts/check_cuda_binary.py --ptxas-report "$folder/build.log"
