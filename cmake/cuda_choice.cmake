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

set(TORCH_EXT_WITH_CUDA ON)
include(${CMAKE_CURRENT_LIST_DIR}/cuda_kernels.cmake)
set(TORCH_EXT_CUDA_VERSION_JSON "\"${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}\"")
set(TORCH_EXT_CUDA_REASON
    "with CUDA (nvcc ${CUDAToolkit_VERSION}; ${TORCH_EXT_CUDA_ARCHITECTURES})")

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
