"""Training of LensNet: its stages, what each may change, and runs that were cut short."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_cases import learned_gistnet, words
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from tiny_training import tiny_lens_config, tiny_lens_run, write_corpus

from megacontext.errors import CheckpointError, ConfigError, DataError, TrainingError
from megacontext.lensnet import LensNet, SnapshotDataset, collate
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.session import Session, SessionConfig
from megacontext.training.lens_scores import ScoreLossConfig, calibration, score_loss
from megacontext.training.train_lensnet import LensTrainer

ROOT = Path(__file__).resolve().parents[3]
KEY_MODULES = {"token_keys", "token_gates", "key_encoder", "tail_encoder", "query_head"}
SCORE_MODULES = {"entry_input", "cache_input", "layers", "entry_head", "cache_head"}
# One session and two steps a stage.
SHORT = {
    "keys": {"steps": 2, "texts": 1, "tokens": 128, "facts": 2, "probe_batches": 1},
    "rounds": [{"sessions": 1, "tokens": [128], "facts": 1, "asks": 1, "rounds": 1, "calm": 1,
                "horizon": 4, "proposals": 2, "entries": 1}],
    "scores": {"steps": 2, "batch_size": 2},
}  # fmt: skip
# Every life of the run ends by SIGKILL at another place: within the keys, a recording, within
# the scores, and after these were calibrated but before that was saved.
KILLED_RUN = """
import json, os, signal, sys
from pathlib import Path
from tiny_training import tiny_lens_config
from megacontext.training.train_lensnet import LensTrainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killed(LensTrainer):
    def __init__(self, config, stage, place):
        self.end = stage, place
        super().__init__(config)

    def _log(self, record):
        super()._log(record)
        for place in (self.step, "calibration" if "calibration" in record else None):
            if self.end == (self.stage, place):
                die()

    def _recorder(self, number):
        recorder, play = super()._recorder(number), None
        def session(index, whole=recorder.session):
            for count, shot in enumerate(whole(index)):
                if self.end == (self.stage, "session") and index % 3 == 2 and count == 1:
                    die()
                yield shot
        recorder.session = session
        return recorder

ends = [(0, 4), (1, "session"), (2, 6), (2, "calibration"), (3, "session"), (4, 2)]
for end in ends:
    child = os.fork()
    if not child:
        Killed(tiny_lens_config(Path(sys.argv[1])), *end).run()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    parts = sorted(Path(sys.argv[1]).glob("run/snapshots/*/*/index.json"))
    with open(sys.argv[2], "a") as lives:
        written = [p.stat().st_mtime_ns for p in parts]
        print(json.dumps({"status": status, "parts": written}), file=lives)
"""


def fill(folder):
    write_corpus(folder)
    save_tiny_model(folder / "base", max_positions=512)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Both rounds without an interruption: the folder, and what it wrote."""
    folder = fill(tmp_path_factory.mktemp("straight"))
    Watched(tiny_lens_config(folder)).run()
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path)


class Watched(LensTrainer):
    """Keeps the weights that every stage ended with."""

    def _checkpoint(self, optimizer):
        super()._checkpoint(optimizer)
        if optimizer is None:
            weights = {n: p.detach().clone() for n, p in self.lens.named_parameters()}
            torch.save(weights, self.config.output / f"stage-{self.stage}.pt")


def log_of(folder):
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def checkpoint(folder):
    return folder / "run" / "checkpoint.safetensors"


def copy_run(source, folder):
    (folder / "run").mkdir()
    checkpoint(folder).write_bytes(checkpoint(source).read_bytes())
    shutil.copytree(source / "run" / "snapshots", folder / "run" / "snapshots")


