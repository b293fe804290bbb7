// Tensors whose elements lie further apart than 2^31: every offset has to be computed in 64 bits.
// The address space is reserved, and only the pages that hold elements exist.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <new>
#include <set>
#include <vector>

#include "attention_case.h"
#include "attention_check.h"
#include "kernels/reference/element_access.h"
#include "kernels_under_test.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

constexpr std::int64_t kFar = (std::int64_t{1} << 31) + 3;

/// Strides of (batch dimension 0, head, row, col).
struct FarStrides {
  std::int64_t batch, head, row, col;
};

/// A copy of a tensor with such strides.
class FarTensor {
 public:
  FarTensor(const StridedTensor& source, const FarStrides& strides)
      : type_(source.type()),
        extent_(source.extent()),
        page_(static_cast<std::int64_t>(sysconf(_SC_PAGESIZE))) {
    view_.batch_strides[0] = strides.batch;
    view_.head_stride = strides.head;
    view_.row_stride = strides.row;
    view_.col_stride = strides.col;
    const std::int64_t last =
        offset(extent_.batch() - 1, extent_.heads - 1, extent_.rows - 1, extent_.cols - 1);
    mapped_bytes_ = static_cast<std::size_t>((last + 1) * width() + page_);
    view_.data =
        mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (view_.data == MAP_FAILED) throw std::bad_alloc();
    for_each([&](std::int64_t b, std::int64_t h, std::int64_t r, std::int64_t c) {
      make_accessible(offset(b, h, r, c) * width() / page_);
      make_accessible((offset(b, h, r, c) * width() + width() - 1) / page_);
      reference::store_element(view_.data, offset(b, h, r, c), type_, source.get(b, h, r, c));
    });
  }
  ~FarTensor() { munmap(view_.data, mapped_bytes_); }
  FarTensor(const FarTensor&) = delete;
  FarTensor& operator=(const FarTensor&) = delete;

  StridedView view() const { return view_; }
  ConstStridedView const_view() const {
    return {view_.data, view_.batch_strides, view_.head_stride, view_.row_stride, view_.col_stride};
  }

  std::vector<double> values() const {
    std::vector<double> result;
    for_each([&](std::int64_t b, std::int64_t h, std::int64_t r, std::int64_t c) {
      result.push_back(reference::load_element(view_.data, offset(b, h, r, c), type_));
    });
    return result;
  }

