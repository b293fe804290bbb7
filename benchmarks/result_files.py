"""Where figures go: CSV and JSON in results/, or wherever the command line says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environment import Environment

RESULTS = Path(__file__).resolve().parent / "results"


def choose_result_files(arguments: argparse.Namespace, stem: str) -> None:
    """--save: CSV and JSON in results/, where the command line names no others."""
    RESULTS.mkdir(exist_ok=True)
    arguments.csv = arguments.csv or RESULTS / f"{stem}.csv"
    arguments.json = arguments.json or RESULTS / f"{stem}.json"


def say_written(*paths: Path | None) -> None:
    """Names the files that there are."""
    for path in paths:
        if path:
            print(f"written: {path}")


def csv_text(value: object) -> str:
    """Six digits of a float; nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_rows(environment: Environment, rows: Sequence[Any], path: Path) -> None:
    """Dataclasses as JSON: what read_rows reads back."""
    content = {"environment": environment.to_json(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_rows(path: Path) -> tuple[Environment, list[dict[str, Any]]]:
    """The environment, and each row's fields."""
    content = json.loads(path.read_text())
    return Environment.from_json(content["environment"]), content["rows"]
