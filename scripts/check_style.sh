#!/usr/bin/env bash
# Format and lint checks; --fix applies what can be applied. clang-tidy runs where it is installed and
# the kernel tests have been configured (`make test`), for it reads their compile commands.
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build}

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
if command -v clang-tidy >/dev/null && [[ -f $BUILD/kernels/compile_commands.json ]]; then
  # The torch-free part: a file with torch's headers takes minutes. Clang has another notation for
  # the instruction-set regions of the isa_*.cpp files.
  mapfile -t tidy < <(git ls-files 'csrc/kernels/**/*.cpp' | grep -v '/isa_')
  check "clang-tidy" clang-tidy --quiet -p "$BUILD/kernels" "${tidy[@]}"
fi
exit $failed
