"""Trains GistNet for a frozen base model: gists that can stand in for their blocks' tokens."""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, TrainingError
from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.gistnet.config import PoolingKind, ReaderKind
from megacontext.runtime.architectures import attention_modules
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import require_fit
from megacontext.runtime.gist_features import features_misfit
from megacontext.training.gist_batches import (
    GistPhase,
    GistRows,
    GistStep,
    check_prepared,
    gist_batches,
)
from megacontext.training.gist_objective import GistBatch, GistObjective, ObjectiveConfig
from megacontext.training.lm_batches import MixtureConfig, RowSampler, split_corpus
from megacontext.training.optimizers import HybridOptimizer, OptimizerConfig
from megacontext.training.prepared_dataset import PreparedDataset
from megacontext.training.run_log import JsonlLog, RunLogs, WandbLog, training_progress
from megacontext.training.train_state import (
    load_state,
    prefixed,
    require_shapes,
    save_state,
    under,
)


class GistShapeConfig(FrozenConfig):
    """What a new GistNet looks like; the rest follows from the base model.

    Attributes:
        width_factor: numbers in a stored gist, in units of the base's embedding width.
        n_layers: encoder layers.
        n_heads: attention heads of the encoder; 0: one for every 32 dimensions.
        d_ff: inner width of the encoder's MLPs; 0: 8/3 of the embedding width.
        context_tokens: tokens before the block that the encoder sees.
        pooling: ``slots`` or ``mean``.
        reader: ``kv`` or ``embedding``.
        slots: entries a gist is read as.
        reader_d_ff: inner width of the reader's MLP.
        kv_rank: rank of the maps to keys and values; 0: full.
        max_levels: highest level it can make.
        told_levels: levels that are told apart, those trained; 0: all.
        block_size: tokens of a block.
        feature_layers: layers of the base whose states the encoder reads; 0: input embeddings.
        feature_segment: tokens that those layers read together.
    """

    width_factor: int = Field(default=2, ge=1, le=4)
    n_layers: int = Field(default=2, ge=1)
    n_heads: int = Field(default=0, ge=0)
    d_ff: int = Field(default=0, ge=0)
    context_tokens: int = Field(default=256, ge=0)
    pooling: PoolingKind = "slots"
    reader: ReaderKind = "kv"
    slots: int = Field(default=6, ge=1, le=8)
    reader_d_ff: int = Field(default=0, ge=0)
    kv_rank: int = Field(default=0, ge=0)
    max_levels: int = Field(default=8, ge=1)
    told_levels: int = Field(default=0, ge=0)
    block_size: int = Field(default=32, ge=2)
    feature_layers: int = Field(default=0, ge=0)
    feature_segment: int = Field(default=256, ge=2)

    def build(self, base: BaseModel, seed: int) -> GistNet:
        """A GistNet of this shape for ``base``, with initial weights.

        Raises:
            ConfigError: the shape does not fit the base model.
        """
        values: dict[str, Any] = self.model_dump(exclude={"width_factor", "d_ff", "n_heads"})
        values |= {
            "kind": "transformer",
            "d_model": base.d_model,
            "gist_width": base.d_model * self.width_factor,
            "n_heads": self.n_heads or max(1, base.d_model // 32),
            "init_seed": seed,
        }
        if self.d_ff:
            values["d_ff"] = self.d_ff
        if self.reader == "kv":
            attention = attention_modules(base.model, base.n_layers, base.name)
            values |= {
                "kv_layers": base.n_layers,
                "kv_heads": base.n_kv_heads,
                "kv_head_dim": base.head_dim,
                "kv_value_dim": base.value_dim,
                "key_norm": any(hasattr(module, "k_norm") for module in attention),
            }
        config = GistNetConfig.parse(values, where="gistnet")
        problem = features_misfit(config, base)
        if problem is not None:
            raise ConfigError(f"gistnet: {problem}; lower it")
        return GistNet(config)


class TrainGistNetConfig(FrozenConfig):
    """One training run of a GistNet.

    Attributes:
        output: folder of checkpoints, log and result.
        model: the frozen base model.
        dtype: type of its weights.
        corpus: prose, plain or ``.zst``.
        held_out_every: every n-th document is held out.
        prepared: folders of prepared slices with teacher states.
        prepared_share: share of batches that come from them.
        gistnet: shape of the GistNet.
        init_from: checkpoint of a GistNet to start from; its own shape is kept.
        objective: terms of the loss.
        mixture: texts of generated rows.
        phases: the curriculum.
        optimizer: rates and schedule.
        accumulate: batches of one optimizer step.
        ema_decay: of the averaged weights that are exported; 0 exports the last ones.
        seed: of everything.
        device: where to train.
        mixed_precision: compute in bfloat16.
        compile: compile the base's decoder.
        workers: processes that build batches.
        log_every: steps between lines of the log.
        probe_every: steps between measurements on held-out texts.
        probe_batches: batches of such a measurement.
        checkpoint_every: steps between checkpoints.
        wandb: log to Weights & Biases as well.
    """

    output: Path
    model: str = "bundled:tiny"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    corpus: tuple[Path, ...] = Field(min_length=1)
    held_out_every: int = Field(default=16, ge=2)
    prepared: tuple[Path, ...] = ()
    prepared_share: float = Field(default=0.5, ge=0, le=1)
    gistnet: GistShapeConfig = GistShapeConfig()
    init_from: Path | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    mixture: MixtureConfig = MixtureConfig(statement_share=1.0, answer_weight=8.0)
    phases: tuple[GistPhase, ...] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = Field(default=1, ge=1)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    mixed_precision: bool = True
    compile: bool = False
    workers: int = Field(default=1, ge=0)
    log_every: int = Field(default=50, ge=1)
    probe_every: int = Field(default=500, ge=1)
    probe_batches: int = Field(default=4, ge=1)
    checkpoint_every: int = Field(default=250, ge=1)
    wandb: bool = False

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        for phase in self.phases:
            phase.check(self.gistnet.block_size)
            if any(not 1 <= slots <= self.gistnet.slots for slots in phase.slots):
                raise ValueError(f"slots is {phase.slots}, expected 1 to {self.gistnet.slots}")
        return self


class GistTrainer:
    """Runs, checkpoints and resumes the training of one GistNet.

    A run that was stopped at any moment and resumed ends, on the CPU, with the very weights of one
    that was not.

    Args:
        config: the run. What lies in ``config.output`` already is resumed.

    Raises:
        ConfigError: the phases or the shape do not fit the base model, the device does not exist.
        DataError: the corpus or the prepared slices cannot be used.
        CheckpointError: the checkpoint is damaged or of another shape, or ``init_from`` was made
            for another base.
    """

    def __init__(self, config: TrainGistNetConfig) -> None:
        self.config = config
        config.output.mkdir(parents=True, exist_ok=True)
        self.base = BaseModel.from_pretrained(
            config.model, dtype=config.dtype, device=config.device
        )
        # Only for what several processes need: their number, wrapping, reduction of gradients.
        self.accelerator = Accelerator(cpu=self.base.device.type == "cpu")
        self._require_positions()
        if config.init_from is not None:
            gistnet = GistNet.from_pretrained(config.init_from, dtype=torch.float32)
            require_fit(gistnet, self.base)
        else:
            gistnet = config.gistnet.build(self.base, config.seed)
        objective = GistObjective(self.base, gistnet, config.objective, compile=config.compile)
        objective.to(self.base.device).train()
        self.gistnet = gistnet
        self.parameters = dict(objective.named_parameters())
        self.objective = self.accelerator.prepare(objective)
        self.optimizer = HybridOptimizer(self.parameters.items(), config.optimizer)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        samplers = self._samplers()
        self.rows = self._plan(samplers["training"])
        self.probe_rows = self._probe_plan(samplers["held_out"])
        self.log = RunLogs(JsonlLog(config.output / "log.jsonl"))
        self.step = 0
        self.losses: list[float] = []
        self._resume()

    def run(self) -> Path:
        """Trains to the end and returns the folder of the finished GistNet.

        Raises:
            TrainingError: the training diverged; the last checkpoint is kept.
        """
        config = self.config
        if config.wandb and self.accelerator.is_main_process:
            settings = config.model_dump(mode="json")
            wandb = WandbLog(config.output, config.output.name, settings)
            self.log = RunLogs(*self.log.logs, wandb)
        total = len(self.rows.plan) // config.accumulate
        self.rows.first = self.step * config.accumulate
        source = gist_batches(self.rows, workers=config.workers)
        started, tokens = time.monotonic(), 0
        with training_progress() as progress:
            task = progress.add_task("training", total=total, completed=self.step)
            while self.step < total:
                rate = self.optimizer.rate(self.step, total)
                micro = [next(source) for _ in range(config.accumulate)]
                loss, norm = self._train(micro, rate)
                tokens += sum(batch.ids.numel() for batch in micro)
                self.losses.append(loss)
                self.step += 1
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise self._diverged(f"the loss is {loss}, its gradient {norm}")
                if self.step % config.log_every == 0:
                    speed = tokens / (time.monotonic() - started)
                    mean = sum(self.losses) / len(self.losses)
                    self._log({"loss": mean, "norm": norm, "rate": rate, "tokens_per_s": speed})
                    self.losses, tokens, started = [], 0, time.monotonic()
                if self.step % config.probe_every == 0 or self.step == total:
                    self._log(self._probe())
                if self.step % config.checkpoint_every == 0 or self.step == total:
                    self._checkpoint()
                progress.update(task, completed=self.step)
        self.log.close()
        return self.export()

    def export(self) -> Path:
        """Writes the averaged GistNet in fp16, as :meth:`GistNet.from_pretrained` loads it."""
        folder = self.config.output / "gistnet"
        weights = self.average if self.config.ema_decay else self.parameters
        with torch.device("meta"):
            exported = GistNet(self.gistnet.config)
        state = under("gistnet.", weights)
        exported.load_state_dict(
            {name: value.detach().to("cpu", torch.float16) for name, value in state.items()},
            assign=True,
        )
        if self.accelerator.is_main_process:
            exported.save_pretrained(folder)
        return folder

    def _train(self, micro: list[GistBatch], rate: float) -> tuple[float, float]:
        """One optimizer step; the loss and the gradient's norm."""
        total = 0.0
        for index, batch in enumerate(micro):
            # Gradients are reduced over processes with the last batch only.
            last = index == len(micro) - 1
            waiting = nullcontext() if last else self.accelerator.no_sync(self.objective)
            with waiting, self._autocast():
                loss: Tensor = self.objective(batch.to(self.base.device))["loss"] / len(micro)
                self.accelerator.backward(loss)
            total += float(loss.detach())
        norm = self.optimizer.step(rate)
        decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            names = list(self.parameters)
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                [self.average[name] for name in names],
                [self.parameters[name].detach() for name in names],
                1.0 - decay,
            )
        return total, norm

    @torch.no_grad()
    def _probe(self) -> dict[str, Any]:
        """KL on held-out prose and on held-out generated texts, in nats per weighted token."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._load_parameters(self.average if self.config.ema_decay else trained)
        try:
            measured: dict[str, Any] = {}
            objective = self.accelerator.unwrap_model(self.objective)
            phase = self._phase_now()
            for kind, rows in self.probe_rows.items():
                rows.plan = [GistStep(phase, rows.plan[0].sampler)] * self.config.probe_batches
                values: list[float] = []
                for index in range(len(rows)):
                    with self._autocast():
                        terms = objective(rows[index].to(self.base.device))
                    values.append(float(terms["kl"]))
                measured[f"kl_{kind}"] = sum(values) / len(values)
            return {"probe": measured}
        finally:
            self._load_parameters(trained)

    def _phase_now(self) -> GistPhase:
        index = min(self.step * self.config.accumulate, len(self.rows.plan) - 1)
        return self.rows.plan[index].phase

    def _load_parameters(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.config.mixed_precision:
            return nullcontext()
        return torch.autocast(self.base.device.type, torch.bfloat16)

    def _samplers(self) -> dict[str, RowSampler]:
        config = self.config
        tokenizer = self.base.tokenizer
        if not getattr(tokenizer, "is_fast", False) or tokenizer.eos_token is None:
            raise ConfigError(
                f"{self.base.name}: needs a fast tokenizer with an end-of-text token to be trained "
                "on generated texts"
            )
        training, held_out = split_corpus(config.corpus, config.held_out_every)
        return {
            split: RowSampler(
                tokenizer.backend_tokenizer, prose, config.mixture, config.seed,
                tokenizer.eos_token,
            )
            for split, prose in (("training", training), ("held_out", held_out))
        }  # fmt: skip

    def _plan(self, sampler: RowSampler) -> GistRows:
        config = self.config
        prepared = [PreparedDataset.open(folder, self.base) for folder in config.prepared]
        for dataset in prepared:
            check_prepared(dataset, config.phases, self.base.n_layers)
        steps = [
            GistStep(phase, phase_sampler)
            for phase in config.phases
            for phase_sampler in [sampler.with_mixture(phase.mixture or config.mixture)]
            for _ in range(phase.steps * config.accumulate)
        ]
        return GistRows(
            steps,
            block_size=self.gistnet.config.block_size,
            seed=config.seed,
            prepared=prepared,
            prepared_share=config.prepared_share,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def _probe_plan(self, sampler: RowSampler) -> dict[str, GistRows]:
        shares = {"prose": (1.0, 0.0), "recall": (0.0, 1.0)}
        plans: dict[str, GistRows] = {}
        for kind, (prose, recall) in shares.items():
            mixture = self.config.mixture.model_copy(
                update={"prose_share": prose, "recall_share": recall, "copy_share": 0.0}
            )
            step = GistStep(self.config.phases[0], sampler.with_mixture(mixture))
            plans[kind] = GistRows(
                [step], block_size=self.gistnet.config.block_size, seed=self.config.seed + 10**6
            )
        return plans

    def _require_positions(self) -> None:
        longest = max(phase.length for phase in self.config.phases)
        if longest > self.base.max_positions:
            raise ConfigError(
                f"`phases` have windows of {longest} tokens, {self.base.name} has "
                f"{self.base.max_positions} positions; shorten them"
            )

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.log.write(self.step, record)

    def _checkpoint(self) -> None:
        """Writes the whole state.

        Raises:
            TrainingError: a tensor is no longer finite.
        """
        tensors = prefixed("model|", {n: p.detach() for n, p in self.parameters.items()})
        tensors |= prefixed("average|", self.average)
        tensors |= prefixed("optim|", self.optimizer.state_tensors())
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise self._diverged(f"{name.partition('|')[2]} is no longer finite")
        if self.accelerator.is_main_process:
            metadata = {"step": str(self.step), "losses": json.dumps(self.losses)}
            save_state(self.config.output / "checkpoint.safetensors", tensors, metadata)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"step {self.step}: {what}; lower the rates in `optimizer` and start again: the last "
            f"good checkpoint in {self.config.output} is resumed"
        )

    def _resume(self) -> None:
        path = self.config.output / "checkpoint.safetensors"
        if path.exists():
            tensors, metadata = load_state(path)
            state = under("model|", tensors)
            advice = "keep `gistnet` and `objective` as they were or choose another `output`"
            require_shapes(path, state, self.parameters, advice)
            self._load_parameters(state)
            for name, value in under("average|", tensors).items():
                self.average[name].copy_(value)
            self.optimizer.load_state_tensors(under("optim|", tensors))
            self.step = int(metadata["step"])
            self.losses = json.loads(metadata.get("losses", "[]"))
            total = len(self.rows.plan) // self.config.accumulate
            if self.step > total:
                raise ConfigError(
                    f"{path}: is at step {self.step}, `phases` have {total} steps; add steps or "
                    "choose another `output`"
                )
        self.log.rewind(self.step)
