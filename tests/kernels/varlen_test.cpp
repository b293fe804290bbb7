// Packed sequences and pages on every instruction set: each sequence has the bits of a dense call
// of its own, pages have the bits of packed rows, and stored numbers are read exactly.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/reference/element_access.h"
#include "kernels/varlen_sequences.h"
#include "kernels_under_test.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

class VectorWorkspace final : public Workspace {
 public:
  void* allocate(std::size_t bytes) const override {
    memory_.resize(bytes + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    return memory_.data() + (64 - address % 64) % 64;
  }

 private:
  mutable std::vector<char> memory_;
};

/// A tensor (rows, heads, columns) of random numbers.
struct Rows {
  std::vector<char> bytes;
  std::int64_t heads;
  std::int64_t columns;
  ScalarType type;

  Rows(std::int64_t rows, std::int64_t heads, std::int64_t columns, ScalarType type, unsigned seed)
      : bytes(static_cast<std::size_t>(rows * heads * columns) * element_size(type)),
        heads(heads),
        columns(columns),
        type(type) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < rows * heads * columns; ++i) {
      reference::store_element(bytes.data(), i, type, seed == 0 ? 0.0 : normal(random));
    }
  }

  template <typename View>
  View view(decltype(View::data) data) const {
    View result;
    result.data = data;
    result.row_stride = heads * columns;
    result.head_stride = columns;
    result.col_stride = 1;
    return result;
  }
  ConstStridedView view() const { return view<ConstStridedView>(bytes.data()); }
  StridedView mutable_view() { return view<StridedView>(bytes.data()); }
};

struct Lengths {
  std::vector<std::int64_t> first_query{0};
  std::vector<std::int64_t> first_key{0};

  void add(std::int64_t q_len, std::int64_t kv_len) {
    first_query.push_back(first_query.back() + q_len);
    first_key.push_back(first_key.back() + kv_len);
  }
  VarlenSequences sequences() const {
    return {.count = static_cast<std::int64_t>(first_query.size()) - 1,
            .first_query = first_query.data(),
            .first_key = first_key.data()};
  }
};

constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kHeadDim = 40;
constexpr std::int64_t kValueDim = 24;

Lengths ragged_lengths() {
  Lengths lengths;
  for (const auto& [q_len, kv_len] : std::vector<std::pair<int, int>>{
           {70, 70}, {1, 300}, {0, 5}, {2, 1100}, {33, 20}, {130, 200}, {3, 0}}) {
    lengths.add(q_len, kv_len);
  }
  return lengths;
}

struct Forward {
  Lengths lengths = ragged_lengths();
  ScalarType dtype;
  Rows query, key, value, out;
  std::vector<double> logsumexp;
  std::vector<double> sink = std::vector<double>(kHeads, 0.0);

  explicit Forward(ScalarType dtype)
      : dtype(dtype),
        query(lengths.first_query.back(), kHeads, kHeadDim, dtype, 1),
        key(lengths.first_key.back(), kKvHeads, kHeadDim, dtype, 2),
        value(lengths.first_key.back(), kKvHeads, kValueDim, dtype, 3),
        out(lengths.first_query.back(), kHeads, kValueDim, dtype, 0),
        logsumexp(static_cast<std::size_t>(kHeads * lengths.first_query.back())) {}

  AttentionForwardParams params() {
    return {
        .dtype = dtype,
        .shape = {.query_heads = kHeads,
                  .kv_heads = kKvHeads,
                  .head_dim = kHeadDim,
                  .value_dim = kValueDim},
        .query = query.view(),
        .key = key.view(),
        .value = value.view(),
        .out = out.mutable_view(),
        .logsumexp = logsumexp.data(),
        .logsumexp_head_stride = lengths.first_query.back(),
        .transform = {
            .scale = 0.2, .softcap = 5.0, .window = {.left = 90, .right = 0}, .sink = sink.data()}};
  }
};

class Varlen : public KernelTest {
 protected:
  void run_alone(const AttentionForwardParams& call, const VarlenSequences& sequences) const {
    for (std::int64_t index = 0; index < sequences.count; ++index) {
      const AttentionForwardParams params = sequence_params(call, sequences, index);
      if (params.shape.q_len == 0) continue;
      const SerialTaskRunner runner;
      const VectorWorkspace workspace;
      kernel().attention_forward(
          params, runner, workspace.allocate(kernel().attention_forward_workspace(params, 1)));
    }
  }
};

constexpr ScalarType kTypes[] = {ScalarType::kFloat32, ScalarType::kFloat64, ScalarType::kBFloat16,
                                 ScalarType::kFloat16};

