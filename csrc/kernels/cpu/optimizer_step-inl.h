// AdamW, Adam and SGD over a list of tensors: normalise, clip, update, master weights and the reset
// of the accumulators in one pass. The numbers are torch.optim's with fused=True, to rounding.

// Elements at a time: up to six staged operands stay in the first-level cache.
constexpr std::int64_t kStepBlock = 1024;

TORCH_EXT_INLINE FloatVector vector_sqrt(FloatVector x) {
#if defined(TORCH_EXT_HAS_AVX512)
  return (FloatVector)_mm512_sqrt_ps((__m512)x);
#elif defined(TORCH_EXT_HAS_AVX2)
  return (FloatVector)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__) && TORCH_EXT_VECTOR_BYTES == 16
  return (FloatVector)_mm_sqrt_ps((__m128)x);
#else
  for (int lane = 0; lane < kFloatLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

TORCH_EXT_INLINE DoubleVector vector_sqrt(DoubleVector x) {
#if defined(TORCH_EXT_HAS_AVX512)
  return (DoubleVector)_mm512_sqrt_pd((__m512d)x);
#elif defined(TORCH_EXT_HAS_AVX2)
  return (DoubleVector)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__) && TORCH_EXT_VECTOR_BYTES == 16
  return (DoubleVector)_mm_sqrt_pd((__m128d)x);
#else
  for (int lane = 0; lane < kDoubleLanes; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
#endif
}

// Operands of an entry in the order of its StridedLoop.
enum AdamOperand {
  kAdamParam,
  kAdamGrad,
  kAdamExpAvg,
  kAdamExpAvgSq,
  kAdamMax,
  kAdamMaster,
  kAdamOperands
};
enum SgdOperand { kSgdParam, kSgdGrad, kSgdMomentum, kSgdMaster, kSgdOperands };

struct StepOperand {
  void* data;
  ScalarType type;
  bool read;
  bool written;
};

template <typename T>
struct AdamMath {
  static constexpr int kOperands = kAdamOperands;
  static constexpr int kParam = kAdamParam;
  static constexpr int kGrad = kAdamGrad;
  static constexpr int kMaster = kAdamMaster;
  T coefficient;  // negative to maximize
  T decay;        // decoupled: the parameter's factor; else what is added to the
                  // gradient
  T average_weight;
  T square_decay;
  T square_weight;
  T inverse_bias_correction2_sqrt;
  T eps;
  T negative_step_size;
  bool decoupled;
  bool amsgrad;

  template <bool kDecoupled, bool kAmsgrad>
  TORCH_EXT_INLINE void vectors(const AdamMath& math, std::int64_t count, T* const* operand) {
    constexpr int kLanes = Simd<T>::kLanes;
    T* const weights = operand[kAdamMaster] != nullptr ? operand[kAdamMaster] : operand[kAdamParam];
    const T* const grads = operand[kAdamGrad];
    T* const averages = operand[kAdamExpAvg];
    T* const squares = operand[kAdamExpAvgSq];
    // torch's lerp: from the nearer end.
    const bool from_average = math.average_weight < T(0.5);
    const T lerp_weight = from_average ? math.average_weight : math.average_weight - 1;
    for (std::int64_t i = 0; i < count; i += kLanes) {
      Vec<T> weight = load<T>(weights + i);
      Vec<T> grad = load<T>(grads + i) * math.coefficient;
      if constexpr (kDecoupled) {
        weight *= math.decay;
      } else {
        grad += weight * math.decay;
      }
      Vec<T> average = load<T>(averages + i);
      average = (from_average ? average : grad) + lerp_weight * (grad - average);
      const Vec<T> square =
          load<T>(squares + i) * math.square_decay + math.square_weight * grad * grad;
      store<T>(averages + i, average);
      store<T>(squares + i, square);
      Vec<T> largest = square;
      if constexpr (kAmsgrad) {
        const Vec<T> before = load<T>(operand[kAdamMax] + i);
        largest = vector_max(before, square);
        largest = before == before ? largest : before;
        store<T>(operand[kAdamMax] + i, largest);
      }
      const Vec<T> denominator =
          vector_sqrt(largest) * math.inverse_bias_correction2_sqrt + math.eps;
      store<T>(weights + i, weight + math.negative_step_size * average / denominator);
    }
  }

  /// `count` elements, a multiple of kLanes.
  void operator()(std::int64_t count, T* const* operand) const {
    if (decoupled) {
      amsgrad ? vectors<true, true>(*this, count, operand)
              : vectors<true, false>(*this, count, operand);
    } else {
      amsgrad ? vectors<false, true>(*this, count, operand)
              : vectors<false, false>(*this, count, operand);
    }
  }
};

template <typename T>
struct SgdMath {
  static constexpr int kOperands = kSgdOperands;
  static constexpr int kParam = kSgdParam;
  static constexpr int kGrad = kSgdGrad;
  static constexpr int kMaster = kSgdMaster;
  T coefficient;
  T weight_decay;
  T momentum;
  T grad_weight;  // 1 - dampening
  T negative_lr;
  bool decays;
  bool nesterov;
  bool first_step;

  void operator()(std::int64_t count, T* const* operand) const {
    constexpr int kLanes = Simd<T>::kLanes;
    T* const weights = operand[kSgdMaster] != nullptr ? operand[kSgdMaster] : operand[kSgdParam];
    T* const buffers = operand[kSgdMomentum];
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const Vec<T> weight = load<T>(weights + i);
      Vec<T> grad = load<T>(operand[kSgdGrad] + i) * coefficient;
      if (decays) grad += weight * weight_decay;
      if (buffers != nullptr) {
        const Vec<T> buffer =
            first_step ? grad : load<T>(buffers + i) * momentum + grad * grad_weight;
        store<T>(buffers + i, buffer);
        grad = nesterov ? grad + buffer * momentum : buffer;
      }
      store<T>(weights + i, weight + grad * negative_lr);
    }
  }
};

