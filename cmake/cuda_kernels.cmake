# torch_ext_cuda_kernels(NAME SOURCES...): .cu files as a library of objects, for the architectures
# TORCH_EXT_CUDA_ARCHITECTURES (in torch's notation: TORCH_CUDA_ARCH_LIST, else all that the kernels
# are written for). After find_package(CUDAToolkit).

include(${CMAKE_CURRENT_LIST_DIR}/cutlass.cmake)
if(TORCH_EXT_CUTLASS_MISSING)
  message(FATAL_ERROR "torch_ext: ${TORCH_EXT_CUTLASS_MISSING}")
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
