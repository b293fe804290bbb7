#!/usr/bin/env bash
# All the tests. Environment: BUILD, the folder for builds; MAX_JOBS. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
launcher=$(command -v ccache || true)
jobs=${MAX_JOBS:-1}

step() { printf '\n== %s\n' "$*"; }

googletest=$(scripts/googletest_prefix.sh "$BUILD/googletest")

step "build: the library, its Python module and the LibTorch tests"
BUILD="$BUILD/library" TORCH_EXT_PREFIX="$googletest" scripts/build_library.sh -DTORCH_EXT_TESTS=ON

step "build: the torch-free kernel tests"
cmake -S tests/kernels -B "$BUILD/kernels" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$googletest" -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" >/dev/null
cmake --build "$BUILD/kernels" --parallel "$jobs"

step "kernels, every instruction set this CPU has, against the double-precision reference"
ctest --test-dir "$BUILD/kernels" --output-on-failure --parallel "$(nproc)"

# The instruction sets are chosen by cpuid; each one below the best can be forced.
supported=$(python -c 'import torch_ext; print(torch_ext._C.supported_cpu_capability())')
for capability in default avx2 avx512 avx512_bf16; do
  step "LibTorch tests with $capability"
  # Not through ctest: it would load torch anew for each test.
  TORCH_EXT_CPU_CAPABILITY=$capability "$BUILD/library/tests/ops/torch_ext_ops_tests" --gtest_brief=1
  [[ $capability == "$supported" ]] && break
done

step "pytest"
python -m pytest "$@"
