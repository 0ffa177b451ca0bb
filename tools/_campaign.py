"""What the campaigns share: a log of finished cases to resume from, and what comes of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

from megacontext.closing import Closing
from megacontext.errors import InputError, InvariantError

BROKEN: Final = "broken"
_LOG: Final = "cases.jsonl"


class CaseLog(Closing):
    """Outcomes by case, one JSON line each; a case that is in the log is not run again.

    Args:
        folder: where the log lies; ``None`` keeps it in memory.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.outcomes: dict[str, str] = {}
        self._file = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _LOG
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]
            for line in whole:
                case = json.loads(line)
                self.outcomes[case["case"]] = case["outcome"]
            self._file = path.open("r+b" if path.exists() else "xb")
            # A line that was cut off is written again.
            self._file.truncate(sum(map(len, whole)))
            self._file.seek(0, 2)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: no folder for a campaign's log: {error}") from None

    def __contains__(self, case: str) -> bool:
        return case in self.outcomes

    def add(self, case: str, outcome: str) -> None:
        """Records a case at once, so that nothing is lost if the campaign is cut off."""
        self.outcomes[case] = outcome
        if self._file is not None:
            self._file.write(json.dumps({"case": case, "outcome": outcome}).encode() + b"\n")
            self._file.flush()

    def summary(self) -> dict[str, Any]:
        """Number of cases, and how many had each outcome.

        Raises:
            InvariantError: a promise was broken; names the first case.
        """
        for case, outcome in self.outcomes.items():
            if outcome.startswith(BROKEN):
                count = sum(other.startswith(BROKEN) for other in self.outcomes.values())
                raise InvariantError(
                    f"{count} of {len(self.outcomes)} cases broke a promise, first {case}: "
                    f"{outcome.removeprefix(BROKEN).strip(': ')}"
                )
        counted = Counter(self.outcomes.values())
        return {"cases": len(self.outcomes), "outcomes": dict(sorted(counted.items()))}

    def close(self) -> None:
        """Ends the log."""
        if self._file is not None:
            self._file.close()
