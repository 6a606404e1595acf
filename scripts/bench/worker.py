"""python -m scripts.bench.worker SPEC: measure one case in this process, which is one of several ranks at most."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from scripts.bench.spec import Spec


def main() -> None:
    """Measure, and write the result where the specification says."""
    spec = Spec.read(Path(sys.argv[1]))
    if spec.trl is not None:
        sys.path.insert(0, spec.trl)
    os.environ["TQDM_DISABLE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    # Imported now: transformers looks for TRL's companion, accelerate, when it is imported.
    from transformers.utils import logging

    from scripts.bench import run_case

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    is_main = os.environ.get("RANK", "0") == "0"
    if spec.case == "prepare":
        run_case.prepare(spec)
        return
    found = run_case.measure(spec)
    if is_main:
        Path(spec.out).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
