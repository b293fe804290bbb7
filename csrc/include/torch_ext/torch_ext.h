// Everything: #include <torch_ext/torch_ext.h>, link torch_ext::torch_ext.
#pragma once

#include <torch_ext/attention.h>
#include <torch_ext/gradient_accumulator.h>
#include <torch_ext/sdpa_override.h>
#include <torch_ext/version.h>
