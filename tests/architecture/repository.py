"""What the architecture tests look at: the files that are under version control, or may be next."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".venv", "__pycache__", "node_modules"}
OUTPUTS = {"build", "data", "dist", "runs", "site"}


@cache
def tracked_files() -> tuple[Path, ...]:
    """Paths relative to the root; outside a git checkout, all files but caches and outputs."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0 and (ROOT / ".git").exists():
        names = {Path(os.fsdecode(name)) for name in listing.stdout.split(b"\0") if name}
    else:
        names = {
            path.relative_to(ROOT)
            for path in ROOT.rglob("*")
            if not NOT_OURS & set(path.relative_to(ROOT).parts)
            and path.relative_to(ROOT).parts[0] not in OUTPUTS
            and not any(part.endswith(("_cache", ".egg-info")) for part in path.parts)
        }
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


def python_files(*folders: str) -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in folders]


def text_lines(path: Path) -> list[str]:
    """The lines of a text file; none for a binary one."""
    content = (ROOT / path).read_bytes()
    return [] if b"\0" in content[:8192] else content.decode("utf-8", "replace").splitlines()
