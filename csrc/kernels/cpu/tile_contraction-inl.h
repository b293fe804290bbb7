// The one micro-kernel behind all seven products of attention:
//   C[i][lanes] (+)= sum over k of A(i, k) * B[k][lanes],
// with A's scalars broadcast from wherever they lie and B and C rows of vectors. A contraction
// policy says what one step consumes: a float, a double, or a pair of bf16. The sum starts from 0
// and is then added: a sum over thousands of keys comes in blocks, and its error grows with the
// length of a block and the number of them, not with their product.

struct FloatContraction {
  using Compute = float;  // accumulators, softmax
  using Scalar = float;   // an element of A and of B's rows
  static constexpr int kDepth = 1;
  static constexpr int kForwardExp2Degree = 5;
  TORCH_EXT_INLINE void step(FloatVector& sum, float a, FloatVector b) { sum += a * b; }
  TORCH_EXT_INLINE void step(FloatVector& sum, FloatVector a, FloatVector b) { sum += a * b; }
};

struct DoubleContraction {
  using Compute = double;
  using Scalar = double;
  static constexpr int kDepth = 1;
  static constexpr int kForwardExp2Degree = 11;
  TORCH_EXT_INLINE void step(DoubleVector& sum, double a, DoubleVector b) { sum += a * b; }
  TORCH_EXT_INLINE void step(DoubleVector& sum, DoubleVector a, DoubleVector b) { sum += a * b; }
};

#if defined(TORCH_EXT_HAS_BF16_DOT)
// A scalar is two neighbours in the contracted dimension, the lower half first.
struct Bf16PairContraction {
  using Compute = float;
  using Scalar = std::uint32_t;
  static constexpr int kDepth = 2;
  static constexpr int kForwardExp2Degree = 3;
  TORCH_EXT_INLINE void step(FloatVector& sum, std::uint32_t a, Uint32Vector b) {
    sum = bf16_pair_dot(sum, a - Uint32Vector{}, b);
  }
  TORCH_EXT_INLINE void step(FloatVector& sum, Uint32Vector a, Uint32Vector b) {
    sum = bf16_pair_dot(sum, a, b);
  }
};
#endif

/// Where A(i, k) lies: data[i * row_stride + k * depth_stride], in scalars.
template <typename Policy>
struct LeftOperand {
  const typename Policy::Scalar* data;
  std::int64_t row_stride;
  std::int64_t depth_stride;
  bool far = false;  // in the caller's tensor: likely not in the first-level cache yet
};

typedef std::uint32_t UnalignedUint32 __attribute__((aligned(1), may_alias));
typedef float UnalignedFloat __attribute__((aligned(1), may_alias));
typedef double UnalignedDouble __attribute__((aligned(1), may_alias));
TORCH_EXT_INLINE float load_scalar(const float* p) { return *(const UnalignedFloat*)p; }
TORCH_EXT_INLINE double load_scalar(const double* p) { return *(const UnalignedDouble*)p; }
TORCH_EXT_INLINE std::uint32_t load_scalar(const std::uint32_t* p) {
  return *(const UnalignedUint32*)p;
}

/// kRows x kVectors accumulators stay in registers for the whole depth.
template <typename Policy, int kRows, int kVectors, bool kAccumulate>
TORCH_EXT_INLINE void contract_tile(std::int64_t depth, LeftOperand<Policy> left,
                                    const typename Policy::Scalar* right, std::int64_t right_stride,
                                    typename Policy::Compute* out, std::int64_t out_stride) {
  using Compute = typename Policy::Compute;
  using Scalar = typename Policy::Scalar;
  constexpr int kLanes = Simd<Compute>::kLanes;
  Vec<Compute> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = Vec<Compute>{};
    }
  }
  const Scalar* a = left.data;
  const std::int64_t row_stride = left.row_stride;
#pragma GCC unroll 1
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec<Scalar> b[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) b[j] = load<Scalar>(right + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Scalar scalar = load_scalar(a + i * row_stride);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) Policy::step(sum[i][j], scalar, b[j]);
    }
    a += left.depth_stride;
    right += right_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Compute* const target = out + i * out_stride + j * kLanes;
      store<Compute>(target, kAccumulate ? load<Compute>(target) + sum[i][j] : sum[i][j]);
    }
  }
}

