// Long tasks on the threads of torch's parallel regions. Threads of a pool's own would share the
// cores with these: after a region they look out for the next one for milliseconds, without pause.
#pragma once

#include <cstdint>
#include <functional>

namespace torch_ext {

/// From here on torch and MKL find this thread alone: for the threads of a pool's own. Other
/// threads, and the number that new ones begin with, are left as they are.
void compute_alone();

/// Runs `body` so many times at once, in the calling thread and others of its team, with torch and
/// MKL at one thread each, so that no sum is split. `body` must not throw.
///
/// Returns false, having run nothing, where the team is smaller than that: more workers than torch
/// has threads, or more than one inside a parallel region.
bool run_on_team(std::int64_t workers, const std::function<void()>& body);

}  // namespace torch_ext
