#!/usr/bin/env bash
# Format and lint checks; --fix applies what can be applied. clang-tidy runs where it is installed.
# Environment: BUILD, the folder for builds, for clang-tidy reads the kernel tests' compile commands.
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILD=${BUILD:-$PWD/build}

mapfile -t cpp < <(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
failed=0
check() {
  printf '== %s\n' "$1"
  shift
  "$@" || failed=1
}

if [[ ${1:-} == --fix ]]; then
  ruff check --fix . || failed=1
  ruff format .
  clang-format -i "${cpp[@]}"
  exit $failed
fi

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "clang-format" clang-format --dry-run --Werror "${cpp[@]}"
for script in scripts/*.sh .ci/run; do
  check "bash -n $script" bash -n "$script"
done
if command -v clang-tidy >/dev/null; then
  scripts/configure_kernel_tests.sh "$BUILD/kernels"
  # The torch-free part: a file with torch's headers takes minutes. Clang has other notations for the
  # instruction-set regions of the isa_*.cpp files, and for what cpu_isa.cpp asks the processor.
  mapfile -t tidy < <(git ls-files 'csrc/kernels/**/*.cpp' | grep -Ev '/(isa_.*|cpu_isa)\.cpp$')
  check "clang-tidy" clang-tidy --quiet -p "$BUILD/kernels" "${tidy[@]}"
fi
exit $failed
