from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model, tiny_base_model, tiny_tokenizer
from tiny_training import tiny_gist_config, tiny_gist_run, write_corpus

from megacontext.errors import CheckpointError, ConfigError, DataError, TrainingError
from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.training.lm_batches import END_OF_TEXT
from megacontext.training.prepare_dataset import PrepareDatasetConfig, prepare_dataset
from megacontext.training.train_gistnet import GistShapeConfig, GistTrainer, TrainGistNetConfig

ROOT = Path(__file__).resolve().parents[3]
SHORT = [{"length": 64, "rows": 1, "steps": 2}]
# Runs until its sixth step is logged, two steps after the checkpoint, and is killed there.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from tiny_training import tiny_gist_config
from megacontext.training.train_gistnet import GistTrainer

class Killed(GistTrainer):
    def _log(self, record):
        super()._log(record)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

Killed(tiny_gist_config(Path(sys.argv[1]), log_every=3)).run()
"""


def fill(folder):
    write_corpus(folder)
    save_tiny_model(folder / "base")
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Eight steps without an interruption: the folder, and what it wrote."""
    folder = fill(tmp_path_factory.mktemp("straight"))
    GistTrainer(tiny_gist_config(folder, log_every=3)).run()
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path)


def log_of(folder):
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(folder):
    return [(r["step"], r["loss"], r["norm"], r["rate"]) for r in log_of(folder) if "loss" in r]


def checkpoint(folder):
    return folder / "run" / "checkpoint.safetensors"


def copy_checkpoint(source, folder):
    (folder / "run").mkdir()
    checkpoint(folder).write_bytes(checkpoint(source).read_bytes())


def assert_ended_alike(folder, other):
    """The same weights and optimizer state in every bit, the same log, the same export."""
    for file in ("checkpoint.safetensors", "gistnet/model.safetensors"):
        left, right = (load_file(f / "run" / file) for f in (folder, other))
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.dtype == right[name].dtype
            assert torch.equal(value, right[name]), (file, name)
    assert losses_of(folder) == losses_of(other)
    assert log_of(folder)[-1]["probe"] == log_of(other)[-1]["probe"]


class Interrupted(GistTrainer):
    """Stops at a step, as an exception or the end of a job's time would."""

    def __init__(self, config, at):
        self.at = at
        super().__init__(config)

    def _train(self, micro, rate):
        if self.step == self.at:
            raise KeyboardInterrupt
        return super()._train(micro, rate)


def interrupt(config, at):
    with pytest.raises(KeyboardInterrupt):
        Interrupted(config, at).run()


