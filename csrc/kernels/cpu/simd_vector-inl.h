// Compiler vector extensions, one width per instruction set: TORCH_EXT_VECTOR_BYTES. Included by
// the isa_*.cpp files inside their namespace and `#pragma GCC target` region; hence no std headers
// and no std templates here (their weak symbols would carry the region's instructions elsewhere).

#define TORCH_EXT_INLINE static inline __attribute__((always_inline))

typedef float FloatVector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES)));
typedef std::int32_t Int32Vector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES)));
typedef std::uint32_t Uint32Vector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES)));
typedef std::int64_t Int64Vector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES)));

// Loads and stores go through these: any address, any declared type behind it.
typedef float UnalignedFloatVector
    __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES), aligned(1), may_alias));
typedef double UnalignedDoubleVector
    __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES), aligned(1), may_alias));
typedef std::uint32_t UnalignedUint32Vector
    __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES), aligned(1), may_alias));

constexpr int kFloatLanes = TORCH_EXT_VECTOR_BYTES / 4;
constexpr int kDoubleLanes = TORCH_EXT_VECTOR_BYTES / 8;

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  using Vector = FloatVector;
  using Unaligned = UnalignedFloatVector;
  using IntVector = Int32Vector;
  using Int = std::int32_t;
  static constexpr int kLanes = kFloatLanes;
};

template <>
struct Simd<double> {
  using Vector = DoubleVector;
  using Unaligned = UnalignedDoubleVector;
  using IntVector = Int64Vector;
  using Int = std::int64_t;
  static constexpr int kLanes = kDoubleLanes;
};

template <>
struct Simd<std::uint32_t> {
  using Vector = Uint32Vector;
  using Unaligned = UnalignedUint32Vector;
  using IntVector = Int32Vector;
  using Int = std::int32_t;
  static constexpr int kLanes = kFloatLanes;
};

template <typename T>
using Vec = typename Simd<T>::Vector;

constexpr float kLog2e = 1.44269504088896340736f;
constexpr double kLog2eDouble = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

template <typename T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <typename T>
TORCH_EXT_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

/// Unaligned; workspace addresses are aligned and pay nothing for it.
template <typename T>
TORCH_EXT_INLINE Vec<T> load(const void* source) {
  return *static_cast<const typename Simd<T>::Unaligned*>(source);
}

template <typename T>
TORCH_EXT_INLINE void store(void* target, Vec<T> x) {
  *static_cast<typename Simd<T>::Unaligned*>(target) = x;
}

