#include <algorithm>
#include <random>

#include "attention_case_list.h"

namespace torch_ext::testing {
namespace {

/// Draws that are the same with every standard library, unlike std::uniform_int_distribution.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : engine_(seed) {}

  /// Of [low, high].
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }

  template <typename T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<std::int64_t>(choices.size()) - 1)];
  }

  /// Lengths of all magnitudes up to `high`, short ones as likely as long ones.
  std::int64_t length(std::int64_t high) {
    std::int64_t limit = high;
    while (limit > 1 && one_in(2)) limit /= 2;
    return between(1, limit);
  }

 private:
  std::mt19937_64 engine_;
};

Layout random_layout(Draw& draw) {
  return static_cast<Layout>(draw.between(0, static_cast<std::int64_t>(Layout::kExpandedAll)));
}

Broadcast random_broadcast(Draw& draw) {
  return {.batch = draw.one_in(2),
          .heads = draw.one_in(2),
          .rows = draw.one_in(3),
          .cols = draw.one_in(5),
          .batch_dims = {draw.one_in(3), draw.one_in(3), draw.one_in(3), draw.one_in(3)}};
}

MaskSpec random_mask(Draw& draw, ScalarType dtype) {
  MaskSpec mask;
  mask.kind = draw.of(
      {AttentionMaskKind::kNone, AttentionMaskKind::kBoolean, AttentionMaskKind::kAdditive});
  if (mask.kind == AttentionMaskKind::kNone) return mask;
  mask.pattern =
      static_cast<MaskPattern>(draw.between(0, static_cast<std::int64_t>(MaskPattern::kHalfRows)));
  mask.dtype = draw.one_in(2) ? dtype
                              : draw.of({ScalarType::kFloat32, ScalarType::kFloat64,
                                         ScalarType::kBFloat16, ScalarType::kFloat16});
  mask.layout = random_layout(draw);
  mask.broadcast = random_broadcast(draw);
  mask.density = draw.of({0.05, 0.3, 0.7, 0.95});
  mask.window = draw.length(200);
  if (draw.one_in(4)) mask.excluded = -1e4;
  return mask;
}

AttentionCase random_case(Draw& draw) {
  AttentionCase spec;
  spec.dtype = draw.of(
      {ScalarType::kFloat32, ScalarType::kFloat64, ScalarType::kBFloat16, ScalarType::kFloat16});
  for (std::int64_t& size : spec.batch_sizes) size = draw.one_in(3) ? draw.between(1, 3) : 1;
  spec.kv_heads = draw.between(1, 3);
  spec.query_heads = spec.kv_heads * draw.of({1, 1, 2, 3, 5});
  spec.q_len = draw.length(200);
  spec.kv_len = draw.length(draw.one_in(12) ? 1500 : 300);
  spec.head_dim = draw.length(96);
  spec.value_dim = draw.one_in(3) ? draw.length(96) : spec.head_dim;
  // The reference takes about 10 ns per pair and column.
  while (spec.batch_sizes[0] * spec.batch_sizes[1] * spec.batch_sizes[2] * spec.batch_sizes[3] *
             spec.query_heads * spec.q_len * spec.kv_len * (spec.head_dim + spec.value_dim) >
         2'000'000) {
    spec.q_len = std::max<std::int64_t>(spec.q_len / 2, 1);
    spec.head_dim = std::max<std::int64_t>(spec.head_dim * 2 / 3, 1);
    spec.value_dim = std::max<std::int64_t>(spec.value_dim * 2 / 3, 1);
    if (spec.q_len == 1) spec.batch_sizes = {1, 1, 1, 1};
  }
  spec.layout = random_layout(draw);
  spec.grad_out_layout = random_layout(draw);
  spec.packed = draw.one_in(6);
  spec.guard = draw.one_in(2) ? GuardSide::kFront : GuardSide::kBack;
  if (draw.one_in(4)) spec.scale = draw.of({0.0, -0.4, 0.9});
  // Scores from those of a trained model to some that one key always wins.
  if (draw.one_in(3)) spec.magnitude = draw.of({3.0, 10.0, 30.0, 100.0, 1000.0});
  spec.mask = random_mask(draw, spec.dtype);
  if (draw.one_in(4)) {
    spec.key_padding = draw.of({0.1, 0.6, 1.0});
    spec.key_padding_shared = draw.one_in(2);
  }
  if (draw.one_in(3)) {
    spec.is_causal = true;
    spec.causal_offset = draw.of(
        {std::int64_t{0}, spec.kv_len - spec.q_len, draw.between(-spec.q_len, spec.kv_len)});
  }
  if (draw.one_in(4)) spec.dropout = draw.of({0.1, 0.5, 0.9});
  spec.seed = draw.between(1, 1 << 30);
  spec.has_grad_logsumexp = draw.one_in(3);
  spec.wants_grad_mask = spec.mask.kind == AttentionMaskKind::kAdditive && draw.one_in(2);
  return spec;
}

}  // namespace

CaseList random_cases(std::uint64_t seed, int count) {
  Draw draw(seed);
  CaseList cases;
  for (int i = 0; i < count; ++i) cases.push_back(random_case(draw));
  return cases;
}

}  // namespace torch_ext::testing