/// As store_rounded() and load_elements() after it.
template <typename T>
TORCH_EXT_INLINE Vec<T> rounded_to(ScalarType type, Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    if (type == ScalarType::kBFloat16) return (FloatVector)(float_to_bf16_bits(x) << 16);
  }
  if (type == kTypeOf<T>) return x;
  alignas(64) char rounded[Simd<T>::kLanes * 8];
  store_rounded<T>(rounded, type, x);
  return load_elements<T>(rounded, type);
}

/// A parameter that is not its master's rounding any more has been written by somebody else: its
/// master becomes what the parameter holds. The other elements keep the bits below the rounding.
/// Version counters would not do: writes through `.data` pass them by.
template <typename T>
static void follow_params(ScalarType param_type, std::int64_t count, const T* params, T* masters) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Vec<T> master = load<T>(masters + i);
    const Vec<T> param = load<T>(params + i);
    store<T>(masters + i, rounded_to<T>(param_type, master) == param ? master : param);
  }
}

/// Where the staged operands of one block live.
template <typename Math, typename T>
struct StepBuffers {
  alignas(64) T values[Math::kOperands][kStripElements > kStepBlock ? kStripElements : kStepBlock];
};

/// Blocks [first, end) of a dense entry.
template <typename T, typename Math>
static void step_dense(const Math& math, const StepOperand* operands, std::int64_t begin,
                       std::int64_t end, bool reset) {
  constexpr int kLanes = Simd<T>::kLanes;
  StepBuffers<Math, T> buffers;
  const bool has_master = operands[Math::kMaster].data != nullptr;
  for (std::int64_t offset = begin; offset < end; offset += kStepBlock) {
    const std::int64_t count = min_of(kStepBlock, end - offset);
    const bool whole = count % kLanes == 0;
    T* pointers[Math::kOperands];
#pragma GCC unroll 6
    for (int k = 0; k < Math::kOperands; ++k) {
      const StepOperand& operand = operands[k];
      pointers[k] = nullptr;
      if (operand.data == nullptr) continue;
      char* const place = element_at(operand.data, operand.type, offset);
      if (end - offset > kStepBlock)
        prefetch_ahead(element_at(operand.data, operand.type, offset + kStepBlock));
      if (operand.type == kTypeOf<T> && whole) {
        pointers[k] = reinterpret_cast<T*>(place);
        continue;
      }
      pointers[k] = buffers.values[k];
      if (operand.read) stage_in<T>(place, operand.type, count, pointers[k]);
    }
    if (has_master) {
      follow_params<T>(operands[Math::kParam].type, round_up(count, kLanes), pointers[Math::kParam],
                       pointers[Math::kMaster]);
    }
    math(round_up(count, kLanes), pointers);
#pragma GCC unroll 6
    for (int k = 0; k < Math::kOperands; ++k) {
      const StepOperand& operand = operands[k];
      if (operand.data == nullptr) continue;
      char* const place = element_at(operand.data, operand.type, offset);
      if (k == Math::kGrad) {
        if (reset)
          __builtin_memset(place, 0, static_cast<std::size_t>(count * bytes_of(operand.type)));
      } else if (k == Math::kParam && has_master) {
        stage_out<T>(place, operand.type, count, pointers[Math::kMaster]);
      } else if (operand.written && pointers[k] == buffers.values[k]) {
        stage_out<T>(place, operand.type, count, pointers[k]);
      }
    }
  }
}