/// Picks b where either is NaN, so a constant first keeps a NaN second.
template <typename V>
TORCH_EXT_INLINE V vector_max(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
TORCH_EXT_INLINE V vector_min(V a, V b) {
  return a < b ? a : b;
}

/// Without its sign.
template <typename T>
TORCH_EXT_INLINE Vec<T> absolute(Vec<T> x) {
  using Int = typename Simd<T>::Int;
  using IntVector = typename Simd<T>::IntVector;
  return (Vec<T>)((IntVector)x &
                  static_cast<Int>(sizeof(T) == 4 ? 0x7FFFFFFF : 0x7FFFFFFFFFFFFFFF));
}

/// x itself, rounded to its type: the compiler may not fuse the product that made it with a sum
/// that takes it. Where a difference of two such products has to be exactly 0.
template <typename V>
TORCH_EXT_INLINE V rounded(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__) && TORCH_EXT_VECTOR_BYTES <= 32
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

TORCH_EXT_INLINE std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
TORCH_EXT_INLINE std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
TORCH_EXT_INLINE std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

/// 0, 1, 2, ...
template <typename T>
TORCH_EXT_INLINE typename Simd<T>::IntVector lane_index() {
  typename Simd<T>::IntVector lanes;
  for (int lane = 0; lane < Simd<T>::kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

/// The same numbers as T.
template <typename T>
TORCH_EXT_INLINE Vec<T> lane_numbers() {
  return __builtin_convertvector(lane_index<T>(), Vec<T>);
}

template <typename V>
TORCH_EXT_INLINE bool any_lane(V mask) {
#if TORCH_EXT_VECTOR_BYTES == 64 && defined(TORCH_EXT_HAS_AVX512)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif TORCH_EXT_VECTOR_BYTES == 32 && defined(TORCH_EXT_HAS_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  typedef std::int64_t Words __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES)));
  const Words words = (Words)mask;
  std::int64_t any = 0;
  for (int i = 0; i < TORCH_EXT_VECTOR_BYTES / 8; ++i) any |= words[i];
  return any != 0;
#endif
}

template <typename T>
TORCH_EXT_INLINE T horizontal_sum(Vec<T> x) {
  T sum = 0;
  for (int lane = 0; lane < Simd<T>::kLanes; ++lane) sum += x[lane];
  return sum;
}

template <typename T>
TORCH_EXT_INLINE T horizontal_max(Vec<T> x) {
  T best = x[0];
  for (int lane = 1; lane < Simd<T>::kLanes; ++lane) best = x[lane] > best ? x[lane] : best;
  return best;
}

// 2^x for x <= 0 or so: round to the nearest integer by adding 1.5 * 2^23 (and the exponent's bias
// of 127), a minimax polynomial on [-1/2, 1/2] (relative error 9.1e-8 in degree 5, 7.5e-5 in degree
// 3), times the power of two of those bits. Below -125 it stays at 2^-125; callers that need zeros
// select them. NaN stays NaN: adding to the exponent bits instead would lose those with a payload,
// as uninitialised memory holds.
template <int kDegree>
TORCH_EXT_INLINE FloatVector exp2_polynomial(FloatVector f);

// The best one whose value at 0 is 1: a lone key has the weight 1. A free constant's 7.5e-8 end as
// more, it is rounded to 1 + 1.2e-7.
template <>
inline __attribute__((always_inline)) FloatVector exp2_polynomial<5>(FloatVector f) {
  FloatVector p = 1.32647276305018269e-3f * f + 9.67151264624137647e-3f;
  p = p * f + 5.5507337417511696e-2f;
  p = p * f + 2.40222420852583723e-1f;
  p = p * f + 6.93146977600289087e-1f;
  return p * f + 1.0f;
}

// A weight that is rounded to bf16 (2^-9) next needs no more.
template <>
inline __attribute__((always_inline)) FloatVector exp2_polynomial<3>(FloatVector f) {
  FloatVector p = 5.51716690926116623e-2f * f + 2.42611122223753236e-1f;
  p = p * f + 6.93260985454245729e-1f;
  return p * f + 9.99928073535159659e-1f;
}

/// 2^(x * factor), the product of infinite precision where there is a fused multiply-add; not below
/// -125.
template <int kDegree = 5>
TORCH_EXT_INLINE FloatVector exp2_product(FloatVector x, FloatVector factor) {
  const FloatVector bits = x * factor + 12583039.0f;
  const FloatVector f = x * factor - (bits - 12583039.0f);
  return exp2_polynomial<kDegree>(f) * (FloatVector)((Int32Vector)bits << 23);
}

template <int kDegree = 5>
TORCH_EXT_INLINE FloatVector exp2_vector(FloatVector x) {
  return exp2_product<kDegree>(vector_max(broadcast(-125.0f), x), broadcast(1.0f));
}

// Degree 11: relative error 3e-18, so double rounding is all that is left.
template <int kDegree = 11>
TORCH_EXT_INLINE DoubleVector exp2_product(DoubleVector x, DoubleVector factor) {
  const DoubleVector bits = x * factor + 6755399441056767.0;  // 1.5 * 2^52 + 1023
  const DoubleVector f = x * factor - (bits - 6755399441056767.0);
  DoubleVector p = 4.43528094461033616e-10 * f + 7.07410562624565937e-9;
  p = p * f + 1.01781980333285277e-7;
  p = p * f + 1.3215433089594629e-6;
  p = p * f + 1.52527334899608046e-5;
  p = p * f + 1.5403530462514613e-4;
  p = p * f + 1.33335581467899503e-3;
  p = p * f + 9.61812910758833508e-3;
  p = p * f + 5.55041086648199215e-2;
  p = p * f + 2.40226506959101562e-1;
  p = p * f + 6.9314718055994533e-1;
  p = p * f + 1.0;
  return p * (DoubleVector)((Int64Vector)bits << 52);
}

template <int kDegree = 11>
TORCH_EXT_INLINE DoubleVector exp2_vector(DoubleVector x) {
  return exp2_product<kDegree>(vector_max(broadcast(-1021.0), x), broadcast(1.0));
}

// Butterfly index masks of a lane-by-lane transpose: at distance h, lanes with bit h clear come
// from the first operand, the others from the second.
template <typename T, int kDistance, bool kUpper>
TORCH_EXT_INLINE typename Simd<T>::IntVector butterfly_mask() {
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::IntVector mask{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool second = (lane & kDistance) != 0;
    mask[lane] = kUpper ? (second ? kLanes + lane : lane + kDistance)
                        : (second ? kLanes + lane - kDistance : lane);
  }
  return mask;
}

template <typename T, int kDistance>
TORCH_EXT_INLINE void transpose_step(Vec<T>* rows) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kDistance) == 0) {
      const Vec<T> a = rows[i];
      const Vec<T> b = rows[i + kDistance];
      rows[i] = __builtin_shuffle(a, b, butterfly_mask<T, kDistance, false>());
      rows[i + kDistance] = __builtin_shuffle(a, b, butterfly_mask<T, kDistance, true>());
    }
  }
}

/// Transposes a kLanes x kLanes block held in registers.
template <typename T>
TORCH_EXT_INLINE void transpose(Vec<T>* rows) {
  if constexpr (Simd<T>::kLanes > 8) transpose_step<T, 8>(rows);
  if constexpr (Simd<T>::kLanes > 4) transpose_step<T, 4>(rows);
  if constexpr (Simd<T>::kLanes > 2) transpose_step<T, 2>(rows);
  transpose_step<T, 1>(rows);
}

template <typename T, int kDistance>
TORCH_EXT_INLINE void reduce_step(Vec<T>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kDistance; ++i) {
    const Vec<T> a = rows[i];
    const Vec<T> b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, butterfly_mask<T, kDistance, false>()) +
              __builtin_shuffle(a, b, butterfly_mask<T, kDistance, true>());
  }
}

/// Lane i of the result is the sum over the lanes of rows[i]; clobbers rows.
template <typename T>
TORCH_EXT_INLINE Vec<T> reduce_rows(Vec<T>* rows) {
  if constexpr (Simd<T>::kLanes > 8) reduce_step<T, 8>(rows);
  if constexpr (Simd<T>::kLanes > 4) reduce_step<T, 4>(rows);
  if constexpr (Simd<T>::kLanes > 2) reduce_step<T, 2>(rows);
  reduce_step<T, 1>(rows);
  return rows[0];
}
