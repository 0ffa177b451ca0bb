"""The public surface: every exported name is listed in exported_names.txt.

A new name is a promise to callers and a missing one breaks them: both should show in a review.
`./bootstrap python tests/architecture/test_exported_names.py` writes the list anew.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path

import megacontext

LIST = Path(__file__).with_name("exported_names.txt")


def public_packages() -> list[str]:
    """``megacontext`` and every package in it whose name does not begin with an underscore."""
    found = pkgutil.walk_packages(megacontext.__path__, "megacontext.")
    names = [info.name for info in found if info.ispkg]
    return ["megacontext", *(name for name in names if "._" not in name)]


def exported_names() -> list[str]:
    return sorted(
        f"{package}.{name}"
        for package in public_packages()
        for name in getattr(importlib.import_module(package), "__all__", ())
    )


def test_the_exported_names_are_the_listed_ones():
    listed = LIST.read_text(encoding="utf-8").splitlines()
    changes = "\n".join(
        difflib.unified_diff(listed, exported_names(), "listed", "exported", n=0, lineterm="")
    )
    assert not changes, (
        f"the exported names have changed:\n{changes}\n"
        "if that is meant: ./bootstrap python tests/architecture/test_exported_names.py"
    )


def test_every_package_exports_what_it_says():
    for package in public_packages():
        module = importlib.import_module(package)
        exported = getattr(module, "__all__", None)
        assert exported is not None, f"{package} has no __all__"
        assert len(set(exported)) == len(exported), f"{package}.__all__ names something twice"
        missing = [name for name in exported if not hasattr(module, name)]
        assert not missing, f"{package}.__all__ names what is not there: {missing}"


if __name__ == "__main__":
    LIST.write_text("".join(f"{name}\n" for name in exported_names()), encoding="utf-8")
