from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import tiny_config, tiny_run, write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from megacontext.config import load_config
from megacontext.errors import CheckpointError, ConfigError, DataError, TrainingError
from megacontext.runtime.base_model import BaseModel
from megacontext.training.lm_batches import LMBatch
from megacontext.training.train_base import (
    ArchitectureConfig,
    BaseTrainer,
    Phase,
    TrainBaseConfig,
)

ROOT = Path(__file__).resolve().parents[3]
# Runs until its sixth step is logged, two steps after the checkpoint, and is killed there.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from tiny_training import tiny_config
from megacontext.training.train_base import BaseTrainer

class Killed(BaseTrainer):
    def _log(self, record):
        super()._log(record)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

Killed(tiny_config(Path(sys.argv[1]), log_every=3)).run()
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Eight steps without an interruption: the folder, and what it wrote."""
    folder = tmp_path_factory.mktemp("straight")
    write_corpus(folder)
    BaseTrainer(tiny_config(folder, log_every=3)).run()
    return folder


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path)
    return tmp_path


def log_of(folder):
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(folder):
    return [(r["step"], r["loss"], r["norm"], r["rate"]) for r in log_of(folder) if "loss" in r]


def checkpoint(folder):
    return folder / "run" / "checkpoint.safetensors"


def assert_ended_alike(folder, other):
    """The same weights and optimizer state in every bit, the same log, the same export."""
    for file in ("checkpoint.safetensors", "model/model.safetensors"):
        left, right = (load_file(f / "run" / file) for f in (folder, other))
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.dtype == right[name].dtype
            assert torch.equal(value, right[name]), (file, name)
    assert losses_of(folder) == losses_of(other)
    for name in ("tokenizer.json", "config.json"):
        exported = [(f / "run" / "model" / name).read_bytes() for f in (folder, other)]
        assert exported[0] == exported[1], name


class Interrupted(BaseTrainer):
    """Stops at a step, as an exception or the end of a job's time would."""

    def __init__(self, config, at):
        self.at = at
        super().__init__(config)

    def _loss(self, body, batch):
        if self.step == self.at:
            raise KeyboardInterrupt
        return super()._loss(body, batch)


def interrupt(config, at):
    with pytest.raises(KeyboardInterrupt):
        Interrupted(config, at).run()


def test_training_lowers_the_loss(folder):
    config = tiny_config(
        folder,
        phases=[{"length": 64, "rows": 4, "steps": 40}],
        optimizer={"warmup_steps": 4, "muon_lr": 0.02, "adam_lr": 0.02},
        checkpoint_every=100,
    )
    BaseTrainer(config).run()
    losses = [loss for _, loss, _, _ in losses_of(folder)]
    assert len(losses) == 40
    # A fresh model knows nothing: every one of 512 tokens is as likely as the others.
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


def test_the_state_head_is_trained_resumed_and_left_out_of_the_model(tmp_path):
    stories = {"prose_share": 0, "recall_share": 1, "copy_share": 0, "story_share": 0.99}
    changes = {"state_head": {"layer": 1}, "mixture": {**stories, "state_labels": 2}}
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write_corpus(folder)
    straight = BaseTrainer(tiny_config(folders[0], **changes))
    first = {name: value.clone() for name, value in straight.head.state_dict().items()}
    straight.run()
    last = straight.head.state_dict()
    assert all(not torch.equal(first[name], last[name]) for name in first)
    interrupt(tiny_config(folders[1], **changes), 6)
    BaseTrainer(tiny_config(folders[1], **changes)).run()
    assert_ended_alike(*folders)
    exported = load_file(folders[0] / "run" / "model" / "model.safetensors")
    assert not any("head" in name and "lm_head" not in name for name in exported)


def test_a_state_head_behind_the_last_layer_is_refused(folder):
    with pytest.raises(ConfigError, match=r"state_head.layer is 3, architecture.layers is 2"):
        tiny_config(folder, state_head={"layer": 3})


