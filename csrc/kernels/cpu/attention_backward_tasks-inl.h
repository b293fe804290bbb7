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
  run_tasks(runner, kernel.statistics_units(),
            [&kernel](int worker, std::int64_t unit) { kernel.run_statistics(worker, unit); });
  run_tasks(runner, plan.units(),
            [&kernel](int worker, std::int64_t unit) { kernel.run_unit(worker, unit); });
  run_tasks(runner, plan.join_units(params),
            [&kernel](int, std::int64_t unit) { kernel.join_unit(unit); });
  run_tasks(runner, sink_units(params),
            [&kernel](int worker, std::int64_t unit) { sum_sink_gradient(kernel, worker, unit); });
  if (plan.mask_gradient) {
    run_tasks(runner, plan.mask_slices * plan.mask_heads * plan.mask_rows,
              [&kernel](int, std::int64_t task) { kernel.mask_gradient.join_row(task); });
  }
}
