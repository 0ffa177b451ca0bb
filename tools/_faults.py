"""Builds the shim of ``_faults.c`` and starts programs with it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from megacontext.errors import InputError

FAULTS: Final[dict[str, tuple[int, int]]] = {
    "full disk": (0, errno.ENOSPC),
    "disk stays full": (1, errno.ENOSPC),
    "input/output error": (0, errno.EIO),
    "read-only from here on": (1, errno.EROFS),
    "short write": (2, 0),
    "short write, then full": (3, errno.ENOSPC),
    "killed before": (4, 0),
    "killed within": (5, 0),
    "killed after": (6, 0),
    "read-only directory": (7, errno.EACCES),
}
"""What can go wrong: a kind of the shim's, and the error number that the call then gives."""

_SOURCE: Final = Path(__file__).with_name("_faults.c")
_ROOT: Final = _SOURCE.parents[1]


class Shim:
    """The library, preloaded into this process."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.fault_arm.argtypes = [
            ctypes.c_char_p,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_int,
        ]
        self._library.fault_disarm.restype = ctypes.c_long

    def arm(self, folder: Path, site: int, fault: str) -> None:
        """Lets call number ``site`` below ``folder`` go wrong, from now on."""
        self._library.fault_arm(os.fsencode(folder), site, *FAULTS[fault])

    @contextmanager
    def armed(self, folder: Path, site: int, fault: str) -> Generator[list[int]]:
        """Lets call number ``site`` below ``folder`` go wrong, within the block.

        Yields:
            A list that holds the number of calls seen once the block has ended.
        """
        calls: list[int] = []
        self.arm(folder, site, fault)
        try:
            yield calls
        finally:
            calls.append(int(self._library.fault_disarm()))


def preloaded_shim() -> Shim | None:
    """The shim, where this process was started with it."""
    path = os.environ.get("LD_PRELOAD", "")
    return Shim(path) if path.endswith(f"{_SOURCE.stem}.so") else None


def compiler() -> str | None:
    """A C compiler on a system where the shim works."""
    return shutil.which("cc") if sys.platform == "linux" else None


def start(module: str, arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Starts ``python -m MODULE``, with the shim where it can be built.

    Args:
        module: the program; it is spoken with through its standard input and output.
        arguments: its arguments.
        folder: where the shim is built.

    Raises:
        InputError: the compiler fails.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    command = compiler()
    if command is not None:
        shim = folder / f"{_SOURCE.stem}.so"
        built = subprocess.run(  # noqa: S603
            [command, "-shared", "-fPIC", "-o", str(shim), str(_SOURCE), "-ldl"],
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise InputError(f"{_SOURCE.name}: {command} fails: {' '.join(built.stderr.split())}")
        environment["LD_PRELOAD"] = str(shim)
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=_ROOT,
    )


def answer(program: subprocess.Popen[str]) -> str:
    """The next line of a program's output.

    Raises:
        InputError: it has ended.
    """
    line = program.stdout.readline() if program.stdout else ""
    if not line:
        status = program.wait()
        raise InputError(f"the program under test has ended with status {status}; see above why")
    return line