@pytest.mark.parametrize("at", [1, 4, 7])
def test_an_interrupted_run_ends_as_one_that_was_not(straight, folder, at):
    interrupt(tiny_config(folder, log_every=3), at)
    # The caller's random numbers take no part.
    torch.manual_seed(1234)
    trainer = BaseTrainer(tiny_config(folder, log_every=3))
    assert trainer.step == (at // 4) * 4
    trainer.run()
    assert_ended_alike(folder, straight)


def test_a_killed_process_is_resumed_exactly(straight, folder):
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_RUN), str(folder)],
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()
    assert [record["step"] for record in log_of(folder)] == [3, 6]
    # What a process leaves that dies while it writes.
    for name in ("checkpoint.tmp", "tokenizer.part"):
        (folder / "run" / name).write_bytes(b"half")
    with (folder / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    trainer = BaseTrainer(tiny_config(folder, log_every=3))
    assert trainer.step == 4
    assert [record["step"] for record in log_of(folder)] == [3]
    trainer.run()
    assert_ended_alike(folder, straight)


def test_workers_draw_the_same_rows(straight, folder):
    BaseTrainer(tiny_config(folder, log_every=3, workers=1)).run()
    assert_ended_alike(folder, straight)


def test_a_finished_run_is_only_exported_again(straight, folder):
    BaseTrainer(tiny_config(folder, log_every=3)).run()
    trainer = BaseTrainer(tiny_config(folder, log_every=3))
    assert trainer.step == 8
    trainer.run()
    assert_ended_alike(folder, straight)


def test_the_seed_decides_weights_and_rows(straight, folder):
    BaseTrainer(tiny_config(folder, log_every=3, seed=1)).run()
    assert losses_of(folder) != losses_of(straight)


def test_the_log_has_losses_and_probes(straight):
    records = log_of(straight)
    assert [record["step"] for record in records] == [3, 6, 8]
    assert [record["rate"] for record in records[:2]] == [1.0, 1.0]
    assert records[-1]["probe_length"] == 64
    assert records[-1]["count"] >= sum(len(records[-1][key]) > 0 for key in ("exact", "first"))
    assert not re.search(r"NaN|Infinity", (straight / "run" / "log.jsonl").read_text())


def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(folder):
    interrupt(tiny_config(folder), 5)
    good = checkpoint(folder).read_bytes()
    hot = {"warmup_steps": 0, "muon_lr": 1e30, "adam_lr": 1e30}
    with pytest.raises(
        TrainingError, match=r"step 6: the loss is .*nan; lower `optimizer.muon_lr`"
    ):
        BaseTrainer(tiny_config(folder, optimizer=hot)).run()
    assert checkpoint(folder).read_bytes() == good
    assert BaseTrainer(tiny_config(folder)).step == 4


def test_weights_that_are_no_longer_finite_are_never_saved(folder):
    interrupt(tiny_config(folder), 5)
    good = checkpoint(folder).read_bytes()
    # The loss of the step that breaks the weights is still a number.
    hot = {"warmup_steps": 0, "muon_lr": 1e30, "weight_decay": 1e30}
    with pytest.raises(TrainingError, match=r"step 5: .* is no longer finite; lower"):
        BaseTrainer(tiny_config(folder, optimizer=hot, checkpoint_every=1)).run()
    assert checkpoint(folder).read_bytes() == good


def test_a_batch_without_a_scored_token_teaches_nothing(straight):
    trainer = BaseTrainer(tiny_config(straight, log_every=3))
    nothing = torch.empty(0, 5, dtype=torch.int64)
    batch = LMBatch(torch.ones(1, 40, dtype=torch.int64), torch.zeros(1, 40), nothing)
    loss = trainer._loss(trainer.model.model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_the_loss_is_the_weighted_mean_over_the_targets(straight):
    trainer = BaseTrainer(tiny_config(straight, log_every=3))
    ids = torch.randint(0, 512, (3, 30), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3, 30, generator=torch.Generator().manual_seed(1))
    weights[:, 10:14] = 0
    with torch.no_grad():
        nothing = torch.empty(0, 5, dtype=torch.int64)
        found = trainer._loss(trainer.model.model, LMBatch(ids, weights, nothing))
        logits = trainer.model(input_ids=ids).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    expected = (nll * weights[:, 1:]).sum() / weights[:, 1:].sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_export_loads_in_transformers_and_here(straight):
    model_folder = straight / "run" / "model"
    trainer = BaseTrainer(tiny_config(straight, log_every=3))
    trained = trainer.model.eval()
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "The fox went to the river.\nQuestion: Where is 12?\nAnswer:"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert ids.tolist() == trainer.tokenizer.encode(text).ids
    with torch.no_grad():
        wanted = trained(input_ids=ids[None]).logits
        found = plain(input_ids=ids[None]).logits
    # Stored as fp16.
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-3)
    assert load_file(model_folder / "model.safetensors")["model.norm.weight"].dtype == torch.float16

    base = BaseModel.from_pretrained(model_folder)
    assert base.encode(text).tolist() == ids.tolist()
    assert (base.n_layers, base.d_model, base.vocab_size, base.max_positions) == (2, 32, 512, 128)
    torch.testing.assert_close(base.features(ids) @ base.embed(torch.arange(512)).T, found[0],
                               rtol=1e-3, atol=1e-3)  # fmt: skip
    assert base.generation_config.eos_token_id == 0
    assert not base.generation_config.do_sample


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_checkpoint_is_refused(straight, folder, content):
    (folder / "run").mkdir()
    whole = checkpoint(straight).read_bytes()
    checkpoint(folder).write_bytes(whole[:-8] if content is None else content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: not a whole checkpoint"):
        BaseTrainer(tiny_config(folder))


def test_a_checkpoint_of_another_architecture_is_refused(straight, folder):
    (folder / "run").mkdir()
    checkpoint(folder).write_bytes(checkpoint(straight).read_bytes())
    for key, value, name in (("layers", 3, r"layers\.2"), ("intermediate_size", 64, r"mlp")):
        architecture = tiny_run(folder)["architecture"] | {key: value}
        with pytest.raises(CheckpointError, match=rf"tensor '.*{name}.*keep `architecture`"):
            BaseTrainer(tiny_config(folder, architecture=architecture))


def test_a_checkpoint_behind_the_last_step_is_refused(straight, folder):
    (folder / "run").mkdir()
    checkpoint(folder).write_bytes(checkpoint(straight).read_bytes())
    short = [{"length": 48, "rows": 1, "steps": 7}]
    with pytest.raises(ConfigError, match="is at step 8, `phases` have 7 steps; add steps"):
        BaseTrainer(tiny_config(folder, phases=short))


def test_checkpoints_of_before_the_log_was_kept_are_resumed(straight, folder):
    (folder / "run").mkdir()
    save_file(load_file(checkpoint(straight)), checkpoint(folder), metadata={"step": "8"})
    assert BaseTrainer(tiny_config(folder)).losses == []


def test_a_tokenizer_that_is_too_large_is_refused(straight, folder):
    (folder / "run").mkdir()
    larger = tiny_config(
        folder, architecture=tiny_run(folder)["architecture"] | {"vocab_size": 600}
    )
    assert BaseTrainer(larger).tokenizer.get_vocab_size() > 512
    with pytest.raises(DataError, match=r"tokenizer\.json: has \d+ tokens, .*vocab_size` is 512"):
        BaseTrainer(tiny_config(folder))


def test_a_corpus_that_is_too_small_is_refused(tmp_path):
    write_corpus(tmp_path, documents=3)
    with pytest.raises(DataError, match="has 3 documents, too few to hold out one in 16"):
        BaseTrainer(tiny_config(tmp_path))


def test_held_out_documents_are_not_trained_on(folder):
    trainer = BaseTrainer(tiny_config(folder, held_out_every=4))
    training, held_out = trainer.training.texts, trainer.held_out.texts
    assert (len(training), len(held_out)) == (15, 5)
    assert set(training).isdisjoint(held_out)
    assert trainer.sampler.prose is trainer.training
    assert trainer.probe_sampler.prose is trainer.held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": []}, "'phases' has value .*at least 1 item"),
        ({"corpus": []}, "'corpus' has value .*at least 1 item"),
        ({"held_out_every": 1}, "'held_out_every' has value 1: .*greater than or equal to 2"),
        ({"workers": -1}, "'workers' has value -1: .*greater than or equal to 0"),
        ({"tokenizer_characters": 9}, "'tokenizer_characters' has value 9: .*equal to 10000"),
        ({"log_every": 0}, "'log_every' has value 0: .*equal to 1"),
        ({"probe_every": 0}, "'probe_every' has value 0: .*equal to 1"),
        ({"probe_rows": 0}, "'probe_rows' has value 0: .*equal to 1"),
        ({"checkpoint_every": 0}, "'checkpoint_every' has value 0: .*equal to 1"),
        ({"optimizer": {"muon_lr": -1}}, "'optimizer.muon_lr' has value -1: .*greater than 0"),
        ({"mixture": {"answer_weight": 0}}, "'mixture.answer_weight' has value 0"),
        ({"epochs": 3}, "unknown key 'epochs'"),
        (
            {"phases": [{"length": 512, "rows": 1, "steps": 1}]},
            r"a phase has length 512, more than architecture.max_positions \(128\)",
        ),
    ],
)
def test_runs_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("config_type", "values", "message"),
    [
        (ArchitectureConfig, {"vocab_size": 100}, "'vocab_size' has value 100: .*equal to 512"),
        (
            ArchitectureConfig,
            {"vocab_size": 70000},
            "'vocab_size' has value 70000: .*equal to 65535",
        ),
        (ArchitectureConfig, {"hidden_size": 8}, "'hidden_size' has value 8: .*equal to 32"),
        (ArchitectureConfig, {"layers": 0}, "'layers' has value 0: .*equal to 1"),
        (ArchitectureConfig, {"head_dim": 33}, "'head_dim' has value 33: .*multiple of 2"),
        (ArchitectureConfig, {"rope_theta": 0}, "'rope_theta' has value 0: .*greater than 0"),
        (ArchitectureConfig, {"heads": 6}, r"heads \(6\) must be a multiple of kv_heads \(4\)"),
        (Phase, {"length": 16, "rows": 1, "steps": 1}, "'length' has value 16: .*equal to 32"),
        (Phase, {"length": 64, "rows": 5000, "steps": 1}, "'rows' has value 5000: .*equal to 4096"),
        (Phase, {"length": 64, "rows": 1, "steps": 0}, "'steps' has value 0: .*equal to 1"),
        (Phase, {"length": 64, "rows": 1}, "key 'steps' is missing"),
    ],
)
def test_parts_out_of_range_are_refused(config_type, values, message):
    with pytest.raises(ConfigError, match=message):
        config_type.parse(values)


