# Whether the CUDA sources are compiled: TORCH_EXT_WITH_CUDA, TORCH_EXT_CUDA_REASON, and for which
# architectures, in torch's notation (TORCH_EXT_CUDA_ARCHITECTURES). The same rules as choose_cuda()
# in torch_ext/cpp_build.py. Then torch_ext_cuda_settings(TARGET KERNELS) adds the kernels to a target.
set(TORCH_EXT_WITH_CUDA OFF)
set(TORCH_EXT_CUDA_ARCHITECTURES "")
set(TORCH_EXT_CUDA_VERSION_JSON null)
set(_missing "")

# -DTORCH_EXT_CUDA=ON/OFF, else the environment's TORCH_EXT_CUDA=0/1, which setup.py reads too.
set(_cuda_wish "${TORCH_EXT_CUDA}")
if(_cuda_wish STREQUAL "AUTO" AND NOT "$ENV{TORCH_EXT_CUDA}" STREQUAL "")
  set(_cuda_wish "$ENV{TORCH_EXT_CUDA}")
endif()
if(NOT _cuda_wish)
  set(TORCH_EXT_CUDA_REASON "without CUDA (TORCH_EXT_CUDA=${_cuda_wish})")
  return()
endif()
if(NOT _cuda_sources)
  set(_missing "this version has no CUDA sources")
elseif(NOT EXISTS ${TORCH_EXT_TORCH_ROOT}/lib/libtorch_cuda.so)
  set(_missing "LibTorch in ${TORCH_EXT_TORCH_ROOT} is built without CUDA")
else()
  find_package(CUDAToolkit QUIET)
  if(NOT CUDAToolkit_FOUND OR NOT CUDAToolkit_NVCC_EXECUTABLE)
    set(_missing "no nvcc was found: put it on PATH or set CUDAToolkit_ROOT")
  elseif(EXISTS ${TORCH_EXT_TORCH_ROOT}/version.py)
    file(STRINGS ${TORCH_EXT_TORCH_ROOT}/version.py _line REGEX "^cuda[: ].*= '[0-9.]+'")
    string(REGEX MATCH "[0-9]+" _torch_cuda_major "${_line}")
    if(_torch_cuda_major AND NOT _torch_cuda_major EQUAL CUDAToolkit_VERSION_MAJOR)
      set(_missing "nvcc ${CUDAToolkit_VERSION} cannot compile for a LibTorch of CUDA ${_torch_cuda_major}")
    endif()
  endif()
endif()
if(_missing)
  if(NOT _cuda_wish STREQUAL "AUTO")
    message(FATAL_ERROR "torch_ext: TORCH_EXT_CUDA=${_cuda_wish}, but ${_missing}")
  endif()
  set(TORCH_EXT_CUDA_REASON "without CUDA (${_missing})")
  return()
endif()

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

set(TORCH_EXT_WITH_CUDA ON)
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
set(TORCH_EXT_CUDA_VERSION_JSON "\"${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}\"")
set(TORCH_EXT_CUDA_REASON
    "with CUDA (nvcc ${CUDAToolkit_VERSION}; ${TORCH_EXT_CUDA_ARCHITECTURES})")

set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
set(CMAKE_CUDA_ARCHITECTURES OFF)  # an older CMake does not know 9.0a
set(CMAKE_CUDA_FLAGS_RELEASE "")
enable_language(CUDA)
file(STRINGS ${PROJECT_SOURCE_DIR}/csrc/nvcc_flags.txt _nvcc_flags REGEX "^[^#]")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/nvcc_flags.txt)

# torch brings CUDA's libraries along as Python packages. A C++ program that starts with this library
# must find the same ones: torch does not run on an older libcublasLt.
file(GLOB _libraries ${TORCH_EXT_TORCH_ROOT}/../nvidia/*/lib/libcudart.so.*
                     ${TORCH_EXT_TORCH_ROOT}/../nvidia/*/lib/libcublasLt.so.*)
set(_cuda_rpath "")
foreach(_library ${_libraries})
  get_filename_component(_folder ${_library} DIRECTORY)
  get_filename_component(_folder ${_folder} REALPATH)
  list(APPEND _cuda_rpath ${_folder})
endforeach()
list(REMOVE_DUPLICATES _cuda_rpath)

# The kernels know no torch, and nothing else knows CUTLASS: a library of their own.
function(torch_ext_cuda_kernels name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
  target_include_directories(${name} SYSTEM PRIVATE ${TORCH_EXT_CUTLASS_INCLUDE_DIR})
  target_compile_options(${name} PRIVATE ${_nvcc_flags} ${_gencode})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES OFF)
endfunction()

function(torch_ext_cuda_settings target kernels)
  torch_ext_cuda_kernels(${target}_cuda_kernels ${kernels})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_cuda_kernels>)
  target_include_directories(${target} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
  set_property(TARGET ${target} APPEND PROPERTY INSTALL_RPATH ${_cuda_rpath})
  target_link_libraries(${target} PRIVATE
    ${TORCH_EXT_TORCH_ROOT}/lib/libc10_cuda.so ${TORCH_EXT_TORCH_ROOT}/lib/libtorch_cuda.so
    CUDA::cublasLt CUDA::cudart)
endfunction()
