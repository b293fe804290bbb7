// SimdPieces of one instruction set. Included inside its namespace and region, after the kernels'
// -inl.h files.

static void piece_exp2_float(int degree, const float* x, float* result) {
  const FloatVector v = load<float>(x);
  store<float>(result, degree == 3 ? exp2_vector<3>(v) : exp2_vector<5>(v));
}

static void piece_exp2_double(const double* x, double* result) {
  store<double>(result, exp2_vector(load<double>(x)));
}

static void piece_tanh_float(const float* x, float* result) {
  store<float>(result, tanh_vector(load<float>(x)));
}

static void piece_tanh_double(const double* x, double* result) {
  store<double>(result, tanh_vector(load<double>(x)));
}

static void piece_bf16_to_float(const std::uint16_t* bits, float* result) {
  store<float>(result, bf16_to_float(bits));
}

static void piece_float_to_bf16(const float* x, std::uint16_t* bits) {
  float_to_bf16(bits, load<float>(x));
}

static void piece_fp16_to_float(const std::uint16_t* bits, float* result) {
  store<float>(result, fp16_to_float(bits));
}

static void piece_float_to_fp16(const float* x, std::uint16_t* bits) {
  float_to_fp16(bits, load<float>(x));
}

static void piece_load_floats(const void* source, ScalarType type, std::int64_t stride,
                              std::int64_t count, float* result) {
  store<float>(result, load_elements<float>(source, type, stride, count));
}

static void piece_load_doubles(const void* source, ScalarType type, std::int64_t stride,
                               std::int64_t count, double* result) {
  store<double>(result, load_elements<double>(source, type, stride, count));
}

static void piece_store_floats(void* target, ScalarType type, std::int64_t stride,
                               std::int64_t count, const float* x) {
  store_elements<float>(target, type, stride, count, load<float>(x));
}

static void piece_store_doubles(void* target, std::int64_t stride, std::int64_t count,
                                const double* x) {
  store_elements<double>(target, ScalarType::kFloat64, stride, count, load<double>(x));
}

template <typename T>
static void piece_transpose(T* block) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vec<T> rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load<T>(block + i * kLanes);
  transpose<T>(rows);
  for (int i = 0; i < kLanes; ++i) store<T>(block + i * kLanes, rows[i]);
}

static void piece_reduce_rows(float* block, float* result) {
  FloatVector rows[kFloatLanes];
  for (int i = 0; i < kFloatLanes; ++i) rows[i] = load<float>(block + i * kFloatLanes);
  store<float>(result, reduce_rows<float>(rows));
}

static void piece_philox(std::uint32_t* counter, std::uint64_t seed) {
  Uint32Vector words[4];
  for (int i = 0; i < 4; ++i) words[i] = load<std::uint32_t>(counter + i * kFloatLanes);
  philox_vector(words, seed);
  for (int i = 0; i < 4; ++i) store<std::uint32_t>(counter + i * kFloatLanes, words[i]);
}

static void piece_dropout_bits_of_keys(std::uint16_t* bits, std::int64_t bits_stride,
                                       std::int64_t queries, std::int64_t keys,
                                       std::int64_t first_query, std::int64_t first_key,
                                       std::uint32_t slice, std::uint64_t seed) {
  dropout_bits_of_keys(bits, bits_stride, queries, keys, first_query, first_key, slice, seed);
}

template <typename Policy>
static void piece_contract(bool accumulate, std::int64_t rows, std::int64_t vectors,
                           std::int64_t depth, const typename Policy::Scalar* a,
                           std::int64_t row_stride, std::int64_t depth_stride,
                           const typename Policy::Scalar* b, std::int64_t b_stride,
                           typename Policy::Compute* c, std::int64_t c_stride) {
  const LeftOperand<Policy> left{a, row_stride, depth_stride};
  if (accumulate) {
    contract<Policy, true>(rows, vectors, depth, left, b, b_stride, c, c_stride);
  } else {
    contract<Policy, false>(rows, vectors, depth, left, b, b_stride, c, c_stride);
  }
}

#if defined(TORCH_EXT_HAS_BF16_DOT)
static void piece_pack_bf16_pairs(const float* low, const float* high, std::uint32_t* pairs) {
  store<std::uint32_t>(pairs, pack_bf16_pairs(load<float>(low), load<float>(high)));
}
#endif

static constexpr torch_ext::testing::SimdPieces make_simd_pieces() {
  return {
    .float_lanes = kFloatLanes, .double_lanes = kDoubleLanes, .max_vectors = kMaxVectors,
    .exp2_float = piece_exp2_float, .exp2_double = piece_exp2_double,
    .tanh_float = piece_tanh_float, .tanh_double = piece_tanh_double,
    .bf16_to_float = piece_bf16_to_float, .float_to_bf16 = piece_float_to_bf16,
    .fp16_to_float = piece_fp16_to_float, .float_to_fp16 = piece_float_to_fp16,
    .load_floats = piece_load_floats, .load_doubles = piece_load_doubles,
    .store_floats = piece_store_floats, .store_doubles = piece_store_doubles,
    .transpose_floats = piece_transpose<float>, .transpose_doubles = piece_transpose<double>,
    .reduce_rows = piece_reduce_rows, .philox = piece_philox,
    .dropout_bits_of_keys = piece_dropout_bits_of_keys,
    .contract_float = piece_contract<FloatContraction>,
    .contract_double = piece_contract<DoubleContraction>,
#if defined(TORCH_EXT_HAS_BF16_DOT)
    .contract_bf16_pairs = piece_contract<Bf16PairContraction>,
    .pack_bf16_pairs = piece_pack_bf16_pairs,
#else
    .contract_bf16_pairs = nullptr, .pack_bf16_pairs = nullptr,
#endif
  };
}