TEST_P(Varlen, ForwardHasTheBitsOfDenseCalls) {
  for (const ScalarType dtype : kTypes) {
    Forward alone(dtype);
    Forward packed(dtype);
    run_alone(alone.params(), alone.lengths.sequences());
    kernel().varlen_forward(packed.params(), packed.lengths.sequences(), ThreadTaskRunner(3),
                            VectorWorkspace());
    EXPECT_EQ(alone.out.bytes, packed.out.bytes);
    EXPECT_EQ(alone.logsumexp, packed.logsumexp);
  }
}

TEST_P(Varlen, BackwardHasTheBitsOfDenseCalls) {
  for (const ScalarType dtype : kTypes) {
    Forward forward(dtype);
    const VarlenSequences sequences = forward.lengths.sequences();
    kernel().varlen_forward(forward.params(), sequences, SerialTaskRunner(), VectorWorkspace());
    const Rows grad_out(forward.lengths.first_query.back(), kHeads, kValueDim, dtype, 4);
    struct Gradients {
      Rows query, key, value;
      std::vector<double> sink;
    };
    const auto empty = [&] {
      return Gradients{Rows(forward.lengths.first_query.back(), kHeads, kHeadDim, dtype, 0),
                       Rows(forward.lengths.first_key.back(), kKvHeads, kHeadDim, dtype, 0),
                       Rows(forward.lengths.first_key.back(), kKvHeads, kValueDim, dtype, 0),
                       std::vector<double>(static_cast<std::size_t>(kHeads * sequences.count))};
    };
    const AttentionForwardParams call = forward.params();
    const auto params_of = [&](Gradients& gradients) {
      return AttentionBackwardParams{.dtype = dtype,
                                     .shape = call.shape,
                                     .query = call.query,
                                     .key = call.key,
                                     .value = call.value,
                                     .out = forward.out.view(),
                                     .grad_out = grad_out.view(),
                                     .logsumexp = forward.logsumexp.data(),
                                     .logsumexp_head_stride = call.logsumexp_head_stride,
                                     .grad_query = gradients.query.mutable_view(),
                                     .grad_key = gradients.key.mutable_view(),
                                     .grad_value = gradients.value.mutable_view(),
                                     .grad_sink = gradients.sink.data(),
                                     .transform = call.transform};
    };
    Gradients alone = empty();
    Gradients packed = empty();
    for (std::int64_t index = 0; index < sequences.count; ++index) {
      const AttentionBackwardParams params = sequence_params(params_of(alone), sequences, index);
      const VectorWorkspace workspace;
      kernel().attention_backward(
          params, SerialTaskRunner(),
          workspace.allocate(kernel().attention_backward_workspace(params, 1)));
    }
    kernel().varlen_backward(params_of(packed), sequences, ThreadTaskRunner(3), VectorWorkspace());
    EXPECT_EQ(alone.query.bytes, packed.query.bytes);
    EXPECT_EQ(alone.key.bytes, packed.key.bytes);
    EXPECT_EQ(alone.value.bytes, packed.value.bytes);
    EXPECT_EQ(alone.sink, packed.sink);
  }
}

/// The rows of every sequence in pages of their own, in another order.
struct Pages {
  std::vector<std::int32_t> table;
  std::vector<std::int64_t> first;
  std::vector<std::int64_t> used;
  std::int64_t columns = 0;
  std::int64_t count = 0;

  Pages(const Lengths& lengths, std::int64_t page_size) {
    const std::int64_t sequences = static_cast<std::int64_t>(lengths.first_key.size()) - 1;
    for (std::int64_t i = 0; i < sequences; ++i) {
      used.push_back(lengths.first_key[i + 1] - lengths.first_key[i]);
      columns = std::max(columns, (used.back() + page_size - 1) / page_size);
    }
    first.assign(static_cast<std::size_t>(sequences), 0);
    table.assign(static_cast<std::size_t>(sequences * columns), -1);
    for (std::int64_t i = sequences - 1; i >= 0; --i) {
      for (std::int64_t page = 0; page * page_size < used[i]; ++page) {
        table[i * columns + page] = static_cast<std::int32_t>(count++);
      }
    }
  }

  Rows filled(const Rows& rows, const Lengths& lengths, std::int64_t page_size) const {
    Rows cache(count * page_size, rows.heads, rows.columns, rows.type, 0);
    const std::size_t size =
        static_cast<std::size_t>(rows.heads * rows.columns) * element_size(rows.type);
    for (std::size_t i = 0; i < used.size(); ++i) {
      for (std::int64_t row = 0; row < used[i]; ++row) {
        const std::int64_t page = table[i * columns + row / page_size];
        std::memcpy(cache.bytes.data() + (page * page_size + row % page_size) * size,
                    rows.bytes.data() + (lengths.first_key[i] + row) * size, size);
      }
    }
    return cache;
  }
};

