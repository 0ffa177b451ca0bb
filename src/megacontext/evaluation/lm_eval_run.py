"""``python -m megacontext.evaluation.lm_eval_run``: lm-evaluation-harness with MegaContext in it.

Takes the same options as ``lm_eval`` and does the same, but knows the model ``megacontext``; and,
unless ``--include_path`` says otherwise, the tasks in ``lm_eval_tasks``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from megacontext.errors import MegaContextError

TASKS = Path(__file__).with_name("lm_eval_tasks")
_MODEL = "megacontext.evaluation.lm_eval_model:MegaContextLM"


def main() -> int:
    """Runs the harness's own command line; returns the exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]

        # Registers the harness's own models, which it does itself only into an empty registry.
        importlib.import_module("lm_eval.models")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        sys.stderr.write("lm_eval: not installed; install megacontext[lm-eval]\n")
        return MegaContextError.exit_code
    if "megacontext" not in model_registry:
        model_registry.register("megacontext", target=_MODEL)
    options = [word.split("=")[0] for word in sys.argv[1:]]
    if options and not {"--include_path", "--help", "-h"} & set(options):
        sys.argv += ["--include_path", str(TASKS)]
    try:
        cli_evaluate()
    except MegaContextError as error:
        sys.stderr.write(f"lm_eval: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
