"""The SmolLM3 recipe of LensNet, run on a model of that architecture that fits a test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import ROOT, run_module
from engine_cases import learned_gistnet, words
from tiny_models import tiny_tokenizer
from tiny_training import write_corpus
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from megacontext.config import load_config
from megacontext.gistnet import GistNet
from megacontext.lensnet import SnapshotDataset
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.session import Session, SessionConfig
from megacontext.training.train_gistnet import TrainGistNetConfig
from megacontext.training.train_lensnet import TrainLensNetConfig

RECIPE = Path("configs/train/lensnet_smollm3.yaml")
GIST_RECIPE = Path("configs/train/gistnet_smollm3.yaml")
STEPS = 2
BUDGET = 448


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """SmolLM3 with random weights, every fourth layer without rotary positions, and its gists."""
    folder = tmp_path_factory.mktemp("recipe")
    config = SmolLM3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    assert config.no_rope_layers == [1, 1, 1, 0]
    torch.manual_seed(0)
    SmolLM3ForCausalLM(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    base = BaseModel.from_pretrained(folder / "model")
    # As the recipe of its GistNet reads them: six entries a gist, as keys and values.
    learned_gistnet(base, slots=6).save_pretrained(folder / "gistnet")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> dict[str, Any]:
    """The recipe's own rounds and shape; less text, fewer sessions and steps."""
    rounds = yaml.safe_load((ROOT / RECIPE).read_text())["rounds"]
    little = {"sessions": 1, "tokens": [128], "facts": 2, "asks": 1, "proposals": 2, "horizon": 8}
    values = {
        "output": folder / "run",
        "model": folder / "model",
        "gistnet": folder / "gistnet",
        "corpus": f"[{folder / 'corpus.txt'}]",
        "device": "cpu",
        "dtype": "float32",
        "keys.steps": STEPS,
        "keys.texts": 2,
        "keys.tokens": 192,
        "keys.facts": 2,
        "keys.probe_batches": 1,
        "rounds": json.dumps([r | little for r in rounds]),
        "scores.steps": STEPS,
        "scores.batch_size": 2,
        "engine.budget": BUDGET,
        "engine.tail_tokens": 64,
        "workers": 0,
        "log_every": 1,
    }
    settings = [f"--set={key}={value}" for key, value in values.items()]
    done = run_module("tools.train_lensnet", f"--config={RECIPE}", *settings, "--json=-")
    assert done.status == 0, done.err
    return done.result | {"rounds": len(rounds)}


def test_every_stage_has_a_finite_loss(folder, trained):
    assert trained["steps"] == STEPS * (1 + trained["rounds"])
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, trained["steps"] + 1))
    assert all(loss is not None and math.isfinite(loss) for loss in losses.values())
    for number in range(trained["rounds"]):
        data = SnapshotDataset(folder / f"run/snapshots/round-{number + 1}/part-0000")
        assert len(data) >= 3
        assert all(bool(data[i].cache_utility.isfinite().all()) for i in range(len(data)))


def test_the_exported_lens_answers_in_a_session(folder, trained, tmp_path):
    settings = SessionConfig.parse({
        "model": str(folder / "model"), "gistnet": folder / "gistnet", "policy": "lens",
        "lens": trained["lensnet"], "engine": {"budget": BUDGET, "tail_tokens": 64},
    })  # fmt: skip
    with Session(settings) as session:
        engine = session.create(tmp_path / "a.mctx")
        with engine.memory:
            engine.ingest(words(1500))
            assert isinstance(engine.ask("amber? ", query="amber", max_new_tokens=3), str)
            engine.context.check()


def test_the_recipe_fits_the_real_model():
    """SmolLM3-3B's own dimensions, which are the defaults of its class, without memory for them."""
    recipe = load_config(TrainLensNetConfig, ROOT / RECIPE)
    gists = load_config(TrainGistNetConfig, ROOT / GIST_RECIPE)
    assert recipe.model == gists.model
    assert recipe.gistnet == str(gists.output / "gistnet")
    with torch.device("meta"):
        model = SmolLM3ForCausalLM(SmolLM3Config(dtype="bfloat16"))
        base = BaseModel(model, tiny_tokenizer(), recipe.model)
        width = gists.gistnet.build(base, seed=0).config.gist_width
    # Of the gists only width and version matter, and weights without memory have no version.
    lens = recipe.lens.build(base, GistNet.untrained(width), seed=0)
    assert lens.config.key_vocabulary == base.vocab_size
    assert recipe.engine.budget <= base.max_positions
    parameters = sum(p.numel() for p in lens.parameters())
    assert f"{parameters / 1e6:.0f} M parameters" in (ROOT / RECIPE).read_text()