TEST_P(Varlen, PagesHaveTheBitsOfPackedRows) {
  for (const ScalarType dtype : kTypes) {
    for (const std::int64_t page_size : {1, 7, 16, 64, 80}) {
      Forward packed(dtype);
      Forward paged(dtype);
      kernel().varlen_forward(packed.params(), packed.lengths.sequences(), SerialTaskRunner(),
                              VectorWorkspace());
      const Pages pages(paged.lengths, page_size);
      const Rows key = pages.filled(paged.key, paged.lengths, page_size);
      const Rows value = pages.filled(paged.value, paged.lengths, page_size);
      AttentionForwardParams params = paged.params();
      params.key = key.view();
      params.value = value.view();
      params.pages = {.page_size = page_size,
                      .key_page_stride = page_size * kKvHeads * kHeadDim,
                      .value_page_stride = page_size * kKvHeads * kValueDim};
      VarlenSequences sequences = paged.lengths.sequences();
      sequences.first_key = pages.first.data();
      sequences.used_keys = pages.used.data();
      sequences.block_table = pages.table.data();
      sequences.table_stride = pages.columns;
      kernel().varlen_forward(params, sequences, ThreadTaskRunner(2), VectorWorkspace());
      EXPECT_EQ(packed.out.bytes, paged.out.bytes) << page_size;
      EXPECT_EQ(packed.logsumexp, paged.logsumexp) << page_size;
    }
  }
}

TEST_P(Varlen, StoredBytesAreReadExactly) {
  // One query that attends to one key: out is the value, whatever reads it.
  constexpr std::int64_t kBytes = 256;
  for (const ScalarType stored : {ScalarType::kInt8, ScalarType::kFloat8E4M3}) {
    for (const std::int64_t q_len : {1, 40}) {
      std::vector<std::uint8_t> cache(kBytes);
      std::iota(cache.begin(), cache.end(), std::uint8_t{0});
      std::vector<float> query(static_cast<std::size_t>(q_len * kBytes), 0.0f);
      std::vector<float> out(query.size(), -1.0f);
      const std::vector<std::int64_t> first_query{0, q_len};
      const std::vector<std::int64_t> first_key{0};
      const std::vector<std::int64_t> used{1};
      const std::int32_t table = 0;
      const float one = 1.0f;
      AttentionForwardParams params{
          .shape = {.head_dim = kBytes, .value_dim = kBytes},
          .query = {.data = query.data(), .row_stride = kBytes, .col_stride = 1},
          .key = {.data = cache.data(), .row_stride = kBytes, .col_stride = 1},
          .value = {.data = cache.data(), .row_stride = kBytes, .col_stride = 1},
          .out = {.data = out.data(), .row_stride = kBytes, .col_stride = 1},
          .pages = {.page_size = 1, .key_page_stride = kBytes, .value_page_stride = kBytes},
          .stored_type = stored};
      // A key of zeros: NaN among the bytes of float8 would make NaN of the score.
      const std::vector<std::uint8_t> zeros(kBytes);
      params.key.data = zeros.data();
      VarlenSequences sequences{.count = 1,
                                .first_query = first_query.data(),
                                .first_key = first_key.data(),
                                .used_keys = used.data(),
                                .block_table = &table,
                                .table_stride = 1,
                                .key_scales = &one,
                                .value_scales = &one};
      kernel().varlen_forward(params, sequences, SerialTaskRunner(), VectorWorkspace());
      for (std::int64_t i = 0; i < kBytes; ++i) {
        double expected = static_cast<std::int8_t>(i);
        if (stored == ScalarType::kFloat8E4M3) {
          const int exponent = static_cast<int>(i >> 3 & 15);
          const int mantissa = static_cast<int>(i & 7);
          const double magnitude =
              exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
          expected = (i & 0x80) != 0 ? -magnitude : magnitude;
          if ((i & 0x7F) == 0x7F) {
            EXPECT_TRUE(std::isnan(out[i])) << i;
            continue;
          }
        }
        EXPECT_EQ(out[i], expected) << i;
        EXPECT_EQ(out[(q_len - 1) * kBytes + i], expected) << i;
      }
    }
  }
}

TORCH_EXT_TEST_EACH_ISA(Varlen);

}  // namespace
}  // namespace torch_ext::testing
