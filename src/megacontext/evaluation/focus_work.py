"""Results that were measured already, kept so that an interrupted benchmark goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacontext.errors import InputError

_FILE = "focus.jsonl"


class FinishedWork:
    """Results by key, in one file of JSON lines.

    A line that an interruption cut short is dropped; what it would have said is measured again.

    Args:
        folder: where the file lies; made where missing. ``None`` keeps results in memory alone.

    Raises:
        InputError: the folder cannot be made or the file not read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / _FILE
        self._known: dict[str, Any] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                self._path.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                entry = json.loads(line)
                self._known[entry["key"]] = entry["result"]
        except OSError as error:
            raise InputError(f"work={folder}: cannot be used: {error.strerror}") from None
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{self._path}: not a file of finished results; name another folder"
            ) from None

    def __contains__(self, key: str) -> bool:
        """Whether ``key`` was measured."""
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        """The result of ``key``."""
        return self._known[key]

    def add(self, key: str, result: Any) -> None:
        """Keeps a result that JSON can hold.

        Raises:
            InputError: the file cannot be written.
        """
        self._known[key] = result
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written: {error.strerror}") from None
