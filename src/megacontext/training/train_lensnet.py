"""Trains LensNet for a frozen base model: where in a history detail is worth its cost."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, TrainingError
from megacontext.lensnet import (
    Snapshot,
    SnapshotDataset,
    collate,
    write_snapshots,
)
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import load_gistnet
from megacontext.runtime.engine import EngineConfig
from megacontext.training.lens_keys import (
    KeyRows,
    KeyStageConfig,
    contrastive_loss,
    key_batches,
    recall_at,
    relevances,
    weigh_by_rarity,
)
from megacontext.training.lens_recorder import LensRecorder, RecordConfig
from megacontext.training.lens_scores import (
    ScoreLossConfig,
    calibration,
    mean_loss,
    rank_correlation,
    score_loss,
    strange_keys,
)
from megacontext.training.lens_shape import LensShapeConfig
from megacontext.training.lens_texts import LensTexts
from megacontext.training.lm_batches import split_corpus
from megacontext.training.optimizers import HybridOptimizer, OptimizerConfig
from megacontext.training.run_log import JsonlLog, training_progress
from megacontext.training.train_state import (
    load_state,
    prefixed,
    require_shapes,
    save_state,
    under,
)

_COUNTED_TEXTS, _COUNTED_CHARACTERS = 64, 40_000


class ScoreStageConfig(FrozenConfig):
    """Training of the scores after each round of recording.

    Labels are dear, so there are few snapshots, and a lens can learn them by heart: what is kept
    are the weights with the lowest loss on the held-out ones.

    Attributes:
        steps: optimizer steps.
        batch_size: snapshots of a batch.
        probe_every: steps between measurements of the held-out loss.
        strange_share: share of snapshots, drawn anew at every step, in which the keys' relevances
            are dealt out to other proposals: of words that no training has seen, keys tell nothing,
            and a lens that never met such words would trust them all the same.
        held_out_share: share of a round's parts that only measure and calibrate, at least one; a
            round of a single part trains with it.
        loss: weights of its terms.
    """

    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=16, ge=1)
    probe_every: int = Field(default=25, ge=1)
    strange_share: float = Field(default=0.5, ge=0, le=1)
    held_out_share: float = Field(default=0.15, gt=0, lt=1)
    loss: ScoreLossConfig = ScoreLossConfig()


class TrainLensNetConfig(FrozenConfig):
    """One training run of a LensNet.

    Attributes:
        output: folder of checkpoints, snapshots, log and result.
        model: the frozen base model.
        dtype: type of its weights.
        gistnet: checkpoint of the GistNet, ``bundled`` or ``mean``, which is the default.
        corpus: prose, plain or ``.zst``.
        held_out_every: every n-th document is held out.
        lens: shape of the LensNet.
        keys: the first stage.
        rounds: rounds of recording, each with the lens as it is by then, and each followed by
            training of the scores on all that was recorded so far.
        scores: that training.
        engine: budget and habits of recorded sessions.
        key_optimizer: rates of the first stage.
        score_optimizer: rates of the second.
        seed: of everything.
        device: where to train.
        workers: processes that build batches.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints.
    """

    output: Path
    model: str = "bundled:tiny"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gistnet: str | Path | None = None
    corpus: tuple[Path, ...] = Field(min_length=1)
    held_out_every: int = Field(default=16, ge=2)
    lens: LensShapeConfig = LensShapeConfig()
    keys: KeyStageConfig = KeyStageConfig()
    rounds: tuple[RecordConfig, ...] = Field(default=(RecordConfig(), RecordConfig()), min_length=1)
    scores: ScoreStageConfig = ScoreStageConfig()
    engine: EngineConfig = EngineConfig()
    key_optimizer: OptimizerConfig = OptimizerConfig(adam_lr=1e-2, muon_lr=2e-3)
    score_optimizer: OptimizerConfig = OptimizerConfig(adam_lr=2e-3, muon_lr=2e-3)
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    workers: int = Field(default=1, ge=0)
    log_every: int = Field(default=25, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)


class LensTrainer:
    """Runs, checkpoints and resumes the training of one LensNet.

    Stages follow one another: keys; then for every round, recording and scores. A finished stage
    is never run again, a recording goes on behind its last finished part.

    Args:
        config: the run. What lies in ``config.output`` already is resumed.

    Raises:
        ConfigError: the shape does not fit the base model, or the device does not exist.
        DataError: the corpus cannot be used.
        CheckpointError: the checkpoint is damaged or of another shape.
    """

    def __init__(self, config: TrainLensNetConfig) -> None:
        self.config = config
        config.output.mkdir(parents=True, exist_ok=True)
        self.base = BaseModel.from_pretrained(
            config.model, dtype=config.dtype, device=config.device
        )
        self.gistnet = load_gistnet(config.gistnet, self.base, config.model)
        self.lens = config.lens.build(self.base, self.gistnet, config.seed)
        tokenizer = self.base.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{self.base.name}: needs a fast tokenizer to be trained on texts")
        training, held_out = split_corpus(config.corpus, config.held_out_every)
        size = self.gistnet.config.block_size
        backend = tokenizer.backend_tokenizer
        self.texts = LensTexts(backend, training, "train", config.seed, size)
        self.probe_texts = LensTexts(backend, held_out, "held_out", config.seed, size)
        self.log = JsonlLog(config.output / "log.jsonl")
        self.stage = self.step = self.done = 0
        self._optimizer_state: dict[str, Tensor] = {}
        self._best: dict[str, Tensor] = {}
        self._best_loss = math.inf
        # Of every term, its values since the last line of the log.
        self._terms: dict[str, list[float]] = {}
        for number in range(len(config.rounds)):
            # What sessions refuse is refused before the keys are trained.
            self._recorder(number).check()
        weigh_by_rarity(self.lens, self._counted(), size)
        self._resume()

    def run(self) -> Path:
        """Trains to the end and returns the folder of the finished LensNet.

        Raises:
            TrainingError: the training diverged; the last checkpoint is kept.
        """
        stages: list[Callable[[], None]] = [self._train_keys]
        for number in range(len(self.config.rounds)):
            stages.append(lambda round=number: self._record(round))
            stages.append(lambda round=number: self._train_scores(round))
        while self.stage < len(stages):
            stages[self.stage]()
            if self.stage % 2 == 0:
                # A run that was started anew may find snapshots of another lens.
                shutil.rmtree(self._round(self.stage // 2), ignore_errors=True)
            self.stage, self.step, self._optimizer_state = self.stage + 1, 0, {}
            self._checkpoint(None)
        self.log.close()
        folder = self.config.output / "lensnet"
        self.lens.eval().to(torch.float16).save_pretrained(folder)
        return folder

    def _train_keys(self) -> None:
        config = self.config
        lens = self.lens
        modules = [lens.key_encoder, lens.tail_encoder, lens.query_head]
        modules += [m for m in (lens.token_keys, lens.token_gates) if m is not None]
        rows = KeyRows(self.texts, self.base, config.keys, self.step)
        batches = key_batches(rows, config.workers)

        def loss() -> dict[str, Tensor]:
            batch = next(batches)
            relevance = relevances(self.base, self.gistnet, lens, batch)
            return {"loss": contrastive_loss(relevance, batch)}

        self._fit("keys", modules, config.keys.steps, config.key_optimizer, loss)
        self._log({"probe": self._probe_keys()})

    def _train_scores(self, number: int) -> None:
        config, lens = self.config, self.lens
        training, held_out = self._snapshots(number)
        # The keys are in the memories that were recorded: only the scores may change now.
        modules = [lens.entry_input, lens.cache_input, lens.layers, lens.entry_head]
        modules += [lens.cache_head]
        order = torch.Generator().manual_seed(config.seed * 1000 + number)
        for _ in range(self.step):
            torch.randint(len(training), (config.scores.batch_size,), generator=order)

        def loss() -> dict[str, Tensor]:
            chosen = torch.randint(len(training), (config.scores.batch_size,), generator=order)
            drawn = [training[index] for index in chosen.tolist()]
            seed = (config.seed * 1000 + number) * 1_000_003 + self.step
            batch = collate(strange_keys(drawn, config.scores.strange_share, seed))
            return vars(score_loss(lens, batch, config.scores.loss))

        def measure() -> float:
            return mean_loss(lens, held_out, config.scores.loss, config.scores.batch_size)

        stage = f"scores {number + 1}"
        self._fit(stage, modules, config.scores.steps, config.score_optimizer, loss, measure)
        self._calibrate(held_out)
        self._log({"probe": self._probe_scores(held_out)})

    def _record(self, number: int) -> None:
        """Records what is missing of round ``number``."""
        config = self.config.rounds[number]
        recorder = self._recorder(number)
        first = sum(earlier.sessions for earlier in self.config.rounds[:number])
        with training_progress() as progress:
            task = progress.add_task(f"recording {number + 1}", total=config.sessions)
            for part in range(config.parts):
                start = part * config.sessions_per_part
                sessions = range(start, min(start + config.sessions_per_part, config.sessions))
                folder = self._part(number, part)
                if not (folder / "index.json").exists():
                    # What an interrupted run has left of this part.
                    shutil.rmtree(folder, ignore_errors=True)
                    write_snapshots(
                        folder,
                        (
                            shot
                            for session in sessions
                            for shot in recorder.session(first + session)
                        ),
                    )
                progress.advance(task, len(sessions))

    def _recorder(self, number: int) -> LensRecorder:
        config = self.config
        return LensRecorder(
            self.base, self.gistnet, self.lens.eval(), self.texts, config.engine,
            config.rounds[number],
        )  # fmt: skip

    def _snapshots(self, last_round: int) -> tuple[list[Snapshot], list[Snapshot]]:
        """All recorded up to a round: to train on, and from the last parts, to measure on."""
        training: list[Snapshot] = []
        held_out: list[Snapshot] = []
        for number in range(last_round + 1):
            parts = self.config.rounds[number].parts
            kept = max(1, round(parts * self.config.scores.held_out_share))
            # The first part always trains.
            first_kept = max(1, parts - kept)
            for part in range(parts):
                dataset = SnapshotDataset(self._part(number, part))
                into = held_out if part >= first_kept else training
                into += [dataset[index] for index in range(len(dataset))]
        return training, held_out or training

    def _round(self, number: int) -> Path:
        return self.config.output / "snapshots" / f"round-{number + 1}"

    def _part(self, number: int, part: int) -> Path:
        return self._round(number) / f"part-{part:04d}"

    def _fit(
        self,
        name: str,
        modules: Iterable[nn.Module],
        steps: int,
        rates: OptimizerConfig,
        loss: Callable[[], dict[str, Tensor]],
        measure: Callable[[], float] | None = None,
    ) -> None:
        """Steps ``self.step`` to ``steps`` of a stage.

        Args:
            name: of the stage.
            modules: what is trained.
            steps: at which the stage ends.
            rates: of the optimizer.
            loss: gives the terms, their sum named ``loss``.
            measure: gives the held-out loss; the weights with the lowest are kept.
        """
        chosen = {id(parameter) for module in modules for parameter in module.parameters()}
        named = [(n, p) for n, p in self.lens.named_parameters() if id(p) in chosen]
        optimizer = HybridOptimizer(named, rates)
        optimizer.load_state_tensors(self._optimizer_state)
        self.lens.train()
        with training_progress() as progress:
            task = progress.add_task(name, total=steps, completed=self.step)
            if measure is not None and not self._best:
                self._keep_best(measure(), named)
            while self.step < steps:
                terms = loss()
                terms["loss"].backward()
                rate = optimizer.rate(self.step, steps)
                norm = optimizer.step(rate)
                self.step, self.done = self.step + 1, self.done + 1
                for key, value in terms.items():
                    self._terms.setdefault(key, []).append(float(value.detach()))
                newest = self._terms["loss"][-1]
                if not math.isfinite(newest) or not math.isfinite(norm):
                    raise self._diverged(name, f"the loss is {newest}, its gradient {norm}")
                last = self.step == steps
                if last or self.step % self.config.log_every == 0:
                    self._log_terms(name, rate)
                if measure is not None and (
                    last or self.step % self.config.scores.probe_every == 0
                ):
                    self._keep_best(measure(), named)
                if last:
                    self._require_finite(name)
                elif self.step % self.config.checkpoint_every == 0:
                    self._require_finite(name)
                    self._checkpoint(optimizer)
                progress.update(task, completed=self.step)
        if self._best:
            with torch.no_grad():
                for key, parameter in named:
                    parameter.copy_(self._best[key])
        self._best = {}
        self.lens.eval()

    def _log_terms(self, stage: str, rate: float) -> None:
        """Writes the means of the terms since the last time."""
        means = {key: sum(seen) / len(seen) for key, seen in self._terms.items()}
        self._log({"stage": stage, "stage_step": self.step, "rate": rate, **means})
        self._terms = {}

    def _keep_best(self, loss: float, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        if not self._best or loss < self._best_loss:
            self._best_loss = loss
            self._best = {key: parameter.detach().clone() for key, parameter in named}
            if self.step:
                # What is logged at a stage's start would stand there again after a resume.
                self._log({"stage_step": self.step, "held_out_loss": round(loss, 4)})

    def _require_finite(self, stage: str) -> None:
        for name, parameter in self.lens.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._diverged(stage, f"{name} is no longer finite")

    def _diverged(self, stage: str, what: str) -> TrainingError:
        return TrainingError(
            f"{stage}, step {self.step}: {what}; lower the rates of its optimizer and start again: "
            f"the last good checkpoint in {self.config.output} is resumed"
        )

    @torch.no_grad()
    def _probe_keys(self) -> dict[str, Any]:
        """Share of looks whose evidence is among the 16 best blocks, by family, held out."""
        rows = KeyRows(self.probe_texts, self.base, self.config.keys)
        found: dict[str, list[bool]] = defaultdict(list)
        for index in range(self.config.keys.probe_batches):
            batch = rows[index]
            hits = recall_at(relevances(self.base, self.gistnet, self.lens, batch), batch, 16)
            for family, hit in zip(batch.families, hits.tolist(), strict=True):
                found[family].append(hit)
        return {f: round(sum(hits) / len(hits), 3) for f, hits in sorted(found.items())}

    @torch.no_grad()
    def _scored(self, snapshots: list[Snapshot]) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores and measured worth of the proposed blocks, snapshot by snapshot."""
        for snapshot in snapshots:
            batch = collate([snapshot])
            scores = self.lens(batch.entries, batch.cache, batch.tail)
            known = ~batch.cache_utility[0].isnan()
            yield scores.cache[0][known], batch.cache_utility[0][known]

    def _calibrate(self, snapshots: list[Snapshot]) -> None:
        """Scales the proposals' scores so that they are nats."""
        scored = list(self._scored(snapshots))
        factor = calibration(
            torch.cat([score for score, _ in scored]), torch.cat([truth for _, truth in scored])
        )
        head = self.lens.cache_head
        with torch.no_grad():
            for weight in (head.score.weight, head.score.bias, head.shortcut.weight):
                weight.mul_(max(factor, 0.1))
        self._log({"calibration": factor})

    def _probe_scores(self, snapshots: list[Snapshot]) -> dict[str, Any]:
        scored = list(self._scored(snapshots))
        score = torch.cat([score for score, _ in scored])
        truth = torch.cat([truth for _, truth in scored])
        best = [
            float(truth[int(score.argmax())] / truth.max())
            for score, truth in scored
            if len(truth) and float(truth.max()) > 1.0
        ]
        return {
            "snapshots": len(snapshots),
            "rank_correlation": round(rank_correlation(score, truth), 4),
            "error": round(float((score - truth).abs().mean()), 4),
            # Of the nats that the best proposal would win, what the lens's favourite wins.
            "won_share": round(sum(best) / max(1, len(best)), 4),
        }

    def _counted(self) -> list[Tensor]:
        texts = self.texts.prose.texts[:_COUNTED_TEXTS]
        return [self.base.encode(text[:_COUNTED_CHARACTERS]) for text in texts]

    def _log(self, record: dict[str, Any]) -> None:
        self.log.write(self.done, record)

    def _checkpoint(self, optimizer: HybridOptimizer | None) -> None:
        tensors = prefixed("model|", dict(self.lens.named_parameters()))
        if optimizer is not None:
            tensors |= prefixed("optim|", optimizer.state_tensors())
        tensors |= prefixed("best|", self._best)
        metadata = {"stage": str(self.stage), "step": str(self.step), "done": str(self.done)}
        metadata["best_loss"] = repr(self._best_loss)
        metadata["terms"] = json.dumps(self._terms)
        save_state(self.config.output / "checkpoint.safetensors", tensors, metadata)

    def _resume(self) -> None:
        path = self.config.output / "checkpoint.safetensors"
        if path.exists():
            tensors, metadata = load_state(path)
            state = under("model|", tensors)
            parameters = dict(self.lens.named_parameters())
            require_shapes(path, state, parameters, "keep `lens` or choose another `output`")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(state[name])
            self._optimizer_state = under("optim|", tensors)
            self._best = under("best|", tensors)
            self._best_loss = float(metadata.get("best_loss", "inf"))
            self.stage, self.step = int(metadata["stage"]), int(metadata["step"])
            self.done = int(metadata["done"])
            self._terms = json.loads(metadata.get("terms", "{}"))
            self._require_plan(path)
        self.log.rewind(self.done)

    def _require_plan(self, path: Path) -> None:
        config, stages = self.config, 1 + 2 * len(self.config.rounds)
        steps = config.scores.steps if self.stage else config.keys.steps
        if self.stage > stages:
            raise ConfigError(
                f"{path}: has gone through {self.stage // 2} rounds, `rounds` are "
                f"{len(config.rounds)}; add rounds or choose another `output`"
            )
        if self.step > steps:
            raise ConfigError(
                f"{path}: is at step {self.step} of its stage, which has {steps} now; add steps or "
                "choose another `output`"
            )
