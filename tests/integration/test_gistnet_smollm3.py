"""The SmolLM3 recipe of GistNet, run on a model of that architecture that fits a test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import ROOT, run_module
from tiny_models import tiny_tokenizer
from tiny_training import write_corpus
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from megacontext.config import load_config
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import load_gistnet
from megacontext.training.train_gistnet import TrainGistNetConfig

RECIPE = Path("configs/train/gistnet_smollm3.yaml")
LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 8
STEPS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """SmolLM3 with random weights; as in the real one, every fourth layer has no rotary positions.

    It is 32 wide, so that the recipe's 16 heads split it.
    """
    folder = tmp_path_factory.mktemp("model")
    config = SmolLM3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    assert config.no_rope_layers == [1, 1, 1, 0]
    torch.manual_seed(0)
    SmolLM3ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> tuple[Path, dict[str, Any]]:
    """The recipe's own windows, patterns and shape; less width, fewer rows and steps."""
    folder = tmp_path_factory.mktemp("recipe")
    phases = yaml.safe_load((ROOT / RECIPE).read_text())["phases"]
    short = [phase | {"rows": 1, "steps": STEPS} for phase in phases]
    values = {
        "output": folder / "run",
        "model": model,
        "corpus": f"[{write_corpus(folder)}]",
        "device": "cpu",
        "dtype": "float32",
        "compile": "false",
        "gistnet.d_ff": 48,
        "gistnet.reader_d_ff": 48,
        "gistnet.kv_rank": 16,
        "phases": json.dumps(short),
        "optimizer.warmup_steps": 2,
        "workers": 0,
        "log_every": 1,
        "probe_batches": 1,
    }
    settings = [f"--set={key}={value}" for key, value in values.items()]
    done = run_module("tools.train_gistnet", f"--config={RECIPE}", *settings, "--json=-")
    assert done.status == 0, done.err
    return folder / "run", done.result | {"phases": len(phases)}


def test_every_step_of_the_curriculum_has_a_finite_loss(trained):
    run, result = trained
    assert result["steps"] == result["phases"] * STEPS
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, result["steps"] + 1))
    assert all(loss is not None and math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert all(line["norm"] > 0 for line in lines if "norm" in line)
    (probe,) = [line["probe"] for line in lines if "probe" in line]
    assert set(probe) == {"kl_prose", "kl_recall"}
    assert all(math.isfinite(value) for value in probe.values())


def test_the_exported_gistnet_reads_as_keys_and_values_of_every_layer(trained, model):
    _, result = trained
    base = BaseModel.from_pretrained(model)
    assert base.rotation.rotated_layers == [0, 1, 2]
    gistnet = load_gistnet(result["gistnet"], base, str(model))
    size, slots = gistnet.config.block_size, gistnet.cost
    assert (size, slots, gistnet.config.pooling) == (32, 6, "slots")
    n = 9
    ids = base.encode("Once upon a time, far away. " * 20)[: n * size]
    gists = gistnet.encode_level(base.embed(ids), 1)
    assert gists.vectors.shape == (n, base.d_model)
    keys, values = gistnet.read_kv(gists.vectors, torch.ones(n, dtype=torch.int64))
    assert keys.shape == values.shape == (LAYERS, n, slots, KV_HEADS, HEAD_DIM)
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_the_recipe_fits_the_real_model():
    """SmolLM3-3B's own dimensions, which are the defaults of its class, without memory for them."""
    recipe = load_config(TrainGistNetConfig, ROOT / RECIPE)
    with torch.device("meta"):
        model = SmolLM3ForCausalLM(SmolLM3Config(dtype="bfloat16"))
        base = BaseModel(model, tiny_tokenizer(), recipe.model)
        gistnet = recipe.gistnet.build(base, seed=0)
    config = gistnet.config
    assert (config.d_model, config.gist_width) == (2048, 2048)
    assert (config.kv_layers, config.kv_heads, config.kv_head_dim) == (36, 4, 128)
    assert max(phase.length for phase in recipe.phases) <= base.max_positions
    parameters = sum(p.numel() for p in gistnet.parameters())
    assert f"GistNet {parameters / 1e9:.2f} G parameters" in (ROOT / RECIPE).read_text()