// Accumulators per tile: enough chains for two FMA ports x 4 cycles latency, within the register
// file. 12 of 16 registers without AVX-512, 16 of 32 with it (8 x 2 measured at 100% of peak).
#if TORCH_EXT_VECTOR_BYTES == 64
constexpr int kMaxVectors = 2;
template <int kVectors>
constexpr int kTileRows = kVectors == 2 ? 8 : 16;
#else
constexpr int kMaxVectors = 3;
template <int kVectors>
constexpr int kTileRows = kVectors == 1 ? 8 : 4;
#endif

/// Asks for the part of A that the next tile of rows reads. A's scalars come four or eight rows
/// abreast, a pattern that the hardware prefetchers miss.
template <typename Policy, int kRows>
TORCH_EXT_INLINE void prefetch_next_rows(const LeftOperand<Policy>& left, std::int64_t depth) {
  constexpr std::int64_t kLine = 64;
  constexpr std::int64_t kLineScalars = kLine / sizeof(typename Policy::Scalar);
  if (!left.far) return;
  if (left.depth_stride == 1) {
    for (int i = 0; i < kRows; ++i) {
      const typename Policy::Scalar* row = left.data + (kRows + i) * left.row_stride;
      for (std::int64_t k = 0; k < depth; k += kLineScalars) __builtin_prefetch(row + k, 0, 3);
    }
  } else if (left.row_stride == 1) {
    // The next rows lie in the same cache lines but for every fourth time or so.
    const std::int64_t offset = reinterpret_cast<std::intptr_t>(left.data) % kLine;
    if (offset + kRows * kLine / kLineScalars < kLine) return;
    for (std::int64_t k = 0; k < depth; ++k) {
      __builtin_prefetch(left.data + kLineScalars + k * left.depth_stride, 0, 3);
    }
  }
}

/// One column group: `rows` x (kVectors * lanes), tails by halving the tile.
template <typename Policy, int kVectors, bool kAccumulate, int kRows = kTileRows<kVectors>>
TORCH_EXT_INLINE void contract_rows(std::int64_t rows, std::int64_t depth, LeftOperand<Policy> left,
                                    const typename Policy::Scalar* right, std::int64_t right_stride,
                                    typename Policy::Compute* out, std::int64_t out_stride) {
  while (rows >= kRows) {
    if constexpr (kRows >= 4) prefetch_next_rows<Policy, kRows>(left, depth);
    contract_tile<Policy, kRows, kVectors, kAccumulate>(depth, left, right, right_stride, out,
                                                        out_stride);
    left.data += kRows * left.row_stride;
    out += kRows * out_stride;
    rows -= kRows;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) {
      contract_rows<Policy, kVectors, kAccumulate, kRows / 2>(rows, depth, left, right,
                                                              right_stride, out, out_stride);
    }
  }
}

/// C (rows, vectors * lanes) (+)= A (rows, depth) B (depth, vectors * lanes).
template <typename Policy, bool kAccumulate>
static __attribute__((noinline)) void contract(std::int64_t rows, std::int64_t vectors,
                                               std::int64_t depth, LeftOperand<Policy> left,
                                               const typename Policy::Scalar* right,
                                               std::int64_t right_stride,
                                               typename Policy::Compute* out,
                                               std::int64_t out_stride) {
  constexpr int kLanes = Simd<typename Policy::Compute>::kLanes;
  while (vectors >= kMaxVectors) {
    contract_rows<Policy, kMaxVectors, kAccumulate>(rows, depth, left, right, right_stride, out,
                                                    out_stride);
    right += kMaxVectors * kLanes;
    out += kMaxVectors * kLanes;
    vectors -= kMaxVectors;
  }
  if constexpr (kMaxVectors > 2) {
    if (vectors == 2) {
      contract_rows<Policy, 2, kAccumulate>(rows, depth, left, right, right_stride, out,
                                            out_stride);
    }
  }
  if (vectors == 1) {
    contract_rows<Policy, 1, kAccumulate>(rows, depth, left, right, right_stride, out, out_stride);
  }
}
