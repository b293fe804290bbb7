// tanh of vectors, odd and within a few ulp everywhere, 0 included: a soft cap leaves small scores
// as they are.

/// x * P(x^2) / Q(x^2), a minimax fit of relative error 2.1e-8 whose coefficients are positive, so
/// that nothing cancels; from 9.02 on tanh rounds to 1. Clamped constant first: a NaN stays.
TORCH_EXT_INLINE FloatVector tanh_vector(FloatVector x) {
  x = vector_min(broadcast(9.02f), vector_max(broadcast(-9.02f), x));
  const FloatVector y = x * x;
  FloatVector p = 1.3317846157021056e-8f * y + 2.058259925919233e-5f;
  p = p * y + 3.4939819054036875e-3f;
  p = p * y + 1.3379674251704998e-1f;
  p = p * y + 1.0f;
  FloatVector q = 7.761517281905481e-7f * y + 3.283005874614429e-4f;
  q = q * y + 2.5870874675700116e-2f;
  q = q * y + 4.671298955970407e-1f;
  q = q * y + 1.0f;
  return x * p / q;
}

/// Lambert's continued fraction cut off after x^2 / 17 where e^-2x would cancel, else (1 - e^-2x) /
/// (1 + e^-2x).
TORCH_EXT_INLINE DoubleVector tanh_vector(DoubleVector x) {
  const DoubleVector size = absolute<double>(x);
  const DoubleVector y = x * x;
  const DoubleVector p = (((y + 990.0) * y + 135135.0) * y + 4729725.0) * y + 34459425.0;
  const DoubleVector q = (((45.0 * y + 13860.0) * y + 945945.0) * y + 16216200.0) * y + 34459425.0;
  const DoubleVector e =
      exp2_product(vector_max(broadcast(-300.0), -size), broadcast(2.0 * kLog2eDouble));
  const DoubleVector far = (1.0 - e) / (1.0 + e);
  return size < 0.625 ? x * p / q : x < 0.0 ? -far : far;
}