template <typename T, typename Math>
static void step_strips(const Math& math, const StepOperand* operands, const StridedLoop& loop,
                        std::int64_t first, std::int64_t end, bool reset) {
  StepBuffers<Math, T> buffers;
  const bool has_master = operands[Math::kMaster].data != nullptr;
  for (std::int64_t block = first; block < end; ++block) {
    const Strip strip = strip_at(loop, block);
    T* pointers[Math::kOperands];
    for (int k = 0; k < Math::kOperands; ++k) {
      const StepOperand& operand = operands[k];
      pointers[k] = operand.data == nullptr ? nullptr : buffers.values[k];
      if (pointers[k] != nullptr && operand.read) {
        gather_strip<T>(operand.data, operand.type, strip_place(loop, strip, k), strip,
                        pointers[k]);
      }
    }
    const std::int64_t count = strip.rows * strip_pitch<T>(strip);
    if (has_master) {
      follow_params<T>(operands[Math::kParam].type, count, pointers[Math::kParam],
                       pointers[Math::kMaster]);
    }
    math(count, pointers);
    for (int k = 0; k < Math::kOperands; ++k) {
      const StepOperand& operand = operands[k];
      if (operand.data == nullptr || (k == Math::kGrad && !reset)) continue;
      if (k == Math::kGrad)
        __builtin_memset(pointers[k], 0, static_cast<std::size_t>(count) * sizeof(T));
      scatter_strip<T>(operand.data, operand.type, strip_place(loop, strip, k), strip,
                       k == Math::kParam && has_master ? pointers[Math::kMaster] : pointers[k]);
    }
  }
}

/// A skipped step: the accumulators alone become 0.
static void reset_blocks(const Operand& accumulator, std::int64_t entry_count,
                         const StridedLoop& loop, int operand_index, std::int64_t first,
                         std::int64_t end) {
  if (loop.dims == 0) {
    const std::int64_t begin = first * kListBlock;
    const std::int64_t count = min_of(entry_count, end * kListBlock) - begin;
    __builtin_memset(element_at(accumulator.data, accumulator.type, begin), 0,
                     static_cast<std::size_t>(count * bytes_of(accumulator.type)));
    return;
  }
  alignas(64) const float zeros[kStripElements] = {};
  for (std::int64_t block = first; block < end; ++block) {
    const Strip strip = strip_at(loop, block);
    scatter_strip<float>(accumulator.data, accumulator.type,
                         strip_place(loop, strip, operand_index), strip, zeros);
  }
}

template <int kOperands>
TORCH_EXT_INLINE bool any_double(const StepOperand (&operands)[kOperands]) {
  bool any = false;
  for (const StepOperand& operand : operands) {
    any |= operand.data != nullptr && operand.type == ScalarType::kFloat64;
  }
  return any;
}

/// One piece of an entry, in the compute type that its operands ask for.
template <template <typename> typename Math, int kOperands, typename MakeMath>
TORCH_EXT_INLINE void step_piece(const StepOperand (&operands)[kOperands], std::int64_t entry_count,
                                 const StridedLoop& loop, std::int64_t first, std::int64_t end,
                                 bool reset, const MakeMath& make_math) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Math<T> math = make_math(zero);
    if (loop.dims == 0) {
      step_dense<T>(math, operands, first * kListBlock, min_of(entry_count, end * kListBlock),
                    reset);
    } else {
      step_strips<T>(math, operands, loop, first, end, reset);
    }
  };
  any_double(operands) ? run(0.0) : run(0.0f);
}

TORCH_EXT_INLINE bool step_is_skipped(const OptimizerSettings& settings) {
  return !(scalar_operand(settings.found_inf, 0.0) == 0.0);
}

TORCH_EXT_INLINE double signed_coefficient(const OptimizerSettings& settings) {
  const double coefficient = scalar_operand(settings.coefficient, 1.0);
  return settings.maximize ? -coefficient : coefficient;
}

struct BiasCorrections {
  double step;
  double correction1;
  double correction2_sqrt;
};

static BiasCorrections bias_corrections(const AdamParams& params, double step) {
  return {step, 1.0 - __builtin_pow(params.beta1, step),
          __builtin_sqrt(1.0 - __builtin_pow(params.beta2, step))};
}

TORCH_EXT_INLINE double step_count(const AdamEntry& entry) {
  return scalar_operand({entry.step.data, entry.step.type}, 0.0);
}

