// Whether tensors that an operator writes share memory with each other or with what it reads.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

namespace torch_ext {

/// An argument that is a list of tensors, or one tensor seen as a list.
struct NamedList {
  const char* name;
  at::TensorList tensors;
  bool is_list = true;          // false: messages name it without an index
  bool is_elementwise = false;  // of a source: see check_overlap()
};

/// Refuses destinations that overlap themselves, each other, or a source. An elementwise
/// source may be, exactly, the destination at its own index of the first list: each element is read
/// before it is written.
/// Tensors without memory (meta) pass. Costs one hash look-up a tensor unless storages are shared.
void check_overlap(const char* op, c10::ArrayRef<NamedList> destinations,
                   c10::ArrayRef<NamedList> sources);

}  // namespace torch_ext