def snapshot_files(folder):
    root = folder / "run" / "snapshots"
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def assert_ended_alike(folder, other):
    """The same weights and snapshots in every bit, the same log, the same export."""
    for file in ("checkpoint.safetensors", "lensnet/model.safetensors"):
        left, right = (load_file(f / "run" / file) for f in (folder, other))
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.dtype == right[name].dtype
            assert torch.equal(value, right[name]), (file, name)
    assert snapshot_files(folder) == snapshot_files(other)
    assert log_of(folder) == log_of(other)


def trainer_of(folder, **changes):
    return LensTrainer(tiny_lens_config(folder, **changes))


def short(folder, **changes):
    return tiny_lens_config(folder, **{**SHORT, **changes})


# Interrupted runs


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(straight, folder):
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_RUN), str(folder), str(folder / "lives")],
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 0, killed.stderr
    lives = [json.loads(line) for line in (folder / "lives").read_text().splitlines()]
    assert [life["status"] for life in lives] == [signal.SIGKILL] * 6
    # Finished parts stay as they are.
    parts = [life["parts"] for life in lives]
    assert [len(written) for written in parts] == [0, 1, 2, 2, 3, 4]
    assert all(later[: len(sooner)] == sooner for sooner, later in pairwise(parts))
    # What a process leaves that dies while it writes.
    (folder / "run" / "checkpoint.tmp").write_bytes(b"half")
    with (folder / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 17, "lo')
    torch.manual_seed(1234)
    trainer = trainer_of(folder)
    assert (trainer.stage, trainer.step) == (4, 0)
    trainer.run()
    assert_ended_alike(folder, straight)


class Interrupted(LensTrainer):
    """Stops at a step, as an exception or the end of a job's time would."""

    def __init__(self, config, stage, step):
        self.at = stage, step
        super().__init__(config)

    def _log(self, record):
        super()._log(record)
        if (self.stage, self.step) == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(straight, folder):
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tiny_lens_config(folder), 2, 4).run()
    trainer = trainer_of(folder)
    assert (trainer.stage, trainer.step) == (2, 3)
    trainer.run()
    assert_ended_alike(folder, straight)


def test_a_finished_run_is_only_exported_again(straight, folder):
    copy_run(straight, folder)
    before = checkpoint(folder).read_bytes()
    assert trainer_of(folder).run() == folder / "run" / "lensnet"
    again, first = (load_file(f / "run/lensnet/model.safetensors") for f in (folder, straight))
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    assert checkpoint(folder).read_bytes() == before


def test_another_round_goes_on_behind_a_finished_run(folder):
    once = short(folder)
    LensTrainer(once).run()
    (record,) = once.rounds
    twice = once.model_copy(update={"rounds": (record, record)})
    trainer = LensTrainer(twice)
    assert trainer.stage == 3
    trainer.run()
    assert [r["stage"] for r in log_of(folder) if "stage" in r] == ["keys", "scores 1", "scores 2"]
    with pytest.raises(ConfigError, match=r"has gone through 2 rounds, `rounds` are 1; add"):
        LensTrainer(once)


def test_a_run_started_anew_does_not_learn_from_another_lens(folder):
    """Without its checkpoint a run begins again, whatever snapshots lie there."""
    config = short(folder)
    LensTrainer(config).run()
    first = load_file(checkpoint(folder))
    stale = config.output / "snapshots" / "round-1" / "part-0000"
    (stale / "shard-00000.safetensors").write_bytes(b"of another lens")
    checkpoint(folder).unlink()
    LensTrainer(config).run()
    assert all(torch.equal(v, first[n]) for n, v in load_file(checkpoint(folder)).items())


def test_fewer_steps_than_were_made_are_refused(folder):
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tiny_lens_config(folder), 0, 4).run()
    keys = tiny_lens_run(folder)["keys"] | {"steps": 2}
    with pytest.raises(ConfigError, match="is at step 3 of its stage, which has 2 now"):
        trainer_of(folder, keys=keys)


