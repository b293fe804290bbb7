#!/usr/bin/env bash
# make_environment.sh PYTHON VENV REQUIREMENTS: an environment with everything in REQUIREMENTS. An
# environment that is there is kept, and what it has already is not reinstalled.
set -euo pipefail
python=$1 venv=$2 requirements=$3

die() {
  printf 'torch_ext: %s\n' "$@" >&2
  exit 1
}

command -v g++ >/dev/null || die "no g++ was found." \
  "Debian and Ubuntu: apt-get install g++    Fedora: dnf install gcc-c++"
echo 'int main() { struct { int a; } s{.a = 0}; return s.a; }' |
  g++ -std=c++20 -fopenmp -x c++ - -o /dev/null 2>/dev/null ||
  die "$(g++ --version | head -1) does not compile C++20 with OpenMP: version 11 or newer does."

if [[ ! -x $venv/bin/python ]]; then
  command -v "$python" >/dev/null || die "no $python was found: make PYTHON=..."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "takes Python 3.10 or newer, got $("$python" --version): make PYTHON=..."
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    die "$python comes without its C headers (Python.h)." \
      "Debian and Ubuntu: apt-get install python3-dev    Fedora: dnf install python3-devel"
  echo "torch_ext: making the environment $venv"
  "$python" -m venv "$venv" || die "$python cannot make environments." \
    "Debian and Ubuntu: apt-get install python3-venv"
fi

echo "torch_ext: installing what is missing in $venv (torch is large: this takes minutes, once)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
