# torch_ext_cuda_kernels(NAME SOURCES...): .cu files as a library of objects, for the architectures
# TORCH_EXT_CUDA_ARCHITECTURES (in torch's notation: TORCH_CUDA_ARCH_LIST, else all that the kernels
# are written for). After find_package(CUDAToolkit).

# CUTLASS comes as headers in a Python package: beside torch, or in the environment that builds.
set(_cutlass_hints ${TORCH_EXT_TORCH_ROOT}/../cutlass_library/source/include)
if(DEFINED Python_EXECUTABLE)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE _cutlass_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(APPEND _cutlass_hints ${_cutlass_package}/source/include)
endif()
find_path(TORCH_EXT_CUTLASS_INCLUDE_DIR cute/tensor.hpp
          HINTS $ENV{CUTLASS_PATH}/include ${_cutlass_hints})
set(_cutlass_version "none")
if(TORCH_EXT_CUTLASS_INCLUDE_DIR)
  file(STRINGS ${TORCH_EXT_CUTLASS_INCLUDE_DIR}/cutlass/version.h _lines
       REGEX "#define CUTLASS_(MAJOR|MINOR) [0-9]+")
  string(REGEX MATCHALL "[0-9]+" _numbers "${_lines}")
  list(JOIN _numbers "." _cutlass_version)
endif()
if(NOT TORCH_EXT_CUTLASS_INCLUDE_DIR OR _cutlass_version VERSION_LESS 4.2)
  message(FATAL_ERROR
    "torch_ext: the CUDA kernels take the headers of CUTLASS 4.2 or newer, got ${_cutlass_version}. One of:\n"
    "  pip install 'nvidia-cutlass>=4.2'          into the environment of torch\n"
    "  CUTLASS_PATH=<a checkout of CUTLASS>       in the environment\n"
    "  -DTORCH_EXT_CUTLASS_INCLUDE_DIR=<folder>   which holds cute/ and cutlass/\n"
    "  TORCH_EXT_CUDA=0                           in the environment: without CUDA")
endif()

if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  set(TORCH_EXT_CUDA_ARCHITECTURES "$ENV{TORCH_CUDA_ARCH_LIST}")
elseif(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
  set(TORCH_EXT_CUDA_ARCHITECTURES "8.0;9.0a;10.0;12.0+PTX")
else()  # no Blackwell yet; PTX serves what came later
  set(TORCH_EXT_CUDA_ARCHITECTURES "8.0;9.0a;9.0+PTX")
endif()
string(REPLACE " " ";" TORCH_EXT_CUDA_ARCHITECTURES "${TORCH_EXT_CUDA_ARCHITECTURES}")
set(_gencode "")
foreach(_architecture ${TORCH_EXT_CUDA_ARCHITECTURES})
  if(NOT _architecture MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$" OR _architecture VERSION_LESS 8)
    message(FATAL_ERROR "torch_ext: TORCH_CUDA_ARCH_LIST takes numbers from 8.0 on, as in "
                        "8.0;9.0a;12.0+PTX, got '${_architecture}'")
  endif()
  set(_number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  list(APPEND _gencode "-gencode=arch=compute_${_number},code=sm_${_number}")
  if(CMAKE_MATCH_3)
    list(APPEND _gencode "-gencode=arch=compute_${_number},code=compute_${_number}")
  endif()
endforeach()
set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
set(CMAKE_CUDA_ARCHITECTURES OFF)  # an older CMake does not know 9.0a
set(CMAKE_CUDA_FLAGS_RELEASE "")
enable_language(CUDA)
get_filename_component(_csrc "${CMAKE_CURRENT_LIST_DIR}/../csrc" ABSOLUTE)
file(STRINGS ${_csrc}/nvcc_flags.txt _nvcc_flags REGEX "^[^#]")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_csrc}/nvcc_flags.txt)

# The kernels know no torch, and nothing else knows CUTLASS: a library of their own.
function(torch_ext_cuda_kernels name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE ${_csrc})
  target_include_directories(${name} SYSTEM PRIVATE ${TORCH_EXT_CUTLASS_INCLUDE_DIR})
  target_compile_options(${name} PRIVATE ${_nvcc_flags} ${_gencode})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES OFF)
endfunction()
