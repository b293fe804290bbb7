// The tasks of a backward pass in their order.

/// Runs the plan: mask map, tasks (longest first where causal), then the joins.
template <typename Policy>
static void run_backward(const AttentionBackwardParams& params, const BackwardPlan& plan,
                         const TaskRunner& runner, char* workspace) {
  TileClass* map = reinterpret_cast<TileClass*>(workspace + plan.mask_map.offset);
  if (plan.mask_map.used) {
    build_mask_map(params.transform.mask, params.shape, plan.mask_map, 1, runner, map);
  }
  const BackwardKernel<Policy> kernel{params, plan, map, workspace, dropout_state(params.dropout)};
  if (kernel.statistics.any) {
    const std::int64_t query_blocks =
        (params.shape.q_len + plan.query_block - 1) / plan.query_block;
    run_tasks(runner, params.shape.batch() * params.shape.query_heads * query_blocks,
              [&kernel, &plan, query_blocks](int worker, std::int64_t task) {
                kernel.statistics.run(kernel.scratch_of(worker), task / query_blocks,
                                      task % query_blocks * plan.query_block);
              });
  }
  run_tasks(runner, plan.groups() * plan.chunks, [&kernel, &plan](int worker, std::int64_t task) {
    kernel.run_task(worker, task % plan.groups(), task / plan.groups());
  });
  if (plan.chunks > 1 && params.grad_query.data != nullptr) {
    const std::int64_t rows = plan.rows_per_pair(params.shape);
    run_tasks(runner, plan.pairs * rows, [&kernel, rows](int, std::int64_t task) {
      kernel.join_query_row(task / rows, task % rows);
    });
  }
  if (params.grad_sink != nullptr) {
    run_tasks(
        runner, params.shape.batch() * params.shape.query_heads,
        [&kernel](int worker, std::int64_t task) { sum_sink_gradient(kernel, worker, task); });
  }
  if (plan.mask_gradient) {
    run_tasks(runner, plan.mask_slices * plan.mask_heads * plan.mask_rows,
              [&kernel](int, std::int64_t task) { kernel.mask_gradient.join_row(task); });
  }
}
