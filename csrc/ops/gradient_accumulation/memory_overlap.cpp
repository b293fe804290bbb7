#include "memory_overlap.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace torch_ext {
namespace {

struct Span {
  std::uintptr_t begin;
  std::uintptr_t end;
};

/// Of an allocated tensor with elements.
Span span_of(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  std::int64_t last = 0;
  if (tensor.is_non_overlapping_and_dense()) {
    last = tensor.numel() - 1;
  } else {
    for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
      last += (tensor.sizes()[dim] - 1) * tensor.strides()[dim];
    }
  }
  return {begin, begin + static_cast<std::uintptr_t>(last + 1) * tensor.element_size()};
}

bool has_memory(const at::Tensor& tensor) {
  return tensor.has_storage() && !tensor.is_meta() && tensor.numel() > 0;
}

/// Whether torch allocated the storage. Others (NumPy's, mapped files, from_blob) may lie over the
/// same memory as one of another name.
bool owns_memory(const at::Tensor& tensor) { return tensor.storage().resizable(); }

/// Marks the bytes of a tensor in a map of [base, base + bytes.size()). False: one was taken.
bool mark(const at::Tensor& tensor, std::uintptr_t base, std::vector<bool>& bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  const auto element_size = static_cast<std::int64_t>(tensor.element_size());
  for (std::int64_t index = 0; index < tensor.numel(); ++index) {
    std::int64_t rest = index;
    std::int64_t offset = 0;
    for (std::int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
      offset += rest % tensor.sizes()[dim] * tensor.strides()[dim];
      rest /= tensor.sizes()[dim];
    }
    for (std::int64_t byte = 0; byte < element_size; ++byte) {
      auto bit = bytes[begin - base + static_cast<std::uintptr_t>(offset * element_size + byte)];
      if (bit) return false;
      bit = true;
    }
  }
  return true;
}

bool overlaps_itself(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return false;
  struct Dim {
    std::int64_t stride;
    std::int64_t size;
  };
  std::vector<Dim> dims;
  for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.sizes()[dim] > 1) dims.push_back({tensor.strides()[dim], tensor.sizes()[dim]});
  }
  std::sort(dims.begin(), dims.end(), [](Dim a, Dim b) { return a.stride < b.stride; });
  std::int64_t reach = 0;  // of the dimensions so far
  bool nested = true;
  for (const Dim& dim : dims) {
    if (dim.stride == 0) return true;
    nested = nested && dim.stride > reach;
    reach += (dim.size - 1) * dim.stride;
  }
  if (nested) return false;
  // Strides that interleave, as_strided's: looked at element by element.
  const Span span = span_of(tensor);
  std::vector<bool> bytes(span.end - span.begin);
  return !mark(tensor, span.begin, bytes);
}

/// Neither overlaps itself.
bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const Span first = span_of(a);
  const Span second = span_of(b);
  if (first.end <= second.begin || second.end <= first.begin) return false;
  if (a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense()) return true;
  const std::uintptr_t base = std::min(first.begin, second.begin);
  std::vector<bool> bytes(std::max(first.end, second.end) - base);
  return !mark(a, base, bytes) || !mark(b, base, bytes);
}

bool same_view(const at::Tensor& a, const at::Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() &&
         a.sizes() == b.sizes() && a.strides() == b.strides();
}

/// The storages of the destinations, and how far each has been handed out: lists of separately
/// allocated tensors and lists of slices of one buffer, in order, are told apart from the rest.
class StorageMap {
 public:
  explicit StorageMap(std::size_t tensors) {
    std::size_t slots = 16;
    while (slots < 2 * tensors) slots *= 2;
    slots_.resize(slots);
  }

  /// False: the tensor may overlap one that was added before.
  bool add(const at::Tensor& tensor) {
    Slot& slot = find(key_of(tensor));
    const Span span = span_of(tensor);
    const bool free = slot.key == 0 || span.begin >= slot.end;
    slot.key = key_of(tensor);
    slot.end = std::max(slot.end, span.end);
    return free;
  }

  bool contains(const at::Tensor& tensor) { return find(key_of(tensor)).key != 0; }

 private:
  struct Slot {
    std::uintptr_t key = 0;
    std::uintptr_t end = 0;
  };

  static std::uintptr_t key_of(const at::Tensor& tensor) {
    return reinterpret_cast<std::uintptr_t>(tensor.storage().data());
  }

  Slot& find(std::uintptr_t key) {
    const std::size_t mask = slots_.size() - 1;
    // Fibonacci hashing: allocations differ in their middle bits.
    std::size_t index = (key * std::uintptr_t{0x9E3779B97F4A7C15u} >> 32) & mask;
    while (slots_[index].key != 0 && slots_[index].key != key) index = (index + 1) & mask;
    return slots_[index];
  }

