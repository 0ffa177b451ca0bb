"""One fuzz target under libFuzzer: ``python -m tools._fuzz_runner TARGET [libFuzzer options]``.

Whatever the bytes are: a result, or one of our errors in one line. Anything else ends the process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Installed with the extra "fuzz" only.
import atheris as untyped_atheris  # pyright: ignore[reportMissingImports]

atheris: Any = untyped_atheris

with atheris.instrument_imports(include=["megacontext"]):
    import torch

    from megacontext.checkpoints import read_config, read_weights
    from megacontext.config import load_config
    from megacontext.errors import InvariantError, MegaContextError
    from megacontext.gistnet import GistNetConfig
    from megacontext.memory.acknowledgement import NAME, Acknowledgement
    from megacontext.memory.catalog_rows import read_file, read_identity, read_source
    from megacontext.memory.ctx_file import CtxFile
    from megacontext.runtime.session import SessionConfig
    from megacontext.runtime.text_files import decoded

_FOLDER = Path(tempfile.mkdtemp(prefix="megacontext-fuzz-"))
_EXPECTED = {"a": torch.empty(2, 3)}


def _written(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


def fuzz_ctx(data: bytes) -> None:
    """A ``.ctx`` file."""
    file = CtxFile.open(_written("L0.ctx", data))
    file.map()
    file.close()


def fuzz_note(data: bytes) -> None:
    """The note of the last commit."""
    _written(NAME, data)
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
    read_weights(_written("model.safetensors", data), _EXPECTED)


def fuzz_text(data: bytes) -> None:
    """A text file, in pieces."""
    size = 1 + (data[0] if data else 0) % 7
    pieces = [data[place : place + size] for place in range(0, len(data), size)]
    if "".join(decoded(pieces, "text")).encode() != data:
        raise InvariantError("the text\nis another")


def fuzz_rows(data: bytes) -> None:
    """Rows of the catalog."""
    provider = atheris.FuzzedDataProvider(data)
    values = [_value(provider) for _ in range(10)]
    keys = ("base_model", "tokenizer_hash", "gist_version", "block_size", "gist_width")
    rest = ("key_width", "gist_dtype")
    for read in (
        lambda: read_source(values, 100, _FOLDER),
        lambda: read_file(values[:8], _FOLDER),
        lambda: read_identity(dict(zip((*keys, *rest), values, strict=False)), _FOLDER),
    ):
        try:
            read()
        except MegaContextError as error:
            _require_line(error)


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


def _require_line(error: MegaContextError) -> None:
    if "\n" in str(error):
        raise AssertionError(f"not one line: {error}")


TARGETS: dict[str, Callable[[bytes], None]] = {
    name.removeprefix("fuzz_"): target
    for name, target in list(globals().items())
    if name.startswith("fuzz_")
}


def main() -> None:
    """Runs libFuzzer, which ends the process."""
    target = TARGETS[sys.argv.pop(1)]

    def run_one(data: bytes) -> None:
        try:
            target(data)
        except MegaContextError as error:
            _require_line(error)

    atheris.Setup(sys.argv, run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
