"""One fuzz target under libFuzzer: ``python -m tools._fuzz_runner TARGET [libFuzzer options]``.

Whatever the bytes are: a result, or one of our errors in one line. Anything else ends the process.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# Installed with the extra "fuzz" only.
import atheris as untyped_atheris  # pyright: ignore[reportMissingImports]

atheris: Any = untyped_atheris

with atheris.instrument_imports(include=["megacontext"]):
    from megacontext.checkpoints import read_config, read_weights
    from megacontext.config import load_config
    from megacontext.errors import InvariantError, MegaContextError
    from megacontext.gistnet import GistNetConfig
    from megacontext.memory import Memory
    from megacontext.memory.acknowledgement import NAME, Acknowledgement
    from megacontext.memory.catalog_rows import (
        read_chunk,
        read_file,
        read_identity,
        read_source,
        read_unfinished,
    )
    from megacontext.memory.ctx_file import CtxFile
    from megacontext.runtime.recording_format import read_calls, read_header
    from megacontext.runtime.session import SessionConfig
    from megacontext.runtime.text_files import decoded
    from tools._fuzz_seeds import EXPECTED_WEIGHTS, sealed_header, sealed_note, write_seeds
    from tools._memory_script import read, small_memory

_FOLDER = Path(tempfile.mkdtemp(prefix="megacontext-fuzz-"))


def _written(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


def fuzz_ctx(data: bytes) -> None:
    """A ``.ctx`` file, as it is and with the checksum that goes with it."""
    for raw in (sealed_header(data), data):
        with _told():
            file = CtxFile.open(_written("L0.ctx", raw))
            file.map()
            file.close()


def fuzz_note(data: bytes) -> None:
    """The note of the last commit, as it is and with the checksums that go with it."""
    for raw in (sealed_note(data), data):
        with _told():
            _written(NAME, raw)
            Acknowledgement.read(_FOLDER)


def fuzz_config(data: bytes) -> None:
    """A configuration file."""
    load_config(SessionConfig, _written("run.yaml", data))


def fuzz_override(data: bytes) -> None:
    """What follows ``--set``."""
    load_config(SessionConfig, None, data.decode("utf-8", "surrogateescape").split("\n"))


def fuzz_checkpoint(data: bytes) -> None:
    """A checkpoint's configuration."""
    _written("config.json", data)
    read_config(_FOLDER, "gistnet", GistNetConfig)


def fuzz_weights(data: bytes) -> None:
    """A checkpoint's weights."""
    read_weights(_written("model.safetensors", data), EXPECTED_WEIGHTS)


def fuzz_text(data: bytes) -> None:
    """A text file, in pieces."""
    size = 1 + (data[0] if data else 0) % 7
    pieces = [data[place : place + size] for place in range(0, len(data), size)]
    if "".join(decoded(pieces, "text")).encode() != data:
        raise InvariantError("the text\nis another")


def fuzz_recording(data: bytes) -> None:
    """The recording of a session."""
    path = _written("session.jsonl", data)
    read_header(path)
    for _ in read_calls(path):
        pass


def fuzz_memory(data: bytes) -> None:
    """A memory, any bytes of whose files are others; what ``verify`` passes says what it said."""
    whole, said = _whole_memory()
    path = _FOLDER / "m.mctx"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    provider = atheris.FuzzedDataProvider(data)
    files = sorted(path.iterdir())
    for _ in range(provider.ConsumeIntInRange(1, 4)):
        file = files[provider.ConsumeIntInRange(0, len(files) - 1)]
        place = provider.ConsumeIntInRange(0, file.stat().st_size)
        with file.open("r+b") as raw:
            raw.seek(place)
            raw.write(provider.ConsumeBytes(16))
    found = None
    with _told():
        found = read(path)
    with _told():
        if Memory.verify_path(path).ok and found != said:
            raise InvariantError("verify\npasses another memory")


@cache
def _whole_memory() -> tuple[Path, dict[str, Any]]:
    path = _FOLDER / "whole.mctx"
    small_memory(path)
    said = read(path)
    return path, said


def fuzz_rows(data: bytes) -> None:
    """Rows of the catalog."""
    provider = atheris.FuzzedDataProvider(data)
    values = [_value(provider) for _ in range(10)]
    keys = ("base_model", "tokenizer_hash", "gist_version", "block_size", "gist_width")
    rest = ("key_width", "gist_dtype")
    for read_rows in (
        lambda: read_source(values, 100, _FOLDER),
        lambda: read_file(values[:8], _FOLDER),
        lambda: read_identity(dict(zip((*keys, *rest), values, strict=False)), _FOLDER),
        lambda: read_chunk(values[:3], _FOLDER),
        lambda: read_unfinished(values[0], _FOLDER),
    ):
        with _told():
            read_rows()


def _value(provider: Any) -> object:
    kinds: tuple[Callable[[], object], ...] = (
        lambda: provider.ConsumeInt(8),
        provider.ConsumeFloat,
        lambda: provider.ConsumeBytes(12),
        lambda: provider.ConsumeUnicodeNoSurrogates(12),
        lambda: None,
        lambda: "tokens",
        lambda: "L0.ctx",
    )
    return kinds[provider.ConsumeIntInRange(0, len(kinds) - 1)]()


@contextmanager
def _told() -> Generator[None]:
    """Lets an error of ours pass if it is one line."""
    try:
        yield
    except MegaContextError as error:
        if "\n" in str(error):
            raise AssertionError(f"not one line: {error}") from None


TARGETS: dict[str, Callable[[bytes], None]] = {
    name.removeprefix("fuzz_"): target
    for name, target in list(globals().items())
    if name.startswith("fuzz_")
}


def main() -> None:
    """Runs libFuzzer, which ends the process."""
    name = sys.argv.pop(1)
    seeds = _FOLDER / "seeds"
    seeds.mkdir()
    write_seeds(name, seeds)

    def run_one(data: bytes) -> None:
        with _told():
            TARGETS[name](data)

    atheris.Setup([*sys.argv, str(seeds)], run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
