"""Trains the bundled base model from scratch on prose and generated recall tasks."""

from __future__ import annotations

import json
import math
import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from megacontext.checkpoints import seeded_init
from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, DataError, TrainingError
from megacontext.runtime.model_loading import parse_device
from megacontext.tasks.recall_documents import RecallDocuments
from megacontext.training.lm_batches import (
    LMBatch,
    MixtureConfig,
    PlannedStep,
    RowSampler,
    batches,
    split_corpus,
)
from megacontext.training.optimizers import HybridOptimizer, OptimizerConfig
from megacontext.training.recall_probe import probe_recall
from megacontext.training.run_log import JsonlLog, training_progress
from megacontext.training.state_head import StateHead, StateHeadConfig
from megacontext.training.tokenizer import as_transformers, train_tokenizer
from megacontext.training.train_state import (
    load_state,
    prefixed,
    require_shapes,
    save_state,
    under,
)


class ArchitectureConfig(FrozenConfig):
    """Size of the Qwen3 model."""

    vocab_size: int = Field(default=4096, ge=512, le=65535)
    hidden_size: int = Field(default=256, ge=32)
    layers: int = Field(default=6, ge=1)
    heads: int = Field(default=8, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    head_dim: int = Field(default=32, ge=8, multiple_of=2)
    intermediate_size: int = Field(default=640, ge=32)
    max_positions: int = Field(default=2048, ge=128)
    rope_theta: float = Field(default=10_000.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        return self

    def build(self) -> Qwen3ForCausalLM:
        """The model with random weights."""
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                head_dim=self.head_dim,
                max_position_embeddings=self.max_positions,
                rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )


class Phase(FrozenConfig):
    """A stretch of training with rows of one length."""

    length: int = Field(ge=32)
    rows: int = Field(ge=1, le=4096)
    steps: int = Field(ge=1)
    mixture: MixtureConfig | None = Field(default=None, description="if not that of the run")


class TrainBaseConfig(FrozenConfig):
    """One training run of the base model."""

    output: Path
    corpus: tuple[Path, ...] = Field(min_length=1)
    held_out_every: int = Field(default=16, ge=2, description="every n-th document is held out")
    architecture: ArchitectureConfig = ArchitectureConfig()
    mixture: MixtureConfig = MixtureConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    state_head: StateHeadConfig = StateHeadConfig()
    phases: tuple[Phase, ...] = Field(min_length=1)
    seed: int = 0
    device: str = "cpu"
    mixed_precision: bool = True
    compile: bool = False
    workers: int = Field(default=1, ge=0)
    tokenizer_characters: int = Field(default=20_000_000, ge=10_000)
    log_every: int = Field(default=50, ge=1)
    probe_every: int = Field(default=500, ge=1)
    probe_rows: int = Field(default=40, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        longest = max(phase.length for phase in self.phases)
        if longest > self.architecture.max_positions:
            raise ValueError(
                f"a phase has length {longest}, more than architecture.max_positions "
                f"({self.architecture.max_positions})"
            )
        if self.state_head.layer > self.architecture.layers:
            raise ValueError(
                f"state_head.layer is {self.state_head.layer}, architecture.layers is "
                f"{self.architecture.layers}"
            )
        return self


class BaseTrainer:
    """Runs, checkpoints and resumes the training of one base model.

    A run that was stopped at any moment and resumed ends, on the CPU, with the very weights of one
    that was not: rows depend on seed and step alone, and a checkpoint holds all other state.

    Args:
        config: the run. What lies in ``config.output`` already is resumed.

    Raises:
        ConfigError: the device does not exist here, or the checkpoint lies behind the last step.
        DataError: the corpus cannot be read or is too small, or the tokenizer does not fit.
        CheckpointError: the checkpoint is damaged or of another architecture.
    """

    def __init__(self, config: TrainBaseConfig) -> None:
        self.config = config
        device = parse_device(config.device)
        config.output.mkdir(parents=True, exist_ok=True)
        self.training, self.held_out = split_corpus(config.corpus, config.held_out_every)
        self.tokenizer = self._load_or_train_tokenizer()
        with seeded_init(config.seed):
            self.model = config.architecture.build()
            self.head = StateHead(config.architecture.hidden_size, config.state_head)
        nn.Module.to(self.model, device)
        self.head.to(device)
        self.optimizer = HybridOptimizer(self._parameters(), config.optimizer)
        self.sampler = RowSampler(self.tokenizer, self.training, config.mixture, config.seed)
        self.probe_sampler = RowSampler(self.tokenizer, self.held_out, config.mixture, config.seed)
        self.plan = [
            PlannedStep(phase.rows, phase.length, sampler)
            for phase in config.phases
            for sampler in [self.sampler.with_mixture(phase.mixture or config.mixture)]
            for _ in range(phase.steps)
        ]
        self.log = JsonlLog(config.output / "log.jsonl")
        self.step = 0
        # Since the last line of the log.
        self.losses: list[float] = []
        self._resume()

    def run(self) -> Path:
        """Trains to the end and returns the folder of the finished model.

        Raises:
            TrainingError: the training diverged; the last checkpoint is kept.
        """
        config = self.config
        body: Any = self.model.model
        if config.compile:
            # One kernel a length: with dynamic shapes a resumed run would compile another one.
            body = torch.compile(body, dynamic=False)
        total = len(self.plan)
        started, tokens = time.monotonic(), 0
        source = batches(self.plan, first=self.step, workers=config.workers)
        with training_progress() as progress:
            task = progress.add_task("training", total=total, completed=self.step)
            for batch in source:
                rate = self.optimizer.rate(self.step, total)
                loss = self._loss(body, batch)
                loss.backward()
                norm = self.optimizer.step(rate)
                self.losses.append(float(loss.detach()))
                tokens += batch.ids.numel()
                self.step += 1
                if not math.isfinite(self.losses[-1]) or not math.isfinite(norm):
                    raise self._diverged(f"the loss is {self.losses[-1]}, its gradient {norm}")
                if self.step % config.log_every == 0:
                    speed = tokens / (time.monotonic() - started)
                    mean = sum(self.losses) / len(self.losses)
                    self._log({"loss": mean, "norm": norm, "rate": rate, "tokens_per_s": speed})
                    self.losses, tokens, started = [], 0, time.monotonic()
                if self.step % config.probe_every == 0 or self.step == total:
                    self._probe()
                if self.step % config.checkpoint_every == 0 or self.step == total:
                    self._checkpoint()
                progress.update(task, completed=self.step)
        return self.export()

    def export(self) -> Path:
        """Writes the model, fp16, and its tokenizer as transformers loads them."""
        folder = self.config.output / "model"
        model = self.config.architecture.build()
        model.load_state_dict(self.model.state_dict())
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=0, pad_token_id=0, bos_token_id=0
        )
        nn.Module.to(model, torch.float16)
        model.save_pretrained(folder)
        as_transformers(self.tokenizer, self.config.architecture.max_positions).save_pretrained(
            folder
        )
        return folder

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name; of the auxiliary head only if it is in use."""
        named = list(self.model.named_parameters())
        if self.config.state_head.layer:
            named += [(f"state_head.{name}", p) for name, p in self.head.named_parameters()]
        return named

    def _loss(self, body: Any, batch: LMBatch) -> Tensor:
        """Weighted mean NLL of the batch, and the auxiliary head's loss if it is in use."""
        device, layer = self.config.device, self.config.state_head.layer
        ids, weights = batch.ids.to(device), batch.weights.to(device)
        scored = weights[:, 1:] > 0
        with self._autocast():
            output = body(input_ids=ids[:, :-1], use_cache=False, output_hidden_states=layer > 0)
            logits: Tensor = self.model.lm_head(output.last_hidden_state[scored])
        nll = nn.functional.cross_entropy(logits.float(), ids[:, 1:][scored], reduction="none")
        target_weights = weights[:, 1:][scored]
        # A batch without a scored token teaches nothing; it must not end the run as 0 / 0.
        loss = (nll * target_weights).sum() / target_weights.sum().clamp(min=1e-9)
        if not layer:
            return loss
        table = self.model.get_input_embeddings().weight
        with self._autocast():
            known = self.head(output.hidden_states[layer], batch.states.to(device), table)
        return loss + self.config.state_head.weight * known

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.config.mixed_precision:
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16)

    def _load_or_train_tokenizer(self) -> Tokenizer:
        path = self.config.output / "tokenizer.json"
        vocab_size = self.config.architecture.vocab_size
        if not path.exists():
            rng = random.Random(f"tokenizer/{self.config.seed}")
            recall = RecallDocuments(rng, self.training)
            share = self.config.tokenizer_characters // 100
            texts = [self.training.slice(rng, share) for _ in range(88)]
            texts += [
                "".join(piece.text for piece in recall.draw(250)) for _ in range(share * 12 // 800)
            ]
            part = path.with_suffix(".part")
            train_tokenizer(texts, vocab_size).save(str(part))
            part.replace(path)
        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.get_vocab_size() > vocab_size:
            raise DataError(
                f"{path}: has {tokenizer.get_vocab_size()} tokens, `architecture.vocab_size` is "
                f"{vocab_size}; choose another `output`"
            )
        return tokenizer

    def _probe(self) -> None:
        self.model.eval()
        length = self.plan[min(self.step, len(self.plan) - 1)].length
        with self._autocast():
            report = probe_recall(
                self.model, self.probe_sampler, length=length, rows=self.config.probe_rows
            )
        self.model.train()
        self._log({"probe_length": length, **asdict(report)})

    def _log(self, record: dict[str, Any]) -> None:
        self.log.write(self.step, record)

    def _checkpoint(self) -> None:
        """Writes the whole state beside the last one and switches by renaming.

        Raises:
            TrainingError: a tensor is no longer finite.
        """
        # The output layer is the embedding and is stored once.
        tensors = prefixed("model|", self.model.state_dict())
        tensors.pop("model|lm_head.weight", None)
        if self.config.state_head.layer:
            tensors |= prefixed("head|", self.head.state_dict())
        tensors |= prefixed("optim|", self.optimizer.state_tensors())
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise self._diverged(f"{name.partition('|')[2]} is no longer finite")
        metadata = {"step": str(self.step), "losses": json.dumps(self.losses)}
        save_state(self.config.output / "checkpoint.safetensors", tensors, metadata)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"step {self.step}: {what}; lower `optimizer.muon_lr` and start again: the last good "
            f"checkpoint in {self.config.output} is resumed"
        )

    def _resume(self) -> None:
        """Takes up the checkpoint, if there is one, and drops what was logged after it."""
        path = self.config.output / "checkpoint.safetensors"
        if path.exists():
            tensors, metadata = load_state(path)
            self._load(path, tensors)
            self.step = int(metadata["step"])
            self.losses = json.loads(metadata.get("losses", "[]"))
            if self.step > len(self.plan):
                raise ConfigError(
                    f"{path}: is at step {self.step}, `phases` have {len(self.plan)} steps; add "
                    "steps or choose another `output`"
                )
        self.log.rewind(self.step)

    def _load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        state = under("model|", tensors)
        expected = self.model.state_dict()
        expected.pop("lm_head.weight", None)
        require_shapes(
            path, state, expected, "keep `architecture` as it was or choose another `output`"
        )
        self.model.load_state_dict(state, strict=False)
        head = under("head|", tensors)
        if head and self.config.state_head.layer:
            require_shapes(path, head, self.head.state_dict(), "keep `state_head` as it was")
            self.head.load_state_dict(head)
        self.optimizer.load_state_tensors(under("optim|", tensors))
