// The drop-in switch: while it is on, at::scaled_dot_product_attention (and with it
// F.scaled_dot_product_attention, the nn attention modules and their inference fast paths) runs
// torch_ext's fused operators. Nothing is overridden before the first call.
//
// The switch belongs to the process, not to the thread, and every function here may be called from
// any thread. What torch_ext does not take (nested, sparse, quantized or complex tensors, devices
// without kernels) runs torch's own kernel, and so does everything inside
// torch.nn.attention.sdpa_kernel(...) and whatever else turns torch's attention backends off.
#pragma once

#include <cstdint>

namespace torch_ext {

/// Turns the override on until disable(), or, inside an EnabledScope, until that scope ends.
void enable();

/// Turns the override off. Afterwards torch's dispatcher holds nothing of torch_ext's.
void disable();

/// Whether calls made now would run fused.
bool is_enabled() noexcept;

/// Holds the override on (or off, with `on` = false) while it lives, then restores what was there.
/// Scopes nest. Where scopes of several threads overlap, the one opened last decides.
class EnabledScope {
 public:
  explicit EnabledScope(bool on = true);
  ~EnabledScope();
  EnabledScope(const EnabledScope&) = delete;
  EnabledScope& operator=(const EnabledScope&) = delete;

 private:
  std::uint64_t id_;
};

/// Called with the new state after every change of is_enabled(), on the thread that made it and
/// while no other thread can change it: the listener must not call back into enable(), disable() or
/// a scope. One listener at a time; nullptr removes it.
using OverrideListener = void (*)(bool enabled);
void set_override_listener(OverrideListener listener);

}  // namespace torch_ext
