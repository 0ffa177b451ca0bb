"""What the suite ``proof`` has measured so far, kept so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megacontext.config import FrozenConfig
from megacontext.errors import InputError

_FILE = "proof.jsonl"


class Record(FrozenConfig):
    """One rival's answer to one question, or its NLL of one block of a stream.

    Attributes:
        setup: digest of the settings and models that it depends on.
        cell: name of the cell.
        rival: who.
        number: of the question, or block, in its cell.
        seed: of the questions.
        commit: of the code.
        history: number of the history in its cell.
        tokens: of the history.
        ingest_s: seconds in which the history became a memory.
        index_s: seconds in which the rival indexed it besides; none where it does not.
        seconds: of the answer.
        written: the answer.
        score: from 0 to 1.
        evidence: share of the spans needed that were wholly raw when the answer began.
        position: where the block begins.
        nll: nats per token of the block.
        swap_rate: of the rival's engine so far, if it has one.
        peak_rss_mb: most resident memory of the process so far.
        refused: why the rival cannot be asked; empty where it can.
    """

    setup: str
    cell: str
    rival: str
    number: int
    seed: int
    commit: str
    history: int = 0
    tokens: int = 0
    ingest_s: float = 0.0
    index_s: float | None = None
    seconds: float | None = None
    written: str = ""
    score: float | None = None
    evidence: float | None = None
    position: int | None = None
    nll: float | None = None
    swap_rate: float | None = None
    peak_rss_mb: float = 0.0
    refused: str = ""


class Records:
    """Records by cell, rival, set-up and number, in one file of JSON lines.

    A line that an interruption cut short is dropped; what it would have said is measured again.
    Where two lines tell of the same, the later one counts.

    Args:
        folder: where the file lies; made where missing. ``None`` keeps records in memory alone.

    Raises:
        InputError: the folder or its file cannot be used, or the file holds something else.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / _FILE
        self._found: dict[tuple[str, str, str], dict[int, Record]] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            *lines, cut_short = self._path.read_bytes().split(b"\n")
            if cut_short:
                self._path.write_bytes(b"".join(line + b"\n" for line in lines))
        except OSError as error:
            raise InputError(f"work={folder}: cannot be used: {error.strerror}") from None
        for number, line in enumerate(lines, start=1):
            try:
                self._keep(Record.model_validate_json(line))
            except ValueError:
                raise InputError(
                    f"{self._path}: line {number} is no record of this suite; name another folder"
                ) from None

    def of(self, cell: str, rival: str, setup: str) -> dict[int, Record]:
        """What a rival did in a cell under one set-up, by number."""
        return self._found.get((cell, rival, setup), {})

    def add(self, records: Iterable[Record]) -> None:
        """Keeps records, on disk before this returns.

        Raises:
            InputError: they cannot be written.
        """
        lines: list[str] = []
        for record in records:
            self._keep(record)
            lines.append(record.model_dump_json(exclude_defaults=True) + "\n")
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written: {error.strerror}") from None

    def _keep(self, record: Record) -> None:
        key = record.cell, record.rival, record.setup
        self._found.setdefault(key, {})[record.number] = record