@pytest.mark.parametrize("damage", ["cut", "other shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(straight, folder, damage):
    copy_run(straight, folder)
    changes = {}
    if damage == "cut":
        checkpoint(folder).write_bytes(checkpoint(folder).read_bytes()[:-9])
    else:
        changes = {"lens": tiny_lens_run(folder)["lens"] | {"key_width": 24}}
    message = {"cut": "not a whole checkpoint", "other shape": "keep `lens`"}[damage]
    with pytest.raises(CheckpointError, match=message):
        trainer_of(folder, **changes)


# Stages


def changed(before, after):
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_every_stage_trains_its_own_modules(straight):
    """Keys are stored with memories: once snapshots are recorded they may not move."""
    ends = [torch.load(straight / "run" / f"stage-{number}.pt") for number in range(1, 6)]
    start = dict(trainer_of(straight, output=straight / "other").lens.named_parameters())
    assert KEY_MODULES & changed(start, ends[0]) >= {"token_keys", "key_encoder", "query_head"}
    assert changed(start, ends[0]) <= KEY_MODULES
    assert changed(ends[0], ends[1]) == set(), "recording changes nothing"
    assert changed(ends[1], ends[2]) == SCORE_MODULES
    assert changed(ends[2], ends[3]) == set()
    assert changed(ends[3], ends[4]) == SCORE_MODULES
    assert {name.partition(".")[0] for name in start} == KEY_MODULES | SCORE_MODULES


def test_rounds_are_recorded_from_texts_of_their_own(straight):
    sets = [SnapshotDataset(straight / f"run/snapshots/round-{n}/part-0000") for n in (1, 2)]
    for dataset in sets:
        assert len(dataset) == 4  # two sessions, each with a calm place and a question
    cursors = [[int(dataset[i].cursor) for i in range(4)] for dataset in sets]
    assert cursors[0] != cursors[1]


def test_the_newest_sessions_of_each_round_measure_the_scores(straight):
    trainer = trainer_of(straight)
    training, held_out = trainer._snapshots(0)
    assert (len(training), len(held_out)) == (4, 2)
    training, held_out = trainer._snapshots(1)
    assert (len(training), len(held_out)) == (8, 4)
    most = trainer_of(straight, scores={"steps": 7, "held_out_share": 0.9})
    assert [len(shots) for shots in most._snapshots(1)] == [8, 4], "the first part always trains"


def test_training_lowers_the_loss_of_both_stages(folder):
    record = SHORT["rounds"][0] | {"sessions": 4, "asks": 2}
    config = short(
        folder,
        keys=SHORT["keys"] | {"steps": 30, "texts": 2},
        rounds=[record],
        scores={"steps": 40, "batch_size": 8},
        log_every=1,
    )
    LensTrainer(config).run()
    for stage in ("keys", "scores 1"):
        losses = [r["loss"] for r in log_of(folder) if r.get("stage") == stage]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), stage


def test_the_weights_with_the_lowest_held_out_loss_are_kept(straight, folder):
    copy_run(straight, folder)
    trainer = trainer_of(folder, scores={"steps": 6, "batch_size": 4, "probe_every": 2})
    trainer.step, seen, measured = 0, [], iter([3.0, 2.0, 5.0, 4.0])
    batch = collate(trainer._snapshots(1)[1])

    def measure():
        seen.append([p.detach().clone() for p in trainer.lens.parameters()])
        return next(measured)

    def loss():
        return vars(score_loss(trainer.lens, batch, ScoreLossConfig()))

    trainer._fit("scores", [trainer.lens], 6, trainer.config.score_optimizer, loss, measure)
    kept = list(trainer.lens.parameters())
    alike = [all(map(torch.equal, weights, kept)) for weights in seen]
    assert alike == [False, True, False, False], "before step 1, then every two steps"


def test_scores_are_calibrated_to_nats(straight, folder):
    """Scores a third of the truth are tripled, whatever the order of the snapshots."""
    copy_run(straight, folder)
    trainer = trainer_of(folder)
    snapshots, _ = trainer._snapshots(1)
    with torch.no_grad():
        for parameter in trainer.lens.cache_head.parameters():
            parameter.add_(0.1)
        true = []
        for snapshot in snapshots:
            batch = collate([snapshot])
            scores = trainer.lens(batch.entries, batch.cache, batch.tail).cache[0]
            true.append(dataclasses.replace(snapshot, cache_utility=3 * scores))
    before = torch.cat([score for score, _ in trainer._scored(true)])
    trainer._calibrate(true)
    after, truth = (torch.cat(values) for values in zip(*trainer._scored(true), strict=True))
    torch.testing.assert_close(after, truth)
    torch.testing.assert_close(after, 3 * before)
    assert calibration(after, truth) == pytest.approx(1.0, abs=1e-5)
    assert log_of(folder)[-1]["calibration"] == pytest.approx(3.0, abs=1e-3)


def test_the_log_tells_every_stage(straight):
    records = log_of(straight)
    stages = [(r["stage"], r["stage_step"], r["step"]) for r in records if "stage" in r]
    keys = [("keys", step, step) for step in (2, 4, 6, 8)]
    scores = [(f"scores {n}", s, 8 + 7 * (n - 1) + s) for n in (1, 2) for s in (2, 4, 6, 7)]
    assert stages == keys + scores
    terms = {"loss", "regression", "ranking", "balance", "legality"}
    assert all(terms <= r.keys() for r in records if r.get("stage", "").startswith("scores"))
    probes = [r["probe"] for r in records if "probe" in r]
    assert all(0 <= share <= 1 for share in probes[0].values())
    for probe in probes[1:]:
        assert probe.keys() == {"snapshots", "rank_correlation", "error", "won_share"}
    assert sum("calibration" in r for r in records) == 2
    text = (straight / "run" / "log.jsonl").read_text()
    assert not re.search(r"NaN|Infinity", text)


def test_the_log_has_the_mean_of_its_steps(folder):
    """Also where a checkpoint lay between two lines and the run went on from there."""
    each = tiny_lens_config(folder, log_every=1, output=folder / "each")
    with pytest.raises(KeyboardInterrupt):
        Interrupted(each, 0, 6).run()
    lines = (folder / "each" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    coarse = {"log_every": 4, "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tiny_lens_config(folder, **coarse), 0, 4).run()
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tiny_lens_config(folder, **coarse), 0, 4).run()
    (record,) = [r for r in log_of(folder) if r["step"] == 4]
    assert record["loss"] == pytest.approx(sum(losses[:4]) / 4, abs=2e-4)


def test_held_out_documents_and_words_are_not_trained_on(folder):
    trainer = trainer_of(folder, held_out_every=4)
    training, probe = trainer.texts, trainer.probe_texts
    assert (len(training.prose.texts), len(probe.prose.texts)) == (15, 5)
    assert set(training.prose.texts).isdisjoint(probe.prose.texts)
    assert (training.split, probe.split) == ("train", "held_out")


def test_the_seed_decides_weights_and_texts(straight):
    one, other = (trainer_of(straight, seed=s, output=straight / f"seed-{s}") for s in (0, 1))
    assert not torch.equal(one.texts.draw(0, 128, 2).tokens, other.texts.draw(0, 128, 2).tokens)
    weights = [trainer.lens.token_keys.embed.weight for trainer in (one, other)]
    assert not torch.equal(*weights)


def test_rare_tokens_have_longer_keys_from_the_start(straight):
    trainer = trainer_of(straight, output=straight / "rarity")
    lengths = trainer.lens.token_keys.embed.weight.detach().norm(dim=1)
    space, rare = (int(trainer.base.encode(text)[0]) for text in (" ", "Z"))
    assert lengths[space] < 0.2 * lengths[rare]


# What a run ends with


def test_the_export_focuses_a_session(straight, tmp_path):
    lens = straight / "run" / "lensnet"
    net, base = LensNet.from_pretrained(lens), BaseModel.from_pretrained(straight / "base")
    config = net.config
    assert (config.d_model, config.gist_width, config.key_vocabulary) == (32, 32, base.vocab_size)
    assert (config.key_width, config.d_hidden, config.n_queries) == (16, 16, 2)
    assert {value.dtype for value in net.state_dict().values()} == {torch.float16}
    settings = SessionConfig.parse({
        "model": str(straight / "base"), "lens": lens, "policy": "lens",
        "engine": tiny_lens_run(straight)["engine"],
    })  # fmt: skip
    with Session(settings) as session:
        engine = session.create(tmp_path / "a.mctx")
        with engine.memory:
            engine.ingest(words(2000))
            assert engine.memory.keys(1).shape == (2000 // 32, 16)
            assert len(list(engine.generate("amber? ", max_new_tokens=3, eos_token_id=()))) == 3
            engine.context.check()


def test_training_for_learned_gists(folder):
    base = BaseModel.from_pretrained(folder / "base")
    net = learned_gistnet(base, slots=2, gist_width=64)
    net.save_pretrained(folder / "gistnet")
    exported = LensNet.from_pretrained(LensTrainer(short(folder, gistnet=folder / "gistnet")).run())
    assert exported.config.gist_width == 64


def test_a_lens_without_token_keys(folder):
    lens = tiny_lens_run(folder)["lens"] | {"token_keys": False, "lexical_prior": 0}
    exported = LensNet.from_pretrained(LensTrainer(short(folder, lens=lens)).run())
    assert exported.config.key_vocabulary == 0
    assert not any(name.startswith("token_") for name in exported.state_dict())


# What goes wrong


@pytest.mark.parametrize("stage", ["key", "score"])
def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(folder, stage):
    hot = {f"{stage}_optimizer": {"warmup_steps": 0, "muon_lr": 1e30, "adam_lr": 1e30}}
    name = {"key": "keys", "score": "scores 1"}[stage]
    with pytest.raises(TrainingError, match=rf"{name}, step \d: .* lower the rates .* is resumed"):
        LensTrainer(short(folder, **hot)).run()
    if stage == "key":
        assert not checkpoint(folder).exists()
        return
    assert all(value.isfinite().all() for value in load_file(checkpoint(folder)).values())
    trainer = LensTrainer(short(folder))
    assert (trainer.stage, trainer.step) == (2, 0)
    trainer.run()


def test_weights_that_are_no_longer_finite_are_never_saved(folder):
    """A last update may go wrong though the loss before it was fine."""

    class Spoiled(LensTrainer):
        def _require_finite(self, stage):
            with torch.no_grad():
                self.lens.key_encoder.map.weight[0, 0] = torch.inf
            super()._require_finite(stage)

    for steps, every in ((2, 100), (4, 1)):
        keys = SHORT["keys"] | {"steps": steps}
        config = short(folder, keys=keys, checkpoint_every=every)
        with pytest.raises(TrainingError, match=r"keys, .*key_encoder\.map\.weight is no longer"):
            Spoiled(config).run()
        assert not checkpoint(folder).exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"corpus": ["none.txt"]}, DataError, r"none\.txt: no such file"),
        ({"held_out_every": 50}, DataError, "20 documents, too few"),
        ({"lens": {"n_heads": 3}}, ConfigError, "n_heads 3 must divide d_hidden 64"),
        ({"engine": {"budget": 1024}}, ConfigError, "budget 1024 is more than the 512 positions"),
        ({"gistnet": "none"}, CheckpointError, "none"),
        ({"device": "abacus"}, ConfigError, "device 'abacus'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_begins(straight, changes, error, message):
    output = straight / "refused"
    with pytest.raises(error, match=message):
        trainer_of(straight, **changes, output=output)
    assert not checkpoint(straight / "refused").exists()
