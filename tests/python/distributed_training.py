"""What each process of test_distributed_accumulation.py runs, under torchrun, over gloo.

    torchrun --nproc-per-node 2 distributed_training.py SCENARIO FOLDER

Each process takes every second micro-batch; process 0 writes what came out.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accumulation_models import TiedModel, loss_sum, token_batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_ext import GradientAccumulator, parallel_micro_batches

MAX_NORM = 0.3
WINDOWS = 2


def batches_of(window: int, scenario: str = "") -> list[tuple[Tensor, Tensor]]:
    """All processes' micro-batches of one window."""
    sizes = {"uneven": (3, 1, 4), "idle": (3,)}.get(scenario, (3, 1, 4, 2))
    return token_batches(sizes, seed=window)


def model_of(scenario: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = TiedModel()
    if scenario == "unused":
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        model.register_parameter("rank_0_only", nn.Parameter(torch.zeros(12)))
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], scenario: str) -> Tensor:
    loss = loss_sum(model, batch)
    if scenario == "unused" and batch[0].shape[0] == 3:  # one of process 0's
        module = getattr(model, "module", model)
        loss = loss + (module.rank_0_only - 1.0).square().sum()
    return loss


def run_ddp(scenario: str) -> dict[str, Any]:
    module = model_of(scenario)
    ddp = DistributedDataParallel(
        module,
        gradient_as_bucket_view=scenario == "bucket_view",
        find_unused_parameters=scenario == "unused",
    )
    model: nn.Module = torch.compile(ddp, backend="eager") if scenario == "compiled" else ddp
    optimizer = optimizer_of(module)
    accumulator = GradientAccumulator(model, optimizer, max_norm=MAX_NORM)
    calls = count_communication()
    before_steps: list[int] = []
    norms: list[float] = []
    for window in range(WINDOWS):
        batches = batches_of(window, scenario)[dist.get_rank() :: dist.get_world_size()]
        start = len(calls)
        if scenario == "parallel":
            parallel_micro_batches(
                accumulator,
                lambda m, batch: (loss_of(m, batch, scenario), batch[1].numel()),
                batches,
                workers=2,
            )
        else:
            for batch in batches:
                with accumulator.micro_batch(weight=batch[1].numel()):
                    loss_of(model, batch, scenario).backward()
        before_steps.append(len(calls) - start)
        norms.append(accumulator.step().item())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [p.detach().clone() for p in module.parameters()])
    return {
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "norms": norms,
        "before_steps": before_steps,
        "communicated": len(calls),
        "agree": all(
            torch.equal(a, b) for other in gathered for a, b in zip(gathered[0], other, strict=True)
        ),
        "noise": accumulator.gradient_noise_scale.item(),
    }


def run_non_finite(scenario: str) -> dict[str, Any]:
    """One process alone has a gradient that is not finite: all skip."""
    module = model_of(scenario)
    ddp = DistributedDataParallel(module)
    accumulator = GradientAccumulator(ddp, optimizer_of(module))
    before = copy.deepcopy(module.state_dict())
    batch = batches_of(0)[dist.get_rank()]
    factor = float("inf") if dist.get_rank() == 1 else 1.0
    with accumulator.micro_batch():
        (loss_sum(ddp, batch) * factor).backward()
    norm = accumulator.step()
    same = all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    return {"norm": norm.item(), "same": same}


def run_fsdp(scenario: str) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    model = model_of(scenario)
    options: dict[str, Any] = {}
    if scenario == "fsdp_mixed":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for layer in (model.twice, model.convolution):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    make = torch.optim.Adagrad if scenario == "fsdp_other" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=1e-2)
    accumulator = GradientAccumulator(model, optimizer, max_norm=MAX_NORM)
    norms = []
    for window in range(WINDOWS):
        for batch in batches_of(window)[dist.get_rank() :: dist.get_world_size()]:
            with accumulator.micro_batch(weight=batch[1].numel()):
                loss_sum(model, batch).backward()
        state = copy.deepcopy(accumulator.state_dict())
        accumulator.reset()
        accumulator.load_state_dict(state)
        norms.append(accumulator.step().item())
    states = list(optimizer.state_dict()["state"].values())
    moments = [v for state in states for k, v in state.items() if k != "step"]
    return {
        "parameters": {name: p.full_tensor().detach() for name, p in model.named_parameters()},
        "norms": norms,
        "noise": accumulator.gradient_noise_scale.item(),
        "distributed_moments": all(isinstance(moment, DTensor) for moment in moments),
    }


def run_fsdp_bf16(_: str) -> dict[str, Any]:
    """bf16 shards: of each optimizer, its warnings and the masters that a step has left."""
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    for make in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False)).bfloat16()
        fully_shard(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accumulator = GradientAccumulator(model, make(model.parameters(), lr=1e-5))
        with accumulator.micro_batch():
            model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
        accumulator.step()
        found[make.__name__] = {
            "warnings": [str(one.message) for one in caught if "torch_ext" in str(one.message)],
            "masters": sorted(k for k in accumulator.state_dict() if k.startswith("master.")),
        }
    return found


def count_communication() -> list[str]:
    """Every all_reduce and broadcast from here on."""
    calls: list[str] = []
    for name in ("all_reduce", "broadcast"):
        original = getattr(dist, name)

        def counted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    return calls


_RUNS = {
    "plain": run_ddp,
    "bucket_view": run_ddp,
    "unused": run_ddp,
    "uneven": run_ddp,
    "idle": run_ddp,
    "compiled": run_ddp,
    "parallel": run_ddp,
    "non_finite": run_non_finite,
    "fsdp": run_fsdp,
    "fsdp_mixed": run_fsdp,
    "fsdp_other": run_fsdp,
    "fsdp_bf16": run_fsdp_bf16,
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # Several in one start of the processes: importing torch is most of the time.
    for scenario in sys.argv[1].split(","):
        result = _RUNS[scenario](scenario)
        if dist.get_rank() == 0:
            torch.save(result, Path(sys.argv[2]) / f"{scenario}.pt")
        torch._dynamo.reset()
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads drop their last tensors when they come to it; where the interpreter is on its
    # way out by then, PyTorch aborts the process.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
