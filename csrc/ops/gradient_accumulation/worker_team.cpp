#include "worker_team.h"

#include <ATen/Parallel.h>
#include <c10/util/ParallelGuard.h>

#include <cstdint>

// MKL is part of torch where torch has it. at::set_num_threads() calls this too, but sets the
// process's default along with it.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace torch_ext {
namespace {

/// While it lives, torch finds this thread alone, as after at::set_num_threads(1) in a thread of
/// its own. OpenMP keeps the number for the running task: other threads and later regions have
/// theirs.
class OneThread {
 public:
  OneThread() {
    // A thread takes over torch's number at its first question: now, rather than below this scope.
    threads_ = at::get_num_threads();
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    if (MKL_Set_Num_Threads_Local != nullptr) mkl_threads_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(mkl_threads_);
#ifdef _OPENMP
    omp_set_num_threads(threads_);
#endif
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int threads_;
  int mkl_threads_ = 0;
  at::internal::ThreadIdGuard thread_number_{0};
  c10::ParallelGuard not_parallel_{false};
};

}  // namespace

void compute_alone() {
  at::get_num_threads();  // as in OneThread
#ifdef _OPENMP
  omp_set_num_threads(1);
#endif
  if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(1);
}

bool run_on_team(std::int64_t workers, const std::function<void()>& body) {
  if (workers > 1 && (at::in_parallel_region() || workers > at::get_num_threads())) return false;
  at::parallel_for(0, workers, 1, [&body](std::int64_t begin, std::int64_t end) {
    const OneThread one_thread;
    for (std::int64_t worker = begin; worker < end; ++worker) body();
  });
  return true;
}

}  // namespace torch_ext
