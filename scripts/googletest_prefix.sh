#!/usr/bin/env bash
# googletest_prefix.sh FOLDER: prints what CMAKE_PREFIX_PATH needs for GoogleTest: nothing where it is
# installed; else FOLDER/usr, after unpacking Debian's package there, which takes no root.
set -euo pipefail
folder=$1

installed() {
  cmake --find-package -DNAME=GTest -DCOMPILER_ID=GNU -DLANGUAGE=CXX -DMODE=EXIST \
    -DCMAKE_PREFIX_PATH="${1:-}" >/dev/null 2>&1
}

installed && exit 0
if [[ -f $folder/usr/include/gtest/gtest.h ]]; then
  echo "$folder/usr"
  exit 0
fi
echo "torch_ext: GoogleTest is not installed; unpacking Debian's package into $folder" >&2
mkdir -p "$folder"
if command -v apt-get dpkg-deb >/dev/null; then
  cd "$folder"
  apt-get download libgtest-dev libgmock-dev >/dev/null 2>&1 ||
    { [[ $(id -u) == 0 ]] && apt-get update >/dev/null 2>&1 &&
      apt-get download libgtest-dev libgmock-dev >/dev/null 2>&1; } || true
  for package in ./*.deb; do
    [[ -f $package ]] && dpkg-deb --extract "$package" .
  done
fi
if [[ -f $folder/usr/include/gtest/gtest.h ]]; then
  echo "$folder/usr"
  exit 0
fi
cat >&2 <<'END'
torch_ext: the C++ tests take GoogleTest, which is not on PyPI. Install it:
  Debian, Ubuntu  apt-get install libgtest-dev libgmock-dev
  Fedora          dnf install gtest-devel gmock-devel
  Arch            pacman -S gtest
END
exit 1
