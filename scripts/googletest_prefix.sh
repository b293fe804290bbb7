#!/usr/bin/env bash
# googletest_prefix.sh FOLDER: prints what CMAKE_PREFIX_PATH needs for GoogleTest: nothing where it is
# installed; else FOLDER/usr, after unpacking Debian's package there, which takes no root.
set -euo pipefail
folder=$1

installed() {  # asks the find_package of the tests
  local here status=0
  here=$(mktemp -d)
  cat >"$here/CMakeLists.txt" <<'END_OF_PROJECT'
cmake_minimum_required(VERSION 3.22)
project(googletest_prefix LANGUAGES CXX)
find_package(Threads REQUIRED)
find_package(GTest REQUIRED)
END_OF_PROJECT
  cmake -S "$here" -B "$here/build" -G Ninja >/dev/null 2>&1 || status=$?
  rm -rf "$here"
  return $status
}

if [[ -f $folder/usr/include/gtest/gtest.h ]]; then
  echo "$folder/usr"
  exit 0
fi
installed && exit 0
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
cat >&2 <<'END_OF_MESSAGE'
torch_ext: the C++ tests take GoogleTest, which is not on PyPI. Install it:
  Debian, Ubuntu  apt-get install libgtest-dev libgmock-dev
  Fedora          dnf install gtest-devel gmock-devel
  Arch            pacman -S gtest
END_OF_MESSAGE
exit 1
