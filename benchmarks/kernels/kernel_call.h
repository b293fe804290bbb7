// One attention call on memory of its own, straight into a kernel table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/attention_params.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/task_runner.h"

namespace torch_ext_bench {

using torch_ext::ScalarType;

/// OpenMP's threads, as torch's at::parallel_for uses them.
class OpenMpTaskRunner final : public torch_ext::TaskRunner {
 public:
  explicit OpenMpTaskRunner(int num_workers) : num_workers_(num_workers) {}
  int num_workers() const override { return num_workers_; }
  void run(torch_ext::WorkerBody body) const override;

 private:
  int num_workers_;
};

enum class Measured { kForward, kBackward };

struct KernelCase {
  std::string name{};
  Measured measured = Measured::kForward;
  ScalarType dtype = ScalarType::kFloat32;
  std::int64_t batch = 2;
  std::int64_t query_heads = 8;
  std::int64_t kv_heads = 8;
  std::int64_t q_len = 1024;
  std::int64_t kv_len = 1024;
  std::int64_t head_dim = 64;
  bool is_causal = false;

  /// Multiply-adds counted twice, over the pairs that a causal call attends to.
  double flops() const;
  /// Bytes of keys and values.
  double kv_bytes() const;
};

/// Owns the tensors of a case, filled with random numbers.
class KernelCall {
 public:
  explicit KernelCall(const KernelCase& kernel_case);
  /// Runs the measured kernel once; returns the path that it took.
  torch_ext::KernelPath run(const torch_ext::KernelTable& table,
                            const torch_ext::TaskRunner& runner);

 private:
  using Buffer = std::unique_ptr<char, void (*)(void*)>;
  static Buffer allocate(std::size_t bytes);
  Buffer random_elements(std::int64_t count);
  char* workspace(std::size_t bytes);

  KernelCase case_;
  std::vector<Buffer> buffers_;
  Buffer workspace_;
  std::size_t workspace_bytes_ = 0;
  std::uint64_t random_state_ = 1;
  torch_ext::AttentionForwardParams forward_;
  torch_ext::AttentionBackwardParams backward_;
};

}  // namespace torch_ext_bench