 private:
  std::int64_t width() const { return static_cast<std::int64_t>(element_size(type_)); }
  std::int64_t offset(std::int64_t b, std::int64_t h, std::int64_t r, std::int64_t c) const {
    return b * view_.batch_strides[0] + h * view_.head_stride + r * view_.row_stride +
           c * view_.col_stride;
  }

  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (std::int64_t b = 0; b < extent_.batch(); ++b) {
      for (std::int64_t h = 0; h < extent_.heads; ++h) {
        for (std::int64_t r = 0; r < extent_.rows; ++r) {
          for (std::int64_t c = 0; c < extent_.cols; ++c) visit(b, h, r, c);
        }
      }
    }
  }

  void make_accessible(std::int64_t page) {
    if (!accessible_.insert(page).second) return;
    if (mprotect(static_cast<char*>(view_.data) + page * page_, static_cast<std::size_t>(page_),
                 PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
  }

  ScalarType type_;
  TensorExtent extent_;
  std::int64_t page_;
  std::size_t mapped_bytes_ = 0;
  StridedView view_{};
  std::set<std::int64_t> accessible_;
};

class AttentionFarOffsets : public AttentionKernelTest {
 protected:
  /// Compact and far tensors must give the same, bit by bit.
  void expect_same(const AttentionCase& spec, const FarStrides& strides) const {
    SCOPED_TRACE(describe(spec));
    const SerialTaskRunner runner;
    const AttentionProblem compact(spec);
    run_forward(kernel(), compact, runner);
    run_backward(kernel(), compact, runner);

    const AttentionProblem fresh(spec);
    const FarTensor query(fresh.query, strides), key(fresh.key, strides),
        value(fresh.value, strides), out(fresh.out, strides), grad_out(fresh.grad_out, strides),
        grad_query(fresh.grad_query, strides), grad_key(fresh.grad_key, strides),
        grad_value(fresh.grad_value, strides);
    AttentionForwardParams forward = fresh.forward_params();
    forward.query = query.const_view();
    forward.key = key.const_view();
    forward.value = value.const_view();
    forward.out = out.view();
    AttentionBackwardParams backward = fresh.backward_params();
    backward.query = query.const_view();
    backward.key = key.const_view();
    backward.value = value.const_view();
    backward.out = out.const_view();
    backward.grad_out = grad_out.const_view();
    backward.grad_query = grad_query.view();
    backward.grad_key = grad_key.view();
    backward.grad_value = grad_value.view();
    std::unique_ptr<FarTensor> mask, grad_mask, key_padding;
    if (spec.mask.kind != AttentionMaskKind::kNone) {
      mask = std::make_unique<FarTensor>(fresh.mask, strides);
      forward.transform.mask.view = backward.transform.mask.view = mask->const_view();
      if (fresh.grad_mask) {
        grad_mask = std::make_unique<FarTensor>(fresh.grad_mask, strides);
        backward.grad_mask = grad_mask->view();
      }
    }
    if (fresh.key_padding) {
      key_padding = std::make_unique<FarTensor>(fresh.key_padding, strides);
      forward.transform.key_padding = backward.transform.key_padding = key_padding->const_view();
    }

    GuardedBuffer forward_workspace(kernel().attention_forward_workspace(forward, 1),
                                    GuardSide::kBack, 64);
    kernel().attention_forward(forward, runner, forward_workspace.data());
    EXPECT_EQ(out.values(), compact.out.values());
    EXPECT_EQ(fresh.logsumexp.values(), compact.logsumexp.values());
    GuardedBuffer backward_workspace(kernel().attention_backward_workspace(backward, 1),
                                     GuardSide::kBack, 64);
    kernel().attention_backward(backward, runner, backward_workspace.data());
    EXPECT_EQ(grad_query.values(), compact.grad_query.values());
    EXPECT_EQ(grad_key.values(), compact.grad_key.values());
    EXPECT_EQ(grad_value.values(), compact.grad_value.values());
    if (grad_mask) {
      EXPECT_EQ(grad_mask->values(), compact.grad_mask.values());
    }
  }

  void expect_same_with_masks(AttentionCase spec, const FarStrides& strides) const {
    for (const ScalarType dtype : {ScalarType::kFloat32, ScalarType::kFloat64,
                                   ScalarType::kBFloat16, ScalarType::kFloat16}) {
      spec.dtype = dtype;
      spec.mask.kind = AttentionMaskKind::kNone;
      spec.wants_grad_mask = false;
      expect_same(spec, strides);
      spec.key_padding = 0.3;
      spec.mask.kind = AttentionMaskKind::kBoolean;
      expect_same(spec, strides);
      spec.mask.kind = AttentionMaskKind::kAdditive;
      spec.wants_grad_mask = true;
      expect_same(spec, strides);
    }
  }
};

TEST_P(AttentionFarOffsets, BatchesAndHeads) {
  expect_same_with_masks(
      {.batch_sizes = {2, 1, 1, 1}, .query_heads = 2, .q_len = 20, .kv_len = 70, .head_dim = 12},
      {.batch = 4 * kFar, .head = kFar, .row = 128, .col = 1});
}

TEST_P(AttentionFarOffsets, Rows) {
  expect_same_with_masks({.query_heads = 2, .q_len = 6, .kv_len = 5, .head_dim = 8},
                         {.batch = 0, .head = 8 * kFar, .row = kFar, .col = 1});
}

TEST_P(AttentionFarOffsets, RowsOfDecode) {
  expect_same_with_masks({.query_heads = 2, .q_len = 2, .kv_len = 7, .head_dim = 20},
                         {.batch = 0, .head = 8 * kFar, .row = kFar, .col = 1});
}

TEST_P(AttentionFarOffsets, Columns) {
  expect_same_with_masks({.q_len = 6, .kv_len = 5, .head_dim = 4},
                         {.batch = 0, .head = 64, .row = 8, .col = kFar});
}

TORCH_EXT_TEST_EACH_ISA(AttentionFarOffsets);

}  // namespace
}  // namespace torch_ext::testing