static void adam_step(const AdamParams& params, const TaskRunner& runner) {
  const OptimizerSettings& settings = params.settings;
  const bool skipped = step_is_skipped(settings);
  if (skipped && !settings.reset) return;
  if (!skipped) {
    for (std::int64_t i = 0; i < params.num_entries; ++i) {
      const Operand& step = params.entries[i].step;
      if (step.type == ScalarType::kFloat64) {
        *static_cast<double*>(step.data) += 1.0;
      } else {
        *static_cast<float*>(step.data) += 1.0f;
      }
    }
  }
  // Most lists have one step count: two powers for the whole list.
  const BiasCorrections first_corrections =
      params.num_entries > 0 ? bias_corrections(params, step_count(params.entries[0]))
                             : BiasCorrections{};
  const double coefficient = signed_coefficient(settings);
  // Adam without weight decay takes AdamW's path with a factor of 1: 0 * inf must not come in.
  const bool decoupled = params.decoupled || settings.weight_decay == 0.0;
  const double decay =
      decoupled ? 1.0 - settings.lr * settings.weight_decay : settings.weight_decay;
  run_list(
      runner, params.entries, params.num_entries,
      [&](std::int64_t index, std::int64_t first, std::int64_t end) {
        const AdamEntry& entry = params.entries[index];
        if (skipped) {
          return reset_blocks(entry.accumulator, entry.count, entry.loop, kAdamGrad, first, end);
        }
        const StepOperand operands[kAdamOperands] = {
            {entry.param.data, entry.param.type, true, true},
            {entry.accumulator.data, entry.accumulator.type, true, false},
            {entry.exp_avg.data, entry.exp_avg.type, true, true},
            {entry.exp_avg_sq.data, entry.exp_avg_sq.type, true, true},
            {params.amsgrad ? entry.max_exp_avg_sq.data : nullptr, entry.max_exp_avg_sq.type, true,
             true},
            {entry.master.data, entry.master.type, true, true},
        };
        const double step = step_count(entry);
        const BiasCorrections corrections =
            step == first_corrections.step ? first_corrections : bias_corrections(params, step);
        step_piece<AdamMath>(
            operands, entry.count, entry.loop, first, end, settings.reset, [&](auto zero) {
              using T = decltype(zero);
              return AdamMath<T>{
                  .coefficient = static_cast<T>(coefficient),
                  .decay = static_cast<T>(decay),
                  .average_weight = static_cast<T>(1.0 - params.beta1),
                  .square_decay = static_cast<T>(params.beta2),
                  .square_weight = static_cast<T>(1.0 - params.beta2),
                  .inverse_bias_correction2_sqrt =
                      static_cast<T>(1.0 / corrections.correction2_sqrt),
                  .eps = static_cast<T>(params.eps),
                  .negative_step_size = static_cast<T>(-settings.lr / corrections.correction1),
                  .decoupled = decoupled,
                  .amsgrad = params.amsgrad,
              };
            });
      });
}

static void sgd_step(const SgdParams& params, const TaskRunner& runner) {
  const OptimizerSettings& settings = params.settings;
  const bool skipped = step_is_skipped(settings);
  if (skipped && !settings.reset) return;
  const double coefficient = signed_coefficient(settings);
  run_list(runner, params.entries, params.num_entries,
           [&](std::int64_t index, std::int64_t first, std::int64_t end) {
             const SgdEntry& entry = params.entries[index];
             if (skipped) {
               return reset_blocks(entry.accumulator, entry.count, entry.loop, kSgdGrad, first,
                                   end);
             }
             const StepOperand operands[kSgdOperands] = {
                 {entry.param.data, entry.param.type, true, true},
                 {entry.accumulator.data, entry.accumulator.type, true, false},
                 {entry.momentum_buffer.data, entry.momentum_buffer.type, !entry.first_step, true},
                 {entry.master.data, entry.master.type, true, true},
             };
             step_piece<SgdMath>(operands, entry.count, entry.loop, first, end, settings.reset,
                                 [&](auto zero) {
                                   using T = decltype(zero);
                                   return SgdMath<T>{
                                       .coefficient = static_cast<T>(coefficient),
                                       .weight_decay = static_cast<T>(settings.weight_decay),
                                       .momentum = static_cast<T>(params.momentum),
                                       .grad_weight = static_cast<T>(1.0 - params.dampening),
                                       .negative_lr = static_cast<T>(-settings.lr),
                                       .decays = settings.weight_decay != 0.0,
                                       .nesterov = params.nesterov,
                                       .first_step = entry.first_step,
                                   };
                                 });
           });
}
