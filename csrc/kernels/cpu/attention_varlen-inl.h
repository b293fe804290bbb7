// Packed sequences of different lengths: the dense kernels, one sequence a call, all calls' tasks
// in one list (varlen_schedule.h).

template <typename Params>
struct VarlenCall {
  const Params& params;  // of the whole tensors
  const VarlenSequences& sequences;
  char* workspace;

  Params sequence(const VarlenSchedule& schedule, std::int64_t position) const {
    return sequence_params(params, sequences, schedule.order[position]);
  }
  char* area(const VarlenSchedule& schedule, std::int64_t position) const {
    return workspace + schedule.areas[position];
  }
};

/// body(kernel) with the forward or decoding kernel of one sequence.
template <typename Policy, typename Body>
static void with_forward_kernel(const AttentionForwardParams& params, const ForwardPlan& plan,
                                char* workspace, const Body& body) {
  const DropoutState dropout = dropout_state(params);
  if (plan.decode) {
    const ForwardKernel<FloatContraction> base{params, plan, nullptr, workspace, dropout};
    with_decode_kernel(base, body);
  } else {
    body(ForwardKernel<Policy>{params, plan, nullptr, workspace, dropout});
  }
}

template <typename Policy>
static void run_varlen_forward(const VarlenCall<AttentionForwardParams>& call,
                               const VarlenSchedule& schedule, const TaskRunner& runner) {
  const auto for_units = [&](const VarlenTasks& tasks, const auto& body) {
    run_tasks(runner, tasks.size(), [&](int worker, std::int64_t index) {
      const VarlenTasks::Task task = tasks.find(index);
      const AttentionForwardParams params = call.sequence(schedule, task.position);
      const ForwardPlan plan =
          schedule.placed(plan_forward(params, kGeometry<Policy>, 1), task.position);
      with_forward_kernel<Policy>(params, plan, call.area(schedule, task.position),
                                  [&](const auto& kernel) {
                                    for (std::int64_t unit = task.begin; unit < task.end; ++unit)
                                      body(kernel, worker, unit);
                                  });
    });
  };
  for_units(schedule.tasks, [](const auto& kernel, int worker, std::int64_t unit) {
    kernel.run_unit(worker, unit);
  });
  for_units(schedule.joins,
            [](const auto& kernel, int, std::int64_t unit) { kernel.join_unit(unit); });
}

template <typename Policy>
static void run_varlen_backward(const VarlenCall<AttentionBackwardParams>& call,
                                const VarlenSchedule& schedule, const TaskRunner& runner) {
  const auto with_kernel = [&](std::int64_t position, bool logsumexp_is_small, const auto& body) {
    AttentionBackwardParams params = call.sequence(schedule, position);
    params.logsumexp_is_small = logsumexp_is_small;
    const BackwardPlan plan =
        schedule.placed(plan_backward(params, kGeometry<Policy>, 1), position);
    body(BackwardKernel<Policy>{params, plan, nullptr, call.area(schedule, position),
                                dropout_state(params.dropout)});
  };
  // Which sequences have a logsumexp that is not taken at its word is asked once.
  std::vector<std::int64_t> statistics_units(schedule.order.size());
  run_tasks(runner, static_cast<std::int64_t>(statistics_units.size()),
            [&](int, std::int64_t position) {
              with_kernel(position, false, [&](const BackwardKernel<Policy>& kernel) {
                statistics_units[position] = kernel.statistics_units();
              });
            });
  VarlenTasks blocks;
  for (const std::int64_t units : statistics_units) blocks.add(units, 1);
  const auto for_units = [&](const VarlenTasks& tasks, const auto& body) {
    run_tasks(runner, tasks.size(), [&](int worker, std::int64_t index) {
      const VarlenTasks::Task task = tasks.find(index);
      with_kernel(task.position, statistics_units[task.position] == 0,
                  [&](const BackwardKernel<Policy>& kernel) {
                    for (std::int64_t unit = task.begin; unit < task.end; ++unit) {
                      body(kernel, worker, unit);
                    }
                  });
    });
  };
  for_units(blocks, [](const BackwardKernel<Policy>& kernel, int worker, std::int64_t unit) {
    kernel.run_statistics(worker, unit);
  });
  for_units(schedule.tasks, [](const BackwardKernel<Policy>& kernel, int worker,
                               std::int64_t unit) { kernel.run_unit(worker, unit); });
  for_units(schedule.joins, [](const BackwardKernel<Policy>& kernel, int, std::int64_t unit) {
    kernel.join_unit(unit);
  });
  VarlenTasks sinks;
  const std::int64_t heads = call.params.grad_sink == nullptr ? 0 : call.params.shape.query_heads;
  for (std::size_t i = 0; i < schedule.order.size(); ++i) sinks.add(heads, max_of(heads, 1));
  for_units(sinks, [](const BackwardKernel<Policy>& kernel, int worker, std::int64_t unit) {
    sum_sink_gradient(kernel, worker, unit);
  });
}

static KernelPath varlen_forward(const AttentionForwardParams& params,
                                 const VarlenSequences& sequences, const TaskRunner& runner,
                                 const Workspace& workspace) {
  return with_policy(params.dtype, [&](auto policy) -> KernelPath {
    using Policy = decltype(policy);
    const VarlenSchedule schedule =
        schedule_varlen(params, sequences, kGeometry<Policy>, runner.num_workers());
    char* memory = static_cast<char*>(workspace.allocate(schedule.total_bytes));
    run_varlen_forward<Policy>({params, sequences, memory}, schedule, runner);
    return "cpu." TORCH_EXT_ISA_NAME ".varlen";
  });
}

static KernelPath varlen_backward(const AttentionBackwardParams& params,
                                  const VarlenSequences& sequences, const TaskRunner& runner,
                                  const Workspace& workspace) {
  return with_policy(params.dtype, [&](auto policy) -> KernelPath {
    using Policy = decltype(policy);
    const VarlenSchedule schedule =
        schedule_varlen(params, sequences, kGeometry<Policy>, runner.num_workers());
    char* memory = static_cast<char*>(workspace.allocate(schedule.total_bytes));
    run_varlen_backward<Policy>({params, sequences, memory}, schedule, runner);
    return "cpu." TORCH_EXT_ISA_NAME ".varlen_backward";
  });
}