def test_a_device_that_does_not_exist_is_refused(folder):
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        BaseTrainer(tiny_config(folder, device="abacus"))


def test_the_gpu_recipe_has_the_promised_size():
    config = load_config(TrainBaseConfig, ROOT / "configs" / "train" / "small_gpu.yaml")
    with torch.device("meta"):
        model = config.architecture.build()
    assert 25e6 < sum(p.numel() for p in model.parameters()) < 30e6
    assert {phase.length * phase.rows for phase in config.phases} == {131_072}
    assert [phase.length for phase in config.phases] == [128, 256, 512, 1024, 2048]


def test_the_gpu_recipe_runs_on_the_cpu(folder):
    path = ROOT / "configs" / "train" / "small_gpu.yaml"
    phases = [
        phase.model_dump() | {"rows": 1, "steps": 4, "length": min(phase.length, 160)}
        for phase in load_config(TrainBaseConfig, path).phases
    ]
    assert sum(phase["steps"] for phase in phases) == 20
    config = load_config(
        TrainBaseConfig,
        path,
        [
            f"output={folder / 'run'}",
            f"corpus=[{folder / 'corpus.txt'}]",
            "device=cpu",
            "compile=false",
            "workers=0",
            "tokenizer_characters=10000",
            "architecture.vocab_size=512",
            "architecture.hidden_size=64",
            "architecture.intermediate_size=96",
            "architecture.heads=4",
            "architecture.kv_heads=2",
            "architecture.head_dim=16",
            "architecture.layers=2",
            "mixed_precision=false",
            "probe_rows=1",
            "log_every=1",
            f"phases={json.dumps(phases)}",
        ],
    )
    exported = BaseTrainer(config).run()
    assert [step for step, *_ in losses_of(folder)] == list(range(1, 21))
    assert BaseModel.from_pretrained(exported).n_layers == 2
