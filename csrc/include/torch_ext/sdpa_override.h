// The drop-in switch: while it is on, at::scaled_dot_product_attention (and with it
// F.scaled_dot_product_attention, the nn attention modules and their inference fast paths) runs
// torch_ext's fused operators. Nothing is overridden before the first call.
//
// The switch belongs to the process, not to the thread, and every function here may be called from
// any thread. What torch_ext does not take (nested, sparse, quantized or complex tensors, devices
// without kernels) runs torch's own kernel, and so do calls inside
// torch.nn.attention.sdpa_kernel(...) whose list leaves out a backend that torch has there.
#pragma once

#include <cstdint>

namespace torch_ext {

/// Turns the override on until disable(), or, inside an EnabledScope, until that scope ends.
/// cuda: whether CUDA tensors run torch_ext's kernels too, which no GPU has run yet. Without it
/// they are torch's.
void enable(bool cuda = false);

/// Turns the override off. Afterwards torch's dispatcher holds nothing of torch_ext's.
void disable();

/// Whether calls made now would run fused.
bool is_enabled() noexcept;

/// Whether calls on CUDA tensors made now would run fused, where the library has CUDA kernels.
bool is_cuda_enabled() noexcept;

/// Holds the override on (or off, with `on` = false) while it lives, then restores what was there.
/// Scopes nest. Where scopes of several threads overlap, the one opened last decides.
class EnabledScope {
 public:
  /// cuda: as in enable().
  explicit EnabledScope(bool on = true, bool cuda = false);
  ~EnabledScope();
  EnabledScope(const EnabledScope&) = delete;
  EnabledScope& operator=(const EnabledScope&) = delete;

 private:
  std::uint64_t id_;
};

/// Called with the new state after every change of is_enabled() or is_cuda_enabled(), on the thread
/// that made it and while no other thread can change it: the listener must not call back into
/// enable(), disable() or a scope. One listener at a time; nullptr removes it.
using OverrideListener = void (*)(bool enabled, bool cuda);
void set_override_listener(OverrideListener listener);

}  // namespace torch_ext
