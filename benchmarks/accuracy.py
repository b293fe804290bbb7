"""How far each peer is from the same computation in float64, beside its speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from machine import Environment
from peers import make_inputs, reference_of, results_of
from torch import Tensor
from workloads import Workload


@dataclass(frozen=True)
class Errors:
    """Relative errors in norm of the output and of each gradient, by name."""

    workload: str
    names: tuple[str, ...]
    torch: tuple[float, ...]
    torch_ext: tuple[float, ...]


def _relative(result: Tensor, reference: Tensor) -> float:
    reference = reference.double()
    return float((result.double() - reference).norm() / reference.norm().clamp_min(1e-300))


def measure_errors(workload: Workload, device: torch.device) -> Errors:
    """Both peers' errors. Without dropout, whose masks no two peers draw alike."""
    workload = replace(workload, dropout=0.0)
    reference = reference_of(workload, device)
    names = ["out"]
    if workload.measured == "forward_backward":
        inputs = make_inputs(workload, device)
        if inputs.module is not None:
            names += [
                "grad_input",
                *(f"grad_{name}" for name, _ in inputs.module.named_parameters()),
            ]
        else:
            names += ["grad_query", "grad_key", "grad_value", "grad_mask"][: len(inputs.leaves)]
    errors = {}
    for peer in ("torch", "torch_ext"):
        results = results_of(peer, make_inputs(workload, device))
        errors[peer] = tuple(_relative(a, b) for a, b in zip(results, reference, strict=True))
    return Errors(workload.name, tuple(names), errors["torch"], errors["torch_ext"])


def format_errors(errors: Errors) -> str:
    """One line for each tensor."""
    lines = [errors.workload]
    for name, stock, ours in zip(errors.names, errors.torch, errors.torch_ext, strict=True):
        note = "" if ours <= stock * 1.05 else "  above torch's"
        lines.append(f"  {name:<22} torch {stock:.2e}   torch_ext {ours:.2e}{note}")
    return "\n".join(lines)


def write_json(environment: Environment, errors: Sequence[Errors], path: Path) -> None:
    """What read_json reads back."""
    content = {"environment": environment.to_json(), "errors": [asdict(row) for row in errors]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> tuple[Environment, list[Errors]]:
    """Environment and errors of a file that write_json wrote."""
    content = json.loads(path.read_text())
    errors = [
        Errors(row["workload"], tuple(row["names"]), tuple(row["torch"]), tuple(row["torch_ext"]))
        for row in content["errors"]
    ]
    return Environment.from_json(content["environment"]), errors
