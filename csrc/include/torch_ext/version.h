// The one place that says which version this is: CMake, setup.py and the Python package read it.
#pragma once

#define TORCH_EXT_VERSION "0.1.0"
