#!/usr/bin/env bash
# All the tests. Environment: BUILD, the folder for builds; MAX_JOBS. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# A cache entry serves every checkout, and the packaging tests' copies of this one. Not relative to
# the whole checkout: its .venv has torch.
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD/csrc}

step() {
  current=$*
  printf '\n== %s\n' "$current"
}
current=start
trap 'echo "torch_ext: FAILED in: $current" >&2' ERR

step "build: the library, its Python module and the LibTorch tests"
googletest=$(scripts/googletest_prefix.sh "$BUILD/googletest")
BUILD="$BUILD/library" TORCH_EXT_PREFIX="$googletest" scripts/build_library.sh -DTORCH_EXT_TESTS=ON

step "build: the torch-free kernel tests"
scripts/configure_kernel_tests.sh "$BUILD/kernels"
cmake --build "$BUILD/kernels" --parallel "${MAX_JOBS:-1}"

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
if [[ $# != 0 ]]; then
  python -m pytest "$@"
  exit
fi
# A process for each core, whole files to each. Threads that wait give their core to the others.
GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0} \
  python -m pytest --numprocesses "$(nproc)" --dist loadfile tests/python
# One after the other: these build, with as many compilers as there are cores.
python -m pytest tests/packaging
