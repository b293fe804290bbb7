// When a composite operator may call a CPU kernel itself, past the dispatcher: the way of tiny
// calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

namespace torch_ext {

/// Whether all tensors are dense CPU tensors and nothing stands between this call and the CPU
/// kernel but autograd: no transform, mode, tracer, autocast, subclass or tangent. Null and
/// undefined tensors do not count.
bool is_plain_cpu_call(c10::ArrayRef<const at::Tensor*> tensors);

/// Whether autograd would record an operation on these.
bool needs_gradient(c10::ArrayRef<const at::Tensor*> tensors);

/// Whether a mask requires grad. torch's flash kernel takes none that does, whether its gradient is
/// wanted or not, which shows in the memory order of out.
bool is_variable(const at::Tensor* mask);

/// Whether `tensor` is a dense CPU tensor that autograd alone looks at.
bool is_plain_cpu(const at::Tensor& tensor);

/// Whether forward-mode AD may differentiate through any of `tensors`. Inside a torch.func
/// transform the tangents may lie below what this call sees: then any dual level counts.
bool may_carry_tangents(c10::ArrayRef<const at::Tensor*> tensors);

/// A seed from torch's default generator of `like`'s device: int64, one element.
at::Tensor draw_dropout_seed(const at::Tensor& like);

}  // namespace torch_ext