def halves(weights):
    prefix = "gistnet."
    return {
        name.removeprefix(prefix): value.detach().half()
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def assert_exported(folder, weights):
    found = GistNet.from_pretrained(folder / "run" / "gistnet").state_dict()
    assert found.keys() == halves(weights).keys()
    for name, value in halves(weights).items():
        assert torch.equal(found[name], value), name


def test_training_lowers_the_loss(folder):
    config = tiny_gist_config(
        folder,
        phases=[{"length": 64, "rows": 4, "steps": 40}],
        optimizer={"warmup_steps": 4, "muon_lr": 0.02, "adam_lr": 0.02},
        checkpoint_every=100,
    )
    GistTrainer(config).run()
    losses = [loss for _, loss, _, _ in losses_of(folder)]
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < 0.9 * sum(losses[:3]) / 3


@pytest.mark.parametrize("at", [1, 7])
def test_an_interrupted_run_ends_as_one_that_was_not(straight, folder, at):
    interrupt(tiny_gist_config(folder, log_every=3), at)
    # The caller's random numbers take no part.
    torch.manual_seed(1234)
    trainer = GistTrainer(tiny_gist_config(folder, log_every=3))
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
    (folder / "run" / "checkpoint.tmp").write_bytes(b"half")
    with (folder / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    trainer = GistTrainer(tiny_gist_config(folder, log_every=3))
    assert trainer.step == 4
    assert [record["step"] for record in log_of(folder)] == [3]
    trainer.run()
    assert_ended_alike(folder, straight)


def test_a_finished_run_is_only_exported_again(straight, folder):
    copy_checkpoint(straight, folder)
    trainer = GistTrainer(tiny_gist_config(folder, log_every=3))
    assert trainer.step == 8
    assert trainer.run() == folder / "run" / "gistnet"
    exported = [load_file(f / "run" / "gistnet" / "model.safetensors") for f in (folder, straight)]
    for name, value in exported[0].items():
        assert torch.equal(value, exported[1][name]), name


def test_the_seed_decides_weights_and_rows(straight, folder):
    one, other = (GistTrainer(tiny_gist_config(folder, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.rows[0].ids, other.rows[0].ids)
    name = "gistnet.reader.key_map"
    assert not torch.equal(one.parameters[name], other.parameters[name])


def test_the_log_has_losses_and_a_probe_of_held_out_texts(straight):
    records = log_of(straight)
    assert [record["step"] for record in records] == [3, 6, 8]
    assert [record["rate"] for record in records[:2]] == [1.0, 1.0]
    assert set(records[-1]["probe"]) == {"kl_prose", "kl_recall"}
    assert all(value > 0 for value in records[-1]["probe"].values())
    assert not re.search(r"NaN|Infinity", (straight / "run" / "log.jsonl").read_text())


def test_a_probe_changes_nothing_and_measures_the_average(straight, folder):
    copy_checkpoint(straight, folder)
    trainer = GistTrainer(tiny_gist_config(folder, log_every=3))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    probe = trainer._probe()
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, before[name]), name
    logged = log_of(straight)[-1]["probe"]
    assert probe["probe"] == pytest.approx(logged, abs=1e-4)
    with torch.no_grad():
        for value in trainer.average.values():
            value.add_(0.5)
    assert trainer._probe()["probe"] != pytest.approx(logged, abs=1e-3)


def test_held_out_documents_are_not_trained_on(folder):
    trainer = GistTrainer(tiny_gist_config(folder, held_out_every=4))
    training = trainer.rows.plan[0].sampler.prose.texts
    (held_out,) = {tuple(rows.plan[0].sampler.prose.texts) for rows in trainer.probe_rows.values()}
    assert (len(training), len(held_out)) == (15, 5)
    assert set(training).isdisjoint(held_out)


def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(folder):
    interrupt(tiny_gist_config(folder), 5)
    good = checkpoint(folder).read_bytes()
    hot = {"warmup_steps": 0, "muon_lr": 1e30, "adam_lr": 1e30}
    with pytest.raises(TrainingError, match=r"step 6: the loss is .*nan.*; lower the rates in"):
        GistTrainer(tiny_gist_config(folder, optimizer=hot)).run()
    assert checkpoint(folder).read_bytes() == good
    assert GistTrainer(tiny_gist_config(folder)).step == 4


def test_weights_that_are_no_longer_finite_are_never_saved(straight, folder):
    copy_checkpoint(straight, folder)
    trainer = GistTrainer(tiny_gist_config(folder))
    for tensors in (trainer.average, trainer.parameters):
        name = "gistnet.reader.norm.weight"
        kept = tensors[name].detach().clone()
        with torch.no_grad():
            tensors[name][0] = float("inf")
        with pytest.raises(TrainingError, match=f"step 8: {name} is no longer finite"):
            trainer._checkpoint()
        with torch.no_grad():
            tensors[name].copy_(kept)
    assert checkpoint(folder).read_bytes() == checkpoint(straight).read_bytes()


class Averaging(GistTrainer):
    """Averages the weights once more, in plain steps."""

    expected: dict[str, torch.Tensor]

    def _train(self, micro, rate):
        if not self.step:
            self.expected = {n: p.detach().clone() for n, p in self.parameters.items()}
        done = super()._train(micro, rate)
        # At first the average follows quickly, since the weights it began with mean nothing.
        keep = min(0.4, (self.step + 1) / (self.step + 10))
        for name, parameter in self.parameters.items():
            self.expected[name] = keep * self.expected[name] + (1 - keep) * parameter.detach()
        return done


def test_the_average_of_the_weights_is_exported(folder):
    trainer = Averaging(tiny_gist_config(folder, ema_decay=0.4))
    trainer.run()
    for name, value in trainer.average.items():
        torch.testing.assert_close(value, trainer.expected[name], rtol=1e-5, atol=1e-6)
    assert_exported(folder, trainer.average)
    moved = [not torch.equal(trainer.average[n], p) for n, p in trainer.parameters.items()]
    assert any(moved)


def test_without_an_average_the_last_weights_are_exported(folder):
    trainer = GistTrainer(tiny_gist_config(folder, ema_decay=0, phases=SHORT))
    trainer.run()
    assert_exported(folder, trainer.parameters)


def test_the_export_is_a_gistnet_for_the_base(straight):
    net = GistNet.from_pretrained(straight / "run" / "gistnet")
    base = BaseModel.from_pretrained(straight / "base")
    config = net.config
    assert (config.d_model, config.gist_width, config.block_size, net.cost) == (32, 64, 16, 2)
    assert (config.kv_layers, config.kv_heads, config.kv_head_dim) == (3, 2, 16)
    # Qwen3 normalises its keys.
    assert config.key_norm
    assert {value.dtype for value in net.state_dict().values()} == {torch.float16}
    net = net.float()
    gists = net.encode_level(base.embed(base.encode("The fox " * 8)), 1).vectors
    keys, _ = net.read_kv(gists, torch.ones(len(gists), dtype=torch.int64))
    assert keys.shape == (3, 4, 2, 2, 16)
    assert keys.isfinite().all()


def test_accumulated_batches_are_one_step(folder):
    config = tiny_gist_config(folder, accumulate=2, checkpoint_every=2, phases=[
        {"length": 64, "rows": 2, "steps": 4}])  # fmt: skip
    trainer = GistTrainer(config)
    assert len(trainer.rows) == 8
    with torch.no_grad():
        each = [float(trainer.objective(trainer.rows[i])["loss"]) for i in (0, 1)]
    trainer.run()
    assert [step for step, *_ in losses_of(folder)] == [1, 2, 3, 4]
    assert losses_of(folder)[0][1] == pytest.approx(sum(each) / 2, abs=1e-3)
    weights = load_file(checkpoint(folder))
    # A resumed run reads on where it stopped.
    for name in ("checkpoint.safetensors", "log.jsonl"):
        (folder / "run" / name).unlink()
    interrupt(config, 3)
    resumed = GistTrainer(config)
    assert resumed.step == 2
    resumed.run()
    for name, value in load_file(checkpoint(folder)).items():
        assert torch.equal(value, weights[name]), name


def test_bfloat16_trains_as_well(folder):
    GistTrainer(tiny_gist_config(folder, mixed_precision=True, phases=SHORT)).run()
    full, mixed = folder / "full", [loss for _, loss, _, _ in losses_of(folder)]
    GistTrainer(tiny_gist_config(folder, phases=SHORT, output=full / "run")).run()
    plain = [loss for _, loss, _, _ in losses_of(full)]
    assert mixed == pytest.approx(plain, rel=0.1)
    assert mixed != plain


def test_prepared_slices_bring_their_teacher(folder):
    text = "".join(f"{number} little birds sat on a wall. " for number in range(40))
    (folder / "birds.txt").write_text(END_OF_TEXT.join([text, text[:400]]))
    slices = PrepareDatasetConfig.parse({
        "output": folder / "slices", "model": str(folder / "base"),
        "corpus": [str(folder / "birds.txt")],
        "slices": {"context_tokens": 96, "horizon": 32}, "teacher": {"dtype": "float32"},
    })  # fmt: skip
    prepare_dataset(slices)
    prepared = {"prepared": [folder / "slices"], "prepared_share": 1.0}
    trainer = GistTrainer(tiny_gist_config(folder, **prepared))
    batch = trainer.rows[0]
    torch.testing.assert_close(batch.teacher[1], trainer.base.features(batch.ids[1]))
    assert trainer.base.decode(batch.ids[0]) in text
    trainer.run()
    assert len(losses_of(folder)) == 8
    with pytest.raises(DataError, match=r"no slice holds 112 tokens"):
        GistTrainer(tiny_gist_config(folder, **prepared, output=folder / "other",
                                     phases=[{"length": 112, "rows": 1, "steps": 1}]))  # fmt: skip
    save_tiny_model(folder / "base", seed=1)
    with pytest.raises(DataError, match="teacher states come from"):
        GistTrainer(tiny_gist_config(folder, **prepared))


def test_training_starts_from_a_checkpoint(straight, folder):
    start = straight / "run" / "gistnet"
    trainer = GistTrainer(tiny_gist_config(folder, init_from=start))
    for name, value in GistNet.from_pretrained(start).state_dict().items():
        assert torch.equal(trainer.parameters[f"gistnet.{name}"], value.float()), name
    save_tiny_model(folder / "base", "llama")
    with pytest.raises(CheckpointError, match=r"made for a base with .*\[32, 3, 2, 16, 16\]"):
        GistTrainer(tiny_gist_config(folder, init_from=start))


def test_training_on_the_bases_first_layers(folder):
    shape = tiny_gist_run(folder)["gistnet"] | {"feature_layers": 1, "feature_segment": 32}
    config = tiny_gist_config(folder, gistnet=shape, log_every=3)
    interrupt(config, 5)
    exported = GistNet.from_pretrained(GistTrainer(config).run())
    assert (exported.config.feature_layers, exported.config.feature_segment) == (1, 32)
    straight = {"gistnet": shape, "log_every": 3, "output": folder / "straight" / "run"}
    GistTrainer(tiny_gist_config(folder, **straight)).run()
    assert_ended_alike(folder, folder / "straight")
    for changes, message in (
        ({"feature_layers": 4}, "gistnet: feature_layers is 4, .* has 3 layers; lower it"),
        ({"feature_segment": 144}, "gistnet: feature_segment is 144, .* has 128 positions"),
        ({"feature_segment": 40}, "feature_segment 40 must be a multiple of block_size 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            GistTrainer(tiny_gist_config(folder, gistnet=shape | changes, output=folder / "no"))


def test_a_checkpoint_of_another_shape_is_refused(straight, folder):
    copy_checkpoint(straight, folder)
    shape = tiny_gist_run(folder)["gistnet"]
    for changes, name in (
        ({"gistnet": shape | {"d_ff": 24}}, r"gistnet\.encoder\.layers\.0\.mlp"),
        ({"gistnet": shape | {"n_layers": 2}}, r"gistnet\.encoder\.layers\.1"),
        ({"objective": {"contrast_weight": 1.0}}, r"match\.weight"),
    ):
        with pytest.raises(CheckpointError, match=rf"tensor '{name}.*keep `gistnet` and `obj"):
            GistTrainer(tiny_gist_config(folder, **changes))


@pytest.mark.parametrize("content", [b"", None])
def test_a_damaged_checkpoint_is_refused(straight, folder, content):
    copy_checkpoint(straight, folder)
    whole = checkpoint(straight).read_bytes()
    checkpoint(folder).write_bytes(whole[:-8] if content is None else content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: not a whole checkpoint"):
        GistTrainer(tiny_gist_config(folder))


def test_a_checkpoint_behind_the_last_step_is_refused(straight, folder):
    copy_checkpoint(straight, folder)
    with pytest.raises(ConfigError, match="is at step 8, `phases` have 2 steps; add steps"):
        GistTrainer(tiny_gist_config(folder, phases=SHORT))


def test_windows_longer_than_the_base_are_refused(folder):
    phases = [*SHORT, {"length": 256, "rows": 1, "steps": 1}]
    with pytest.raises(ConfigError, match=r"windows of 256 tokens, .* has 128 positions; shorten"):
        GistTrainer(tiny_gist_config(folder, phases=phases))


def test_a_corpus_that_is_too_small_is_refused(folder):
    write_corpus(folder, documents=3)
    with pytest.raises(DataError, match="has 3 documents, too few to hold out one in 16"):
        GistTrainer(tiny_gist_config(folder))


def test_a_tokenizer_without_an_end_is_refused(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "base")
    with pytest.raises(ConfigError, match="needs a fast tokenizer with an end-of-text token"):
        GistTrainer(tiny_gist_config(folder))


def test_wandb_has_to_be_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="`wandb` is true, but the package is not installed"):
        GistTrainer(tiny_gist_config(folder, wandb=True, phases=SHORT)).run()


@pytest.mark.parametrize(("architecture", "key_norm"), [("qwen3", True), ("gpt-neox", False)])
def test_a_new_gistnet_fits_its_base(architecture, key_norm):
    base = tiny_base_model(architecture)
    shape = GistShapeConfig(width_factor=3, n_heads=2, d_ff=40, context_tokens=64, kv_rank=5)
    config = shape.build(base, seed=4).config
    assert (config.d_model, config.gist_width, config.d_ff, config.init_seed) == (32, 96, 40, 4)
    shapes = (config.kv_layers, config.kv_heads, config.kv_head_dim, config.kv_value_dim)
    assert shapes == (base.n_layers, base.n_kv_heads, base.head_dim, base.value_dim)
    assert config.key_norm is key_norm
    read = GistShapeConfig(reader="embedding").build(base, seed=0)
    assert (read.config.kv_layers, read.config.n_heads, read.config.d_ff) == (0, 1, 88)


def test_a_shape_that_does_not_fit_the_base_is_refused():
    with pytest.raises(ConfigError, match=r"gistnet: .*n_heads 3 must split d_model 32"):
        GistShapeConfig(n_heads=3).build(tiny_base_model(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": []}, "'phases' has value .*at least 1 item"),
        ({"corpus": []}, "'corpus' has value .*at least 1 item"),
        ({"held_out_every": 1}, "'held_out_every' has value 1: .*equal to 2"),
        ({"accumulate": 0}, "'accumulate' has value 0: .*equal to 1"),
        ({"ema_decay": 1.0}, "'ema_decay' has value 1.0: .*less than 1"),
        ({"prepared_share": 2}, "'prepared_share' has value 2: .*equal to 1"),
        ({"probe_batches": 0}, "'probe_batches' has value 0: .*equal to 1"),
        ({"checkpoint_every": 0}, "'checkpoint_every' has value 0: .*equal to 1"),
        ({"dtype": "int8"}, "'dtype' has value 'int8'"),
        ({"gistnet": {"slots": 9}}, "'gistnet.slots' has value 9: .*equal to 8"),
        ({"gistnet": {"heads": 9}}, "unknown key 'gistnet.heads'"),
        ({"phases": [{"length": 72, "rows": 1, "steps": 1}]}, "length 72 is not a multiple of 16"),
        (
            {"phases": [{"length": 64, "rows": 1, "steps": 1, "replaced": [4]}]},
            "replaced is 4, but a window of 64 tokens .* has room for 3",
        ),
        (
            {"phases": [{"length": 64, "rows": 1, "steps": 1, "slots": [3]}]},
            r"slots is \(3,\), expected 1 to 2",
        ),
    ],
)
def test_runs_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainGistNetConfig.parse(tiny_gist_run(tmp_path, **changes))
