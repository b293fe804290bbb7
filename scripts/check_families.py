#!/usr/bin/env python3
"""Tries attn_implementation="torch_ext" on every model type of transformers, and writes the table.

    scripts/check_families.py [--results FILE] [--table docs/huggingface.md] [model_type ...]

Each type runs as a tiny random model, forward and backward, padded and not (tests/python/
family_verdicts.py says how). Verdicts are appended to the results as they come, and types that are
there are not tried again: an interrupted run goes on. Some 25 minutes on two cores. Ends with 1
where a family computes something else than eager and sdpa.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "python")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CPU_SECONDS = 60  # for one type
BEGIN, END = "<!-- BEGIN families -->", "<!-- END families -->"


class _TooLong(BaseException):  # no `except Exception` on the way may swallow it
    pass


def _alarm(*_: Any) -> None:
    raise _TooLong


def load(results: Path) -> dict[str, dict[str, Any]]:
    if not results.exists():
        return {}
    rows = (json.loads(line) for line in results.read_text().splitlines())
    return {row["model_type"]: row for row in rows}


def check(model_types: list[str], results: Path) -> None:
    import family_verdicts
    import transformers

    from torch_ext.integrations import transformers as torch_ext_hf

    torch_ext_hf.register()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _alarm)
    done = load(results)
    results.parent.mkdir(parents=True, exist_ok=True)
    for index, model_type in enumerate(model_types):
        if model_type in done:
            continue
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            verdict = family_verdicts.judge(model_type)
        except _TooLong:
            verdict = family_verdicts.Verdict(
                model_type, "not built", reason=f"takes more than {CPU_SECONDS} s"
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if index % 50 == 0:
            gc.collect()
        with results.open("a") as file:
            file.write(json.dumps(verdict.as_dict()) + "\n")
        seconds = time.monotonic() - begun
        print(f"{model_type}: {verdict.status} {verdict.reason} ({seconds:.1f} s)", flush=True)


def _why(row: dict[str, Any]) -> str:
    reason = row["reason"]
    if "does not support an attention implementation" in reason:
        return 'does not support "sdpa"'
    if row["status"] == "fused" and not row["sdpa"]:
        return '"sdpa" is refused'
    return reason.replace("|", "\\|")


def table(rows: list[dict[str, Any]], model_types: list[str]) -> str:
    import torch
    import transformers

    counts = Counter(row["status"] for row in rows)
    built = [row for row in rows if row["status"] != "not built"]
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}: "
        f"{len(built)} of {len(model_types)} model types can be built small and run; "
        f"{counts['fused']} run fused with the numbers of stock, {counts['refused']} are refused, "
        f"{counts['no attention']} call no attention, {counts['wrong']} are wrong.",
        "",
        '| model type | class | `"torch_ext"` | `"sdpa"` with `enable()` | why |',
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(built, key=lambda row: row["model_type"]):
        cells = [row["model_type"], row["class_name"], row["status"], row["sdpa"] or "refused"]
        lines.append("| " + " | ".join([*cells, _why(row)]) + " |")
    lost = sorted(row["model_type"] for row in rows if row["status"] == "not built")
    lines += [
        "",
        f"Not tried, {len(lost)}: parts of models without an auto class, and types whose default "
        "configuration does not shrink by its fields' names or that take other inputs: "
        + ", ".join(lost)
        + ".",
    ]
    left = sorted(set(model_types) - {row["model_type"] for row in rows})
    if left:
        lines += ["", f"Not reached in this run, {len(left)}: " + ", ".join(left) + "."]
    return "\n".join(lines)


def write_table(page: Path, text: str) -> None:
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="default: all")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "families.jsonl")
    parser.add_argument("--table", type=Path, help="the page to write the table into")
    parser.add_argument("--table-only", action="store_true", help="of the results so far")
    options = parser.parse_args()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_types = options.model_types or list(CONFIG_MAPPING_NAMES)
    if not options.table_only:
        check(model_types, options.results)
    rows = [row for name, row in load(options.results).items() if name in model_types]
    if options.table:
        write_table(options.table, table(rows, model_types))
    wrong = [row for row in rows if "wrong" in (row["status"], row["sdpa"])]
    for row in wrong:
        print(f"WRONG: {row['model_type']} ({row['class_name']}): {row['reason']}")
    print(dict(Counter(row["status"] for row in rows)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
