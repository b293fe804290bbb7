"""What the processes of a distributed run do about a window's sums.

DistributedDataParallel's own reducer averages what each backward leaves in ``.grad``; here nothing
is communicated before the step, which adds the sums themselves and divides by the weights of all
processes. FSDP2 reduces each micro-batch's gradients to shards; the sums are sums of shards, and
the step needs the other processes for norm and weight alone.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Reduction", "reduction_of", "unwrapped", "without_reducer"]

_NAME = "torch_ext.GradientAccumulator"

# Several small messages cost more than one; as DistributedDataParallel has it.
_BUCKET_BYTES = 25 << 20


def _is_compiled(model: nn.Module) -> bool:
    return type(model).__name__ == "OptimizedModule"


def _is_ddp(model: nn.Module) -> bool:
    return type(model).__name__ == "DistributedDataParallel"


def _has_base(module: nn.Module, name: str) -> bool:
    # By name: torch.distributed is not imported for those who do not use it.
    return any(base.__name__ == name for base in type(module).__mro__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, whose names its state has."""
    while _is_compiled(model) or _is_ddp(model):
        model = model._orig_mod if _is_compiled(model) else model.module
    return model


def _find_ddp(model: nn.Module) -> nn.Module | None:
    while _is_compiled(model):
        model = model._orig_mod
    return model if _is_ddp(model) else None


def without_reducer(model: nn.Module) -> nn.Module:
    """The module as it is called where nothing is to be communicated."""
    ddp = _find_ddp(model)
    return model if ddp is None else ddp.module


