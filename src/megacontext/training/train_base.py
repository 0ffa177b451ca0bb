"""Trains the bundled base model from scratch on prose and generated recall tasks."""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from megacontext.config import FrozenConfig
from megacontext.errors import DataError, TrainingError
from megacontext.training.lm_batches import (
    MixtureConfig,
    PlannedStep,
    RowSampler,
    batches,
    read_documents,
)
from megacontext.training.optimizers import HybridOptimizer, OptimizerConfig
from megacontext.tasks.recall_documents import Prose, RecallDocuments
from megacontext.training.recall_probe import probe_recall
from megacontext.training.tokenizer import as_transformers, train_tokenizer

logger = logging.getLogger(__name__)


class ArchitectureConfig(FrozenConfig):
    """Size of the Qwen3 model."""

    vocab_size: int = Field(default=4096, ge=512, le=65535)
    hidden_size: int = Field(default=256, ge=32)
    layers: int = Field(default=6, ge=1)
    heads: int = Field(default=8, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    head_dim: int = Field(default=32, ge=8)
    intermediate_size: int = Field(default=640, ge=32)
    max_positions: int = Field(default=2048, ge=128)
    rope_theta: float = Field(default=10_000.0, gt=0)

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


class BaseTrainer:
    """Runs, checkpoints and resumes the training of one base model.

    Args:
        config: the run. What lies in ``config.output`` already is resumed.

    Raises:
        DataError: the corpus cannot be read or is too small.
    """

    def __init__(self, config: TrainBaseConfig) -> None:
        self.config = config
        config.output.mkdir(parents=True, exist_ok=True)
        documents = read_documents(config.corpus)
        if len(documents) < config.held_out_every:
            raise DataError(
                f"the corpus has {len(documents)} documents, too few to hold out one in "
                f"{config.held_out_every}; add text or lower `held_out_every`"
            )
        held_out = config.held_out_every
        self.training = Prose([d for i, d in enumerate(documents) if i % held_out])
        self.held_out = Prose(documents[::held_out])
        torch.manual_seed(config.seed)
        self.tokenizer = self._load_or_train_tokenizer()
        self.model = config.architecture.build().to(config.device)
        self.optimizer = HybridOptimizer(self.model.named_parameters(), config.optimizer)
        self.sampler = RowSampler(self.tokenizer, self.training, config.mixture, config.seed)
        self.probe_sampler = RowSampler(self.tokenizer, self.held_out, config.mixture, config.seed)
        self.plan = [
            PlannedStep(phase.rows, phase.length, sampler)
            for phase in config.phases
            for sampler in [self.sampler.with_mixture(phase.mixture or config.mixture)]
            for _ in range(phase.steps)
        ]
        self.step = self._resume()

    def run(self) -> Path:
        """Trains to the end and returns the folder of the finished model.

        Raises:
            TrainingError: the loss is no longer finite; the last checkpoint is kept.
        """
        config = self.config
        body: Any = torch.compile(self.model.model) if config.compile else self.model.model
        total = len(self.plan)
        losses: list[float] = []
        started, tokens = time.monotonic(), 0
        source = batches(self.plan, first=self.step, workers=config.workers)
        with _progress() as progress:
            task = progress.add_task("training", total=total, completed=self.step)
            for batch in source:
                rate = self.optimizer.rate(self.step, total)
                loss = self._loss(body, batch.ids, batch.weights)
                loss.backward()
                norm = self.optimizer.step(rate)
                losses.append(float(loss.detach()))
                tokens += batch.ids.numel()
                self.step += 1
                if not _finite(losses[-1]):
                    raise TrainingError(
                        f"step {self.step}: the loss is {losses[-1]}; lower `optimizer.muon_lr` and "
                        f"start again: the last good checkpoint in {config.output} is resumed"
                    )
                if self.step % config.log_every == 0:
                    speed = tokens / (time.monotonic() - started)
                    mean = sum(losses) / len(losses)
                    self._log({"loss": mean, "norm": norm, "rate": rate, "tokens_per_s": speed})
                    losses, tokens, started = [], 0, time.monotonic()
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
        model.to(torch.float16).save_pretrained(folder)
        as_transformers(self.tokenizer, self.config.architecture.max_positions).save_pretrained(
            folder
        )
        return folder

    def _loss(self, body: Any, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean NLL of ``ids [batch, length]``; ``weights`` belong to the target tokens."""
        ids, weights = ids.to(self.config.device), weights.to(self.config.device)
        scored = weights[:, 1:] > 0
        with self._autocast():
            hidden: Tensor = body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits: Tensor = self.model.lm_head(hidden[scored])
        nll = nn.functional.cross_entropy(logits.float(), ids[:, 1:][scored], reduction="none")
        target_weights = weights[:, 1:][scored]
        return (nll * target_weights).sum() / target_weights.sum()

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.config.mixed_precision:
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16)

    def _load_or_train_tokenizer(self) -> Tokenizer:
        path = self.config.output / "tokenizer.json"
        if not path.exists():
            import random

            rng = random.Random(f"tokenizer/{self.config.seed}")
            recall = RecallDocuments(rng, self.training)
            share = self.config.tokenizer_characters // 100
            texts = [self.training.slice(rng, share) for _ in range(88)]
            for _ in range(share * 12 // 800):
                texts.append("".join(piece.text for piece in recall.draw(250)))
            train_tokenizer(texts, self.config.architecture.vocab_size).save(str(path))
        return Tokenizer.from_file(str(path))

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
        line = json.dumps({"step": self.step, "time": round(time.time(), 1), **_rounded(record)})
        with (self.config.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        logger.info("%s", line)

    def _checkpoint(self) -> None:
        """Writes the whole state beside the last one and switches by renaming."""
        tensors = {f"model|{name}": value for name, value in self.model.state_dict().items()}
        tensors.pop("model|lm_head.weight", None)
        tensors |= {f"optim|{name}": t for name, t in self.optimizer.state_tensors().items()}
        fresh = self.config.output / "checkpoint.tmp"
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            fresh,
            metadata={"step": str(self.step)},
        )
        fresh.replace(self.config.output / "checkpoint.safetensors")

    def _resume(self) -> int:
        path = self.config.output / "checkpoint.safetensors"
        if not path.exists():
            return 0
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(path)
        state = {n.removeprefix("model|"): t for n, t in tensors.items() if n.startswith("model|")}
        self.model.load_state_dict(state, strict=False)
        self.optimizer.load_state_tensors(
            {n.removeprefix("optim|"): t for n, t in tensors.items() if n.startswith("optim|")}
        )
        return step


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
