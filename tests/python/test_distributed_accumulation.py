"""GradientAccumulator in two processes: DistributedDataParallel and fully_shard over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation_models import one_large_batch
from distributed_training import MAX_NORM, WINDOWS, batches_of, loss_of, model_of, optimizer_of
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn

import torch_ext

_DDP = ("plain", "bucket_view", "unused", "uneven", "idle", "compiled", "parallel")
_FSDP = ("fsdp", "fsdp_mixed", "fsdp_other")
_SCRIPT = Path(__file__).parent / "distributed_training.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    scenarios = (*_DDP, "non_finite", *_FSDP, "fsdp_bf16")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(_SCRIPT), ",".join(scenarios), str(folder)),
        ],
        env=os.environ
        | {"PYTHONPATH": str(Path(torch_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return {name: torch.load(folder / f"{name}.pt") for name in scenarios}


def _one_process(scenario: str) -> tuple[nn.Module, list[float]]:
    """Plain torch with one large batch of all processes' tokens."""
    model = model_of(scenario)
    optimizer = optimizer_of(model)
    if scenario == "fsdp_other":
        optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    norms = []
    for window in range(WINDOWS):
        batches = batches_of(window, scenario)
        total = sum(loss_of(model, batch, scenario) for batch in batches)
        optimizer.zero_grad()
        assert isinstance(total, Tensor)
        (total / one_large_batch(batches)[1].numel()).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
    return model, norms


@pytest.mark.parametrize("scenario", [*_DDP, "fsdp", "fsdp_other"])
def test_equals_one_process(results: dict[str, dict[str, Any]], scenario: str) -> None:
    result = results[scenario]
    model, norms = _one_process(scenario)
    assert_same_but_for_rounding(torch.tensor(result["norms"]), torch.tensor(norms))
    found = [result["parameters"][name] for name, _ in model.named_parameters()]
    assert_same_but_for_rounding(found, list(model.parameters()))
    # One micro-batch in all has no other to compare with.
    assert torch.tensor(result["noise"]).isfinite() == (scenario != "idle")


@pytest.mark.parametrize("scenario", _DDP)
def test_processes_communicate_in_the_step_alone(
    results: dict[str, dict[str, Any]], scenario: str
) -> None:
    result = results[scenario]
    assert result["before_steps"] == [0] * WINDOWS
    # A header and one bucket a window.
    assert result["communicated"] == 2 * WINDOWS
    assert result["agree"]


def test_all_processes_skip_what_is_not_finite_in_one(results: dict[str, dict[str, Any]]) -> None:
    assert results["non_finite"]["same"]
    assert not torch.tensor(results["non_finite"]["norm"]).isfinite()


def test_fully_shard_in_mixed_precision(results: dict[str, dict[str, Any]]) -> None:
    _, norms = _one_process("fsdp")
    found = torch.tensor(results["fsdp_mixed"]["norms"])
    assert_same_but_for_rounding(found, torch.tensor(norms), torch.bfloat16)


@pytest.mark.parametrize("scenario", ["fsdp", "fsdp_mixed"])
def test_fully_shard_keeps_the_optimizers_state_sharded(
    results: dict[str, dict[str, Any]], scenario: str
) -> None:
    assert results[scenario]["distributed_moments"]


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_bf16_shards_have_masters_or_the_constructor_says_that_they_have_none(
    results: dict[str, dict[str, Any]], optimizer: str
) -> None:
    found = results["fsdp_bf16"][optimizer]
    if optimizer != "Adagrad":
        assert found["warnings"] == []
        assert found["masters"] == ["master.0.bias", "master.0.weight", "master.1.weight"]
        return
    assert found["masters"] == []
    (warning,) = found["warnings"]
    assert "bf16 and fp16 shards of fully_shard have no float32 masters with Adagrad" in warning
    assert "AdamW, Adam and SGD have" in warning
