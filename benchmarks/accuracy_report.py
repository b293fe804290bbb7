"""Errors against float64 as text, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from environment import Environment


@dataclass(frozen=True)
class Errors:
    """Relative errors in norm of the output and of each gradient, by name."""

    workload: str
    names: tuple[str, ...]
    torch: tuple[float, ...]
    torch_ext: tuple[float, ...]


def format_errors(errors: Errors) -> str:
    """One line for each tensor."""
    lines = [errors.workload]
    for name, stock, ours in zip(errors.names, errors.torch, errors.torch_ext, strict=True):
        note = "" if ours <= stock * 1.05 else "  above torch's"
        lines.append(f"  {name:<22} torch {stock:.2e}   torch_ext {ours:.2e}{note}")
    return "\n".join(lines)


def write_csv(errors: Sequence[Errors], path: Path) -> None:
    """One line for each tensor."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("workload", "tensor", "torch_error", "torch_ext_error"))
        for row in errors:
            for name, *values in zip(row.names, row.torch, row.torch_ext, strict=True):
                writer.writerow((row.workload, name, *(f"{value:.3e}" for value in values)))


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
