// What the kernels need from outside, included before an isa_*.cpp file opens its `#pragma GCC
// target` region: standard and shared inline code stays compiled for the baseline.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../accumulation_params.h"
#include "../attention_params.h"
#include "../counter_rng.h"
#include "../strided_view.h"
#include "../varlen_sequences.h"
#include "attention_mask_map.h"
#include "attention_schedule.h"
#include "kernel_table.h"
#include "list_schedule.h"
#include "task_runner.h"
#include "varlen_schedule.h"
#include "workspace.h"
