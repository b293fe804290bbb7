// One column per instruction set: the entry points that its isa_*.cpp instantiates.
#pragma once

#include <cstddef>

#include "../accumulation_params.h"
#include "../attention_params.h"
#include "../varlen_sequences.h"
#include "cpu_isa.h"
#include "task_runner.h"
#include "workspace.h"

namespace torch_ext {

/// Where a call went, for the curious and the tests: a static string such as "cpu.avx2.tile".
using KernelPath = const char*;

struct KernelTable {
  CpuCapability capability;

  /// Bytes of 64-byte aligned scratch memory that a call needs. Depends on shapes and the number of
  /// workers only.
  std::size_t (*attention_forward_workspace)(const AttentionForwardParams&, int num_workers);
  KernelPath (*attention_forward)(const AttentionForwardParams&, const TaskRunner&,
                                  void* workspace);
  std::size_t (*attention_backward_workspace)(const AttentionBackwardParams&, int num_workers);
  KernelPath (*attention_backward)(const AttentionBackwardParams&, const TaskRunner&,
                                   void* workspace);

  /// Packed sequences (varlen_sequences.h).
  KernelPath (*varlen_forward)(const AttentionForwardParams&, const VarlenSequences&,
                               const TaskRunner&, const Workspace&);
  KernelPath (*varlen_backward)(const AttentionBackwardParams&, const VarlenSequences&,
                                const TaskRunner&, const Workspace&);

  /// The mini-batch kernels; which path they take is of no interest to anyone.
  void (*accumulate)(const AccumulateParams&, const TaskRunner&);
  std::size_t (*grad_stats_workspace)(const GradStatsParams&);
  void (*grad_stats)(const GradStatsParams&, const TaskRunner&, void* workspace);
  void (*adam_step)(const AdamParams&, const TaskRunner&);
  void (*sgd_step)(const SgdParams&, const TaskRunner&);
  std::size_t (*weight_gradient_workspace)(const WeightGradientParams&, int num_workers);
  void (*weight_gradient)(const WeightGradientParams&, const TaskRunner&, void* workspace);
  void (*embedding_gradient)(const EmbeddingGradientParams&, const TaskRunner&);
};

/// The table of current_capability().
const KernelTable& kernel_table();

/// The table of one capability, for tests and benchmarks: calling its kernels on a machine without
/// those instructions ends in an illegal instruction.
const KernelTable& kernel_table(CpuCapability capability);

}  // namespace torch_ext
