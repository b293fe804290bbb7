"""How far each peer is from the same computation in float64, beside its speed."""

from __future__ import annotations

from dataclasses import replace

import torch
from accuracy_report import Errors
from peers import make_inputs, reference_of, results_of
from torch import Tensor
from workloads import Workload


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
