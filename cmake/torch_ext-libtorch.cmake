# Finds LibTorch and defines torch_ext_libtorch (its headers and libraries), TORCH_EXT_TORCH_ROOT and
# TORCH_EXT_TORCH_VERSION. Used by this project's own build and by the installed package.
#
# Not find_package(Torch): for a CUDA build of torch, which PyPI serves by default, that insists on a
# CUDA toolkit and on an architecture list, even where nothing but CPU code is compiled.
include_guard(GLOBAL)

set(_torch_ext_prefixes "")
if(Torch_DIR)  # <root>/share/cmake/Torch, from the application's own find_package(Torch)
  list(APPEND _torch_ext_prefixes "${Torch_DIR}/../../..")
endif()
foreach(_variable Torch_ROOT TORCH_INSTALL_PREFIX)
  list(APPEND _torch_ext_prefixes ${${_variable}} $ENV{${_variable}})
endforeach()
string(REPLACE ":" ";" _torch_ext_prefix_environment "$ENV{CMAKE_PREFIX_PATH}")
foreach(_prefix ${CMAKE_PREFIX_PATH} ${_torch_ext_prefix_environment})
  # LibTorch's own folder, or torch.utils.cmake_prefix_path, which is <root>/share/cmake.
  list(APPEND _torch_ext_prefixes "${_prefix}" "${_prefix}/../..")
endforeach()
list(APPEND _torch_ext_prefixes ${TORCH_EXT_TORCH_HINTS})

set(TORCH_EXT_TORCH_ROOT "")
foreach(_prefix ${_torch_ext_prefixes})
  if(EXISTS "${_prefix}/include/torch/csrc/api/include/torch/version.h"
     AND EXISTS "${_prefix}/lib/libtorch_cpu.so")
    get_filename_component(TORCH_EXT_TORCH_ROOT "${_prefix}" REALPATH)
    break()
  endif()
endforeach()

if(TORCH_EXT_TORCH_ROOT)
  set(_version_file "${TORCH_EXT_TORCH_ROOT}/include/torch/headeronly/version.h")
  if(NOT EXISTS "${_version_file}")
    set(_version_file "${TORCH_EXT_TORCH_ROOT}/include/torch/csrc/api/include/torch/version.h")
  endif()
  file(STRINGS "${_version_file}" _version_lines
       REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX MATCHALL "[0-9]+" _version_numbers "${_version_lines}")
  list(JOIN _version_numbers "." TORCH_EXT_TORCH_VERSION)

  add_library(torch_ext_libtorch INTERFACE)
  target_include_directories(torch_ext_libtorch SYSTEM INTERFACE
    "${TORCH_EXT_TORCH_ROOT}/include"
    "${TORCH_EXT_TORCH_ROOT}/include/torch/csrc/api/include")
  target_compile_features(torch_ext_libtorch INTERFACE cxx_std_20)
  target_link_libraries(torch_ext_libtorch INTERFACE
    "${TORCH_EXT_TORCH_ROOT}/lib/libc10.so"
    "${TORCH_EXT_TORCH_ROOT}/lib/libtorch_cpu.so"
    "${TORCH_EXT_TORCH_ROOT}/lib/libtorch.so")
  # The wheel's libraries need the wheel's CUDA libraries. An older libnccl of a toolkit, found
  # first, lacks symbols and fails the link of an executable.
  file(GLOB _torch_ext_wheel_folders
       "${TORCH_EXT_TORCH_ROOT}/../nvidia/nccl/lib" "${TORCH_EXT_TORCH_ROOT}/../nvidia/*/lib")
  foreach(_folder ${_torch_ext_wheel_folders})
    target_link_options(torch_ext_libtorch INTERFACE "LINKER:-rpath-link,${_folder}")
  endforeach()
endif()
