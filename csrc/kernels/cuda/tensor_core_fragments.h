// Which element of a matrix a lane holds in a fragment of m16n8k16, and of TF32's m16n8k8. The
// kernels rely on it in tensor_core_tile.cuh, the emulated tensor cores of the tests execute it,
// and fragment_layout_check.cuh compares it with CuTe's.
#pragma once

namespace torch_ext::cuda {

struct FragmentPlace {
  int row;
  int col;
};

/// Accumulator e of 4, of (16, 8).
constexpr FragmentPlace accumulator_place(int lane, int e) {
  return {lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2};
}

/// Element v of 8 of the left operand, (16, 16): two to a register.
constexpr FragmentPlace left_place(int lane, int v) {
  return {lane / 4 + v / 2 % 2 * 8, lane % 4 * 2 + v % 2 + v / 4 * 8};
}

/// Element v of 4 of the right operand, (16, 8).
constexpr FragmentPlace right_place(int lane, int v) {
  return {lane % 4 * 2 + v % 2 + v / 2 * 8, lane / 4};
}

/// Element v of 4 of TF32's left operand, (16, 8).
constexpr FragmentPlace tf32_left_place(int lane, int v) {
  return {lane / 4 + v % 2 * 8, lane % 4 + v / 2 * 4};
}

/// Element v of 2 of TF32's right operand, (8, 8).
constexpr FragmentPlace tf32_right_place(int lane, int v) { return {lane % 4 + v * 4, lane / 4}; }

}  // namespace torch_ext::cuda
