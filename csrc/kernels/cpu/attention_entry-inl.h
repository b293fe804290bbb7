// The entry points of the kernel table: which kernel takes a call, in which compute type.

template <typename Policy>
constexpr TileGeometry kGeometry{.lanes = Simd<typename Policy::Compute>::kLanes,
                                 .max_vectors = kMaxVectors,
                                 .compute_size = sizeof(typename Policy::Compute),
                                 .depth = Policy::kDepth};

/// Calls `body` with the contraction policy of a dtype.
template <typename Body>
TORCH_EXT_INLINE auto with_policy(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::kFloat64) return body(DoubleContraction{});
#if defined(TORCH_EXT_HAS_BF16_DOT)
  if (dtype == ScalarType::kBFloat16) return body(Bf16PairContraction{});
#endif
  return body(FloatContraction{});
}

static std::size_t attention_forward_workspace(const AttentionForwardParams& params,
                                               int num_workers) {
  return with_policy(params.dtype, [&](auto policy) {
    return plan_forward(params, kGeometry<decltype(policy)>, num_workers).total_bytes;
  });
}

static KernelPath attention_forward(const AttentionForwardParams& params, const TaskRunner& runner,
                                    void* workspace) {
  return with_policy(params.dtype, [&](auto policy) -> KernelPath {
    using Policy = decltype(policy);
    const ForwardPlan plan = plan_forward(params, kGeometry<Policy>, runner.num_workers());
    if (plan.decode) {
      run_decode(params, plan, runner, static_cast<char*>(workspace));
      return "cpu." TORCH_EXT_ISA_NAME ".decode";
    }
    run_forward<Policy>(params, plan, runner, static_cast<char*>(workspace));
    return "cpu." TORCH_EXT_ISA_NAME ".tile";
  });
}

static std::size_t attention_backward_workspace(const AttentionBackwardParams& params,
                                                int num_workers) {
  return with_policy(params.dtype, [&](auto policy) {
    return plan_backward(params, kGeometry<decltype(policy)>, num_workers).total_bytes;
  });
}

static KernelPath attention_backward(const AttentionBackwardParams& params,
                                     const TaskRunner& runner, void* workspace) {
  return with_policy(params.dtype, [&](auto policy) -> KernelPath {
    using Policy = decltype(policy);
    const BackwardPlan plan = plan_backward(params, kGeometry<Policy>, runner.num_workers());
    run_backward<Policy>(params, plan, runner, static_cast<char*>(workspace));
    return "cpu." TORCH_EXT_ISA_NAME ".backward";
  });
}
