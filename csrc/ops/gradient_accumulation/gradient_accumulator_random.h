// A random generator of each thread's own. torch's default generator is the process's: threads that
// draw from it at once draw in no order at all.
#pragma once

#include <ATen/core/Generator.h>

#include <optional>

namespace torch_ext {

/// From here on this thread's operators on the generator's device draw from it where they are given
/// no generator; none: from torch's default generator again.
void set_thread_generator(std::optional<at::Generator> generator);

}  // namespace torch_ext
