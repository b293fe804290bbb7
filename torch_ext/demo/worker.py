"""Each run in a process of its own: peak memory is then the run's, and nothing is left behind by
the run before. ``python -m torch_ext.demo.worker`` is the child's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .comparison import Variant, find_variant
from .corpus import CorpusError
from .options import Options
from .training import RunResult, TrainingError, train

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_EXPLAINED = 3  # exit status: the child has said on standard error what is wrong


class RunFailed(Exception):
    """A child process did not finish; ``explained`` when it has said why itself."""

    def __init__(self, message: str, explained: bool) -> None:
        super().__init__(message)
        self.explained = explained


def run_in_subprocess(variant: Variant, options: Options) -> RunResult:
    """Trains in a child process that shares the terminal; raises RunFailed if it fails."""
    environment = dict(os.environ)
    search_path = [str(_PACKAGE_PARENT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in search_path if part)
    with tempfile.TemporaryDirectory(prefix="torch_ext_demo_") as folder:
        result_file = Path(folder) / "result.json"
        request = {
            "variant": variant.name,
            "options": options.to_json(),
            "result": str(result_file),
        }
        child = subprocess.run(
            [sys.executable, "-m", "torch_ext.demo.worker"],
            input=json.dumps(request),
            text=True,
            env=environment,
            check=False,
        )
        if child.returncode != 0:
            raise RunFailed(
                f"the {variant.title} run ended with exit status {child.returncode}",
                explained=child.returncode == _EXPLAINED,
            )
        return RunResult(**json.loads(result_file.read_text()))


def main() -> int:
    request = json.load(sys.stdin)
    try:
        result = train(find_variant(request["variant"]), Options(**request["options"]))
    except (TrainingError, CorpusError) as error:
        print(f"torch_ext.demo: error: {error}", file=sys.stderr)
        return _EXPLAINED
    Path(request["result"]).write_text(json.dumps(result.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
