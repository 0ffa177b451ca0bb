"""Gists stored as int8 beside fp16: what the predictions lose, and what the disk saves.

Run with ``./bootstrap pytest benchmarks/test_gist_formats.py --benchmark-enable -s``; the lines
printed have the numbers. Both formats read the same windows.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.evaluation.gist_formats import nll_by_format
from megacontext.evaluation.metrics import mean
from megacontext.evaluation.substitution_suite import (
    SubstitutionSuiteConfig,
    recall_stream,
    spread_windows,
    substitutions,
)
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import load_gistnet, load_lens
from megacontext.runtime.engine import Engine

MODEL = "bundled:tiny"
WINDOWS = int(os.environ.get("GIST_FORMATS_WINDOWS", "100"))
STORED_CHARACTERS = 300_000


@pytest.fixture(scope="module")
def base():
    return BaseModel.from_pretrained(MODEL)


@pytest.mark.parametrize("gistnet", ["bundled", "mean"])
@pytest.mark.parametrize("source", ["prose", "recall"])
def test_delta_nll(benchmark, base, gistnet, source):
    net = load_gistnet(gistnet, base, MODEL)
    prose = read_book(DemoConfig(model=MODEL))
    stream = base.encode(prose) if source == "prose" else recall_stream(base, prose, WINDOWS, 0)
    shapes = substitutions(SubstitutionSuiteConfig(model=MODEL), net)

    def run() -> None:
        for name in ("L1.N8", "L1.N32", "L2"):
            ids = spread_windows(stream, WINDOWS, shapes[name].tokens(net.config.block_size))
            nll = nll_by_format(base, net, ids, shapes[name])
            delta = (nll["int8"] - nll["fp16"]).mean(1)
            found = mean(delta.tolist())
            print(
                f"\n{gistnet} {source} {name}: {found.value:+.6f} nats "
                f"[{found.low:+.6f}, {found.high:+.6f}], n = {found.n}; "
                f"fp16 {float(nll['fp16'].mean()):.4f}, largest {float(delta.abs().max()):.5f}"
            )
            assert torch.isfinite(delta).all()

    benchmark.pedantic(run, rounds=1)


@pytest.mark.parametrize("gistnet", ["bundled", "mean"])
def test_bytes_per_token(benchmark, base, gistnet, tmp_path):
    net = load_gistnet(gistnet, base, MODEL)
    lens = load_lens(None, base, net, MODEL)
    text = read_book(DemoConfig(model=MODEL, max_characters=STORED_CHARACTERS))

    def run() -> None:
        for dtype in ("fp16", "int8"):
            identity = replace(Engine.identity(base, net, lens), gist_dtype=dtype)
            with Memory.create(tmp_path / f"{dtype}.mctx", identity) as memory:
                Engine(base, memory, gistnet=net, lens=lens).ingestor.ingest(text)
                stats = memory.stats()
            parts = {
                part: round(size / stats["tokens"], 3) for part, size in stats["bytes"].items()
            }
            print(f"\n{gistnet} {dtype}: {stats['bytes_per_token']:.2f} bytes a token, {parts}")

    benchmark.pedantic(run, rounds=1)
