// CUDA programs (csrc/kernels/cuda) on the host: every thread of every block, one after the other.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernels/cpu/task_runner.h"

namespace torch_ext::testing {

struct HostBlock {
  std::int64_t block;
  int thread_index;

  std::int64_t index() const { return block; }
  int thread() const { return thread_index; }
  [[noreturn]] void refuse_row(std::int64_t, std::int64_t) const { std::abort(); }
};

template <typename Program>
concept PhasedProgram = requires {
  Program::kPhases;
};

/// Blocks are tasks of the runner. Barriers lie between the phases of a program that has them: all
/// threads run one phase before any runs the next.
struct HostLauncher {
  using Status = int;
  static constexpr Status kSuccess = 0;
  static constexpr Status kTooLarge = 1;

  const TaskRunner& runner;

  template <typename Program>
  Status launch(const typename Program::Args& args, std::int64_t blocks) const {
    run_tasks(runner, blocks, [&](int, std::int64_t block) {
      if constexpr (PhasedProgram<Program>) {
        const auto shared = std::make_unique<typename Program::Shared>();
        run_phases<Program, 0>(block, args, *shared);
      } else {
        for (int thread = 0; thread < Program::kThreads; ++thread) {
          HostBlock host{block, thread};
          Program::run(host, args);
        }
      }
    });
    return kSuccess;
  }

 private:
  template <typename Program, int kPhase>
  static void run_phases(std::int64_t block, const typename Program::Args& args,
                         typename Program::Shared& shared) {
    for (int thread = 0; thread < Program::kThreads; ++thread) {
      HostBlock host{block, thread};
      Program::template phase<kPhase>(host, args, shared);
    }
    if constexpr (kPhase + 1 < Program::kPhases) {
      run_phases<Program, kPhase + 1>(block, args, shared);
    }
  }
};

}  // namespace torch_ext::testing