class Reduction:
    """One process: the sums are complete.

    Attributes:
        is_alone: whether no other process has gradients for this one's window.
        takes_grads: whether micro-batches leave their gradients in the parameters' ``.grad``, as
            plain tensors; else :meth:`collect` brings them.
        leaves_node_hooks: whether the hooks on autograd's accumulation nodes do without gradients.
    """

    is_alone = True
    takes_grads = True
    leaves_node_hooks = False

    def enter_micro_batch(self) -> None:
        pass

    def leave_micro_batch(self) -> None:
        """Takes enter_micro_batch() back, whole or in part; else, and a second time, nothing."""

    def check_parallel(self, name: str) -> None:
        """Refuses, for the function ``name``, what cannot run micro-batches side by side."""

    def collect(self, core: Any) -> None:
        """Brings the open micro-batch's gradients where they do not lie in ``.grad``."""

    def join_norms(self, norm: Tensor, norm_type: float) -> Tensor:
        """All processes' norm, from those of the sums that each has after prepare_step()."""
        return norm

    def prepare_step(
        self, core: Any, inverse_scale: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(norm, coefficient, found_inf) of the step."""
        return core.prepare_step(1.0, inverse_scale, max_norm)


class DataParallelReduction(Reduction):
    """DistributedDataParallel: each process has sums of its own until the step adds them.

    Args:
        ddps: the wrapped modules, whose processes these are.
        count: of the accumulator's parameters.
    """

    is_alone = False
    leaves_node_hooks = True

    def __init__(self, ddps: list[nn.Module], count: int) -> None:
        self._ddps = ddps
        self._count = count
        self._group = ddps[0].process_group
        self._synchronised: list[bool] = []

    def enter_micro_batch(self) -> None:
        # As no_sync() has it, in steps that leave_micro_batch() takes back wherever they end.
        self._synchronised = [ddp.require_backward_grad_sync for ddp in self._ddps]
        for ddp in self._ddps:
            ddp.require_backward_grad_sync = False

    def leave_micro_batch(self) -> None:
        for ddp, synchronised in zip(self._ddps, self._synchronised, strict=False):
            ddp.require_backward_grad_sync = synchronised
        self._synchronised = []

    def prepare_step(
        self, core: Any, inverse_scale: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = self._reduce(core)
        # Buffers are broadcast before the next forward, as after a backward that communicates.
        for ddp in self._ddps:
            ddp.require_forward_param_sync = True
        if weight is None:
            return core.prepare_step(1.0, None, None)  # nothing to step with
        norm, found_inf = core.measure()
        return core.normalise(norm, found_inf, weight[0], weight[1:], 1.0, inverse_scale, max_norm)

    def _reduce(self, core: Any) -> Tensor | None:
        """Adds up all processes' sums; returns (weight, first micro-batch's square and weight), or
        None where no process has a gradient."""
        import torch.distributed as dist

        core.measure_first()
        first = core.first_micro_batch()
        has_first = first.isfinite().all().to(first.dtype).reshape(1)
        own = torch.cat([core.weight().reshape(1), first.nan_to_num(), has_first])
        present = torch.zeros(self._count, dtype=own.dtype, device=own.device)
        present[core.written()] = 1.0
        together = torch.cat([own, present])
        dist.all_reduce(together, group=self._group)
        written = together[len(own) :].nonzero().flatten().tolist()
        if not written:
            return None
        # From here on some sums are all processes', some this one's own: good for this step alone.
        core.declare_lost()
        core.zero_missing(written)
        _all_reduce(core.sums(written), self._group)
        # Each process has a first micro-batch, or none at all: their mean.
        weight, first, count = together[: len(own)].split((1, 2, 1))
        return torch.cat([weight, first / count])


def _all_reduce(sums: list[Tensor], group: Any) -> None:
    """Adds tensors over the group, in place, in messages of some 25 MB, several on their way."""
    import torch.distributed as dist

    waiting: list[tuple[Any, Tensor | None, list[Tensor]]] = []
    for bucket in _buckets(sums):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            waiting.append((dist.all_reduce(bucket[0], group=group, async_op=True), None, bucket))
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        waiting.append((dist.all_reduce(flat, group=group, async_op=True), flat, bucket))
    for work, flat, bucket in waiting:
        work.wait()
        if flat is not None:
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def _buckets(sums: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in sorted(sums, key=lambda tensor: str(tensor.dtype)):  # stable
        fits = size + tensor.nbytes <= _BUCKET_BYTES
        if buckets and fits and buckets[-1][0].dtype == tensor.dtype:
            buckets[-1].append(tensor)
            size += tensor.nbytes
        else:
            buckets.append([tensor])
            size = tensor.nbytes
    return buckets


class ShardedReduction(Reduction):
    """FSDP2: gradients come reduced, as shards.

    Args:
        groups: FSDP's parameter groups.
        params: the accumulator's parameters.
    """

    is_alone = False
    takes_grads = False

    def __init__(self, groups: list[Any], params: list[Tensor]) -> None:
        self._params = params
        self._set_aside: list[Tensor | None] = []
        mesh = groups[0].mesh_info
        self._shards = mesh.shard_process_group
        self._replicas = getattr(mesh, "replicate_process_group", None)
        self._size = self._shards.size()
        self._copies = 1 if self._replicas is None else self._replicas.size()
        for group in groups:
            if group.mesh_info.mesh != mesh.mesh:
                raise ValueError(
                    f"{_NAME}: model takes one that fully_shard has put on one mesh, got "
                    f"{mesh.mesh} and {group.mesh_info.mesh}"
                )
        # FSDP averages, unless it was told what to divide by.
        factors = {group.gradient_divide_factor for group in groups}
        if len(factors) > 1:
            raise ValueError(
                f"{_NAME}: model takes one gradient divide factor, got {sorted(map(str, factors))}"
            )
        factor = factors.pop()
        self._factor = float(self._size * self._copies if factor is None else factor)

    def enter_micro_batch(self) -> None:
        self._set_aside = [param.grad for param in self._params]
        for param in self._params:
            param.grad = None

    def leave_micro_batch(self) -> None:
        for param, grad in zip(self._params, self._set_aside, strict=False):
            param.grad = grad
        self._set_aside = []

    def check_parallel(self, name: str) -> None:
        raise ValueError(
            f"{name}: accumulator takes a model that each process has whole, got one that "
            "fully_shard has cut: its layers gather and drop their parameters in turn"
        )

    def join_norms(self, norm: Tensor, norm_type: float) -> Tensor:
        import torch.distributed as dist

        if math.isinf(norm_type):
            end = dist.ReduceOp.MAX if norm_type > 0.0 else dist.ReduceOp.MIN
            dist.all_reduce(norm, op=end, group=self._shards)
            return norm
        total = norm.double() if norm_type == 0.0 else norm.double() ** norm_type
        dist.all_reduce(total, group=self._shards)
        return total if norm_type == 0.0 else total ** (1.0 / norm_type)

    def collect(self, core: Any) -> None:
        indices, grads = [], []
        for index, param in enumerate(self._params):
            if param.grad is not None:
                indices.append(index)
                grads.append(param.grad._local_tensor)
        core.add_to_open(indices, grads)

    def prepare_step(
        self, core: Any, inverse_scale: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        import torch.distributed as dist

        norm, found_inf = core.measure()
        weight, first = core.weight(), core.first_micro_batch()
        parts = [norm.double().square(), found_inf.double(), weight, first[0], first[1]]
        together = torch.stack(parts)
        dist.all_reduce(together, group=self._shards)
        if self._replicas is not None:
            dist.all_reduce(together, group=self._replicas)
            together[[0, 3]] /= self._copies  # replicas have the same shards
        return core.normalise(
            together[0].sqrt().to(norm.dtype),
            together[1].clamp_max(1.0).to(found_inf.dtype),
            together[2],
            together[3:],
            self._factor,
            inverse_scale,
            max_norm,
        )


def _fsdp_groups(model: nn.Module) -> list[Any]:
    groups = []
    for module in model.modules():
        if _has_base(module, "FSDPModule"):
            state = module._get_fsdp_state()
            # One a module until torch 2.11.
            found = getattr(state, "_fsdp_param_groups", None)
            groups += [state._fsdp_param_group] if found is None else list(found)
    return [group for group in groups if group is not None]


def _is_distributed(param: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(param, tensor.DTensor)


def _check_one_group(
    ddps: list[nn.Module], models: list[nn.Module], modules: list[nn.Module]
) -> None:
    for model, module in zip(models, modules, strict=True):
        if _find_ddp(model) is None and any(param.requires_grad for param in module.parameters()):
            raise ValueError(
                f"{_NAME}: model takes models that are all in DistributedDataParallel, or none, "
                f"got {type(module).__name__} beside some that are"
            )
    if any(ddp.process_group != ddps[0].process_group for ddp in ddps):
        raise ValueError(f"{_NAME}: model takes models of one process group, got several")


def reduction_of(models: list[nn.Module], params: list[Tensor], names: list[str]) -> Reduction:
    """How these models' processes work together."""
    modules = [unwrapped(model) for model in models]
    for module in modules:
        for part in module.modules():
            if _has_base(part, "FullyShardedDataParallel"):
                raise ValueError(
                    f"{_NAME}: model takes one cut by torch.distributed.fsdp.fully_shard (FSDP2), "
                    "got FullyShardedDataParallel"
                )
    ddps = [ddp for model in models if (ddp := _find_ddp(model)) is not None]
    if ddps:
        _check_one_group(ddps, models, modules)
        return DataParallelReduction(ddps, len(params))
    groups = [group for module in modules for group in _fsdp_groups(module)]
    managed = {id(param.sharded_param) for group in groups for param in group.fsdp_params}
    for name, param in zip(names, params, strict=True):
        if _is_distributed(param) and id(param) not in managed:
            raise ValueError(
                f"{_NAME}: model takes plain parameters or those that fully_shard has cut, got "
                f"{name}, a DTensor of something else"
            )
        if groups and not _is_distributed(param):
            raise ValueError(
                f"{_NAME}: model takes one that fully_shard has cut whole, got {name} outside of "
                "it: call fully_shard(model) on the outermost module"
            )
    return ShardedReduction(groups, params) if groups else Reduction()
