"""Every file in configs/ is read by the configuration class that its tool uses."""

from __future__ import annotations

import importlib
from pathlib import Path

from architecture.repository import ROOT, tracked_files

from megacontext.config import FrozenConfig, load_config

# The first pattern (relative to configs/) that matches a file names its class.
CONFIG_TYPES = (
    ("tables.yaml", "tools.fill_tables:FillTablesConfig"),
    ("data/*.yaml", "megacontext.training.prepare_dataset:PrepareDatasetConfig"),
    ("runs/base_llm.yaml", "megacontext.evaluation.decode_demo:DecodeDemoConfig"),
    ("runs/demo.yaml", "megacontext.evaluation.demo:DemoConfig"),
    ("runs/poc_*.yaml", "megacontext.evaluation.poc_loop:PocLoopConfig"),
    ("train/gistnet_*.yaml", "megacontext.training.train_gistnet:TrainGistNetConfig"),
    ("train/lensnet_*.yaml", "megacontext.training.train_lensnet:TrainLensNetConfig"),
    ("train/small_gpu.yaml", "megacontext.training.train_base:TrainBaseConfig"),
    ("train/tiny_cpu.yaml", "megacontext.training.train_base:TrainBaseConfig"),
)


def config_files() -> list[Path]:
    return [
        path.relative_to("configs")
        for path in tracked_files()
        if path.parts[0] == "configs" and path.suffix != ".md"
    ]


def config_type(path: Path) -> type[FrozenConfig] | None:
    for pattern, target in CONFIG_TYPES:
        if path.match(pattern):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
    return None


def test_every_config_file_loads():
    for path in config_files():
        found = config_type(path)
        assert found is not None, f"configs/{path}: add a pattern for it to CONFIG_TYPES above"
        load_config(found, ROOT / "configs" / path)


def test_every_pattern_matches_a_file():
    idle = [
        pattern
        for pattern, _ in CONFIG_TYPES
        if not any(path.match(pattern) for path in config_files())
    ]
    assert not idle, f"patterns in CONFIG_TYPES that match no file: {idle}"
