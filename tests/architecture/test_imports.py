"""The import contract in pyproject.toml: packages import downward only, siblings not at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from architecture.repository import ROOT

LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT_IMPORTS, "--no-cache", "--config", "pyproject.toml"],
        cwd=folder,
        env={"PYTHONPATH": str(folder / "src"), "PATH": "", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_go_downward_only():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contract_sees_an_import_between_siblings(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("assets"))
    sinner = tmp_path / "src" / "megacontext" / "gistnet" / "__init__.py"
    sinner.write_text(sinner.read_text() + "\nimport megacontext.memory\n")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert "megacontext.gistnet -> megacontext.memory" in result.stdout
