# torch_ext_compile_settings(TARGET): the flags of csrc/compile_flags.txt, and no others. setup.py and
# cpp_extension.load() compile with exactly these, in this order.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_FLAGS_RELEASE "")
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()
# Word for word what torch's own builds pass, or ccache takes them for other objects. Headers of the
# system are left out, and torch's among them: torch_ext_compile_settings names one that tells.
set(CMAKE_DEPFILE_FLAGS_CXX "-MMD -MF <DEP_FILE>")
# Here, and not by CMake's properties, for the order.
string(PREPEND CMAKE_CXX_FLAGS "-fPIC -std=c++20 ")

get_filename_component(_csrc "${CMAKE_CURRENT_LIST_DIR}/../csrc" ABSOLUTE)
file(STRINGS ${_csrc}/compile_flags.txt TORCH_EXT_COMPILE_FLAGS REGEX "^[^#]")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_csrc}/compile_flags.txt)

function(torch_ext_compile_settings target)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  foreach(property CXX_STANDARD CXX_STANDARD_REQUIRED CXX_EXTENSIONS)
    set_property(TARGET ${target} PROPERTY ${property})
  endforeach()
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:${TORCH_EXT_COMPILE_FLAGS}>")
  if(TORCH_EXT_TORCH_ROOT)  # another torch in the same place
    get_target_property(sources ${target} SOURCES)
    set_source_files_properties(${sources} PROPERTIES OBJECT_DEPENDS
      ${TORCH_EXT_TORCH_ROOT}/include/torch/csrc/api/include/torch/version.h)
  endif()
endfunction()
