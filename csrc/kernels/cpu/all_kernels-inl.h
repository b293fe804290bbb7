// Every kernel of one instruction set, in the order in which they build on each other, and its
// column of the kernel table. Included by the isa_*.cpp files inside their namespace and region.

// clang-format off
#include "simd_vector-inl.h"
#include "element_conversion-inl.h"
#include "bf16_pairs-inl.h"
#include "tile_contraction-inl.h"
#include "operand_staging-inl.h"
#include "key_rows-inl.h"
#include "vector_tanh-inl.h"
#include "score_transform-inl.h"
#include "attention_dropout-inl.h"
#include "attention_softmax-inl.h"
#include "attention_splits-inl.h"
#include "attention_forward-inl.h"
#include "attention_row_products-inl.h"
#include "attention_decode-inl.h"
#include "attention_score_gradient-inl.h"
#include "attention_score_blocks-inl.h"
#include "attention_row_statistics-inl.h"
#include "attention_mask_gradient-inl.h"
#include "attention_backward-inl.h"
#include "attention_sink_gradient-inl.h"
#include "attention_backward_tasks-inl.h"
#include "attention_entry-inl.h"
#include "attention_varlen-inl.h"
#include "list_staging-inl.h"
#include "accumulate-inl.h"
#include "gradient_norm-inl.h"
#include "optimizer_step-inl.h"
#include "weight_gradient-inl.h"
#include "embedding_gradient-inl.h"
// clang-format on

// constexpr: the table is constant data. Code of this instruction set must not run at start-up.
static constexpr KernelTable make_kernel_table(CpuCapability capability) {
  return {
      .capability = capability,
      .attention_forward_workspace = attention_forward_workspace,
      .attention_forward = attention_forward,
      .attention_backward_workspace = attention_backward_workspace,
      .attention_backward = attention_backward,
      .varlen_forward = varlen_forward,
      .varlen_backward = varlen_backward,
      .accumulate = accumulate,
      .grad_stats_workspace = grad_stats_workspace,
      .grad_stats = grad_stats,
      .adam_step = adam_step,
      .sgd_step = sgd_step,
      .weight_gradient_workspace = weight_gradient_workspace,
      .weight_gradient = weight_gradient,
      .embedding_gradient = embedding_gradient,
  };
}
