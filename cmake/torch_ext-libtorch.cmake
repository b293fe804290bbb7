# Finds LibTorch and says where: TORCH_EXT_TORCH_ROOT (empty where there is none),
# TORCH_EXT_TORCH_VERSION, and the targets
#   torch_ext::libtorch_core   headers, libc10 and libtorch_cpu
#   torch_ext::libtorch        all of LibTorch, its CUDA backend included, for an application
# Used by this project's own build and by the installed package.
#
# Not find_package(Torch): for a torch with CUDA, which is what PyPI serves, that insists on a CUDA
# toolkit and on an architecture list even where nothing but CPU code is compiled. An application's
# own find_package(Torch) is honoured: the same LibTorch is taken.

function(_torch_ext_find_libtorch)
  set(candidates "")
  if(Torch_DIR)  # <root>/share/cmake/Torch
    list(APPEND candidates "${Torch_DIR}/../../..")
  endif()
  foreach(variable Torch_ROOT TORCH_INSTALL_PREFIX)
    list(APPEND candidates ${${variable}} $ENV{${variable}})
  endforeach()
  string(REPLACE ":" ";" environment "$ENV{CMAKE_PREFIX_PATH}")
  foreach(prefix ${CMAKE_PREFIX_PATH} ${environment})
    # LibTorch's own folder, or torch.utils.cmake_prefix_path, which is <root>/share/cmake.
    list(APPEND candidates "${prefix}" "${prefix}/../..")
  endforeach()
  list(APPEND candidates ${TORCH_EXT_TORCH_HINTS})

  set(root "")
  foreach(candidate ${candidates})
    if(EXISTS "${candidate}/include/torch/csrc/api/include/torch/version.h"
       AND EXISTS "${candidate}/lib/libtorch_cpu.so")
      get_filename_component(root "${candidate}" REALPATH)
      break()
    endif()
  endforeach()
  set(TORCH_EXT_TORCH_ROOT "${root}" PARENT_SCOPE)
  if(NOT root)
    return()
  endif()

  set(version_header "${root}/include/torch/headeronly/version.h")
  if(NOT EXISTS "${version_header}")
    set(version_header "${root}/include/torch/csrc/api/include/torch/version.h")
  endif()
  file(STRINGS "${version_header}" lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
  string(REGEX MATCHALL "[0-9]+" numbers "${lines}")
  list(JOIN numbers "." version)
  set(TORCH_EXT_TORCH_VERSION "${version}" PARENT_SCOPE)

  if(TARGET torch_ext::libtorch)
    return()
  endif()
  add_library(torch_ext::libtorch_core INTERFACE IMPORTED GLOBAL)
  set_target_properties(torch_ext::libtorch_core PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${root}/include;${root}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "${root}/lib/libtorch_cpu.so;${root}/lib/libc10.so")
  # An executable's link looks up what the wheel's libraries need. A CUDA toolkit's older libnccl,
  # found before the wheel's, lacks symbols and fails it.
  file(GLOB folders "${root}/../nvidia/nccl/lib" "${root}/../nvidia/*/lib")
  list(REMOVE_DUPLICATES folders)
  set(link_options "")
  foreach(folder ${folders})
    list(APPEND link_options "LINKER:-rpath-link,${folder}")
  endforeach()
  # libtorch.so is there for what it pulls in, and --as-needed would drop it.
  add_library(torch_ext::libtorch INTERFACE IMPORTED GLOBAL)
  set_target_properties(torch_ext::libtorch PROPERTIES
    INTERFACE_COMPILE_FEATURES cxx_std_20
    INTERFACE_LINK_OPTIONS "${link_options}"
    INTERFACE_LINK_LIBRARIES
      "-Wl,--push-state,--no-as-needed,${root}/lib/libtorch.so,--pop-state;torch_ext::libtorch_core")
endfunction()

_torch_ext_find_libtorch()
