# CUTLASS's headers: TORCH_EXT_CUTLASS_INCLUDE_DIR, which holds cute/ and cutlass/, or, in
# TORCH_EXT_CUTLASS_MISSING, what is wrong.

# They come in a Python package: beside torch, or in the environment that builds.
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
set(TORCH_EXT_CUTLASS_MISSING "")
if(NOT TORCH_EXT_CUTLASS_INCLUDE_DIR OR _cutlass_version VERSION_LESS 4.2)
  string(CONCAT TORCH_EXT_CUTLASS_MISSING
    "the CUDA kernels take the headers of CUTLASS 4.2 or newer, got ${_cutlass_version}: "
    "`pip install 'nvidia-cutlass>=4.2'` beside torch, or set CUTLASS_PATH to a checkout of it, or "
    "pass -DTORCH_EXT_CUTLASS_INCLUDE_DIR=<the folder that holds cute/ and cutlass/>")
endif()