  std::vector<Slot> slots_;
};

struct Place {
  const NamedList* list;
  std::size_t index;
  Span span;

  const at::Tensor& tensor() const { return list->tensors[index]; }
  std::string name() const {
    return list->is_list ? std::string(list->name) + "[" + std::to_string(index) + "]"
                         : std::string(list->name);
  }
};

std::vector<Place> places_of(c10::ArrayRef<NamedList> lists) {
  std::vector<Place> places;
  for (const NamedList& list : lists) {
    for (std::size_t i = 0; i < list.tensors.size(); ++i) {
      if (has_memory(list.tensors[i])) places.push_back({&list, i, span_of(list.tensors[i])});
    }
  }
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.span.begin < b.span.begin; });
  return places;
}

[[noreturn]] void refuse(const char* op, const Place& a, const Place& b) {
  TORCH_CHECK(!same_view(a.tensor(), b.tensor()), "torch_ext::", op, ": ", b.name(),
              " takes a tensor of its own, got the one that is ", a.name(), " too");
  TORCH_CHECK(false, "torch_ext::", op, ": ", b.name(),
              " takes memory of its own, got a tensor that overlaps ", a.name());
}

/// Pair by pair where spans meet.
void check_pairs(const char* op, c10::ArrayRef<NamedList> destinations,
                 c10::ArrayRef<NamedList> sources) {
  const std::vector<Place> written = places_of(destinations);
  for (std::size_t i = 0; i < written.size(); ++i) {
    for (std::size_t j = i + 1; j < written.size() && written[j].span.begin < written[i].span.end;
         ++j) {
      if (overlap(written[i].tensor(), written[j].tensor())) refuse(op, written[i], written[j]);
    }
  }
  std::uintptr_t longest = 0;
  for (const Place& place : written) longest = std::max(longest, place.span.end - place.span.begin);
  for (const Place& read : places_of(sources)) {
    const std::uintptr_t from = read.span.begin > longest ? read.span.begin - longest : 0;
    auto place = std::lower_bound(
        written.begin(), written.end(), from,
        [](const Place& p, std::uintptr_t address) { return p.span.begin < address; });
    for (; place != written.end() && place->span.begin < read.span.end; ++place) {
      const bool own = read.list->is_elementwise && place->list == destinations.begin() &&
                       place->index == read.index && same_view(place->tensor(), read.tensor());
      if (own || place->span.end <= read.span.begin) continue;
      // A source may be expanded; then the spans decide.
      if (overlaps_itself(read.tensor()) || overlap(place->tensor(), read.tensor())) {
        refuse(op, *place, read);
      }
    }
  }
}

}  // namespace

void check_overlap(const char* op, c10::ArrayRef<NamedList> destinations,
                   c10::ArrayRef<NamedList> sources) {
  std::size_t tensors = 0;
  for (const NamedList& list : destinations) tensors += list.tensors.size();
  StorageMap storages(tensors);
  bool apart = true;
  for (const NamedList& list : destinations) {
    for (std::size_t i = 0; i < list.tensors.size(); ++i) {
      const at::Tensor& tensor = list.tensors[i];
      if (!has_memory(tensor)) continue;
      TORCH_CHECK(!overlaps_itself(tensor), "torch_ext::", op, ": ", (Place{&list, i, {}}).name(),
                  " takes a tensor whose elements have places of their own, got strides ",
                  tensor.strides(), " for sizes ", tensor.sizes());
      apart = storages.add(tensor) && owns_memory(tensor) && apart;
    }
  }
  for (const NamedList& list : sources) {
    for (const at::Tensor& tensor : list.tensors) {
      if (!has_memory(tensor)) continue;
      if (storages.contains(tensor) || !owns_memory(tensor)) apart = false;
    }
  }
  if (!apart) check_pairs(op, destinations, sources);
}

bool shares_memory(at::TensorList tensors) {
  StorageMap storages(tensors.size());
  bool apart = true;
  for (const at::Tensor& tensor : tensors) {
    if (!has_memory(tensor)) continue;
    if (overlaps_itself(tensor)) return true;
    apart = storages.add(tensor) && apart;
  }
  if (apart) return false;
  const NamedList list{"tensors", tensors};
  const std::vector<Place> places = places_of(list);
  for (std::size_t i = 0; i < places.size(); ++i) {
    for (std::size_t j = i + 1; j < places.size() && places[j].span.begin < places[i].span.end;
         ++j) {
      if (overlap(places[i].tensor(), places[j].tensor())) return true;
    }
  }
  return false;
}

}  // namespace torch_ext
