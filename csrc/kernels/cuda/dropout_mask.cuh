// The weights that dropout keeps as a tensor, 8 keys of a row a thread.
#pragma once

#include "dropout_bits.cuh"

namespace torch_ext::cuda {

struct DropoutMaskArgs {
  const std::int64_t* seed;
  std::uint32_t threshold;
  std::uint8_t* mask;  // (slices, q_len, kv_len)
  std::int64_t slices;
  std::int64_t q_len;
  std::int64_t kv_len;
};

struct DropoutMaskProgram {
  using Args = DropoutMaskArgs;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;

  static std::int64_t blocks(const Args& args) {
    const std::int64_t groups = (args.kv_len + kDropoutKeysPerCall - 1) / kDropoutKeysPerCall;
    return (args.slices * args.q_len * groups + kThreads - 1) / kThreads;
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const std::int64_t groups = (args.kv_len + kDropoutKeysPerCall - 1) / kDropoutKeysPerCall;
    const std::int64_t place = block.index() * kThreads + block.thread();
    const std::int64_t row = place / groups;
    if (row >= args.slices * args.q_len) return;
    const std::int64_t group = place % groups;
    const std::uint32_t bits =
        kept_keys(static_cast<std::uint64_t>(*args.seed), args.threshold,
                  static_cast<std::uint32_t>(row / args.q_len),
                  static_cast<std::uint32_t>(row % args.q_len), static_cast<std::uint32_t>(group));
    for (int i = 0; i < kDropoutKeysPerCall; ++i) {
      const std::int64_t key = group * kDropoutKeysPerCall + i;
      if (key < args.kv_len) {
        args.mask[row * args.kv_len + key] = static_cast<std::uint8_t>(bits >> i & 1u);
      }
    }
  }
};

}  // namespace torch_ext::cuda
