"""Suite ``base``: what the base model answers when all it needs lies in its window."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, DataError
from megacontext.evaluation.babi import find_babi, read_babi
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.evaluation.in_window import accuracy
from megacontext.evaluation.metrics import Estimate, mean, proportion
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.tasks.documents import QUESTION_TEMPLATE
from megacontext.tasks.fact_themes import FactThemes

_BABI_TASKS = tuple(f"qa{number}" for number in range(1, 11))


class BaseSuiteConfig(FrozenConfig):
    """What the suite asks.

    Attributes:
        model: base model.
        babi: folder with the published bAbI v1.1 files; their test questions are asked.
        samples: questions per bAbI task, and key recall questions.
        prose_windows: windows of held-out prose.
        window: tokens per window.
        seed: of the samples.
    """

    model: str = "bundled:tiny"
    babi: Path = Path("../shared/eval/babi")
    samples: int = Field(default=1000, ge=1)
    prose_windows: int = Field(default=100, ge=1)
    window: int = Field(default=1024, ge=64)
    seed: int = 0


def run_base_suite(
    config: BaseSuiteConfig, progress: Callable[[str], None] | None = None
) -> dict[str, Estimate]:
    """Exact match on bAbI qa1 to qa10 and on key recall, bits per byte on held-out prose.

    Questions whose story does not fit the window are left out and lower ``n``.

    Args:
        config: the suite.
        progress: called with each measure's name before it is taken.

    Raises:
        DataError: the bAbI files are not there, or none of their questions fits the window.
        ConfigError: the window is larger than what the model was trained for.
    """
    base = BaseModel.from_pretrained(config.model)
    if config.window > base.max_positions:
        raise ConfigError(
            f"window is {config.window}, {config.model} has {base.max_positions} positions"
        )
    results: dict[str, Estimate] = {}
    hits: list[bool] = []
    for task in _BABI_TASKS:
        if progress is not None:
            progress(task)
        right = _babi(base, config, task)
        results[f"babi.in_window.{task}"] = proportion(sum(right), len(right))
        if task in _BABI_TASKS[:5]:
            hits += right
    results["babi.in_window.qa1-5"] = proportion(sum(hits), len(hits))
    if progress is not None:
        progress("key recall")
    right = accuracy(base, key_recall(config.samples, config.seed))
    results["key_recall.16x6"] = proportion(sum(right), len(right))
    if progress is not None:
        progress("held-out prose")
    results["prose.bits_per_byte"] = mean(_bits_per_byte(base, config))
    return results


def key_recall(
    samples: int, seed: int, *, keys: int = 16, digits: int = 6
) -> list[tuple[str, str]]:
    """Prompts that list ``keys`` held-out keys with numbers of ``digits`` digits and ask one."""
    rng = random.Random(f"key_recall/{seed}")
    items: list[tuple[str, str]] = []
    for _ in range(samples):
        theme = FactThemes(rng, "held_out").key_list(keys, digits)
        question = rng.choice(theme.questions)
        prompt = "".join(theme.statements) + QUESTION_TEMPLATE.format(question=question.text)
        items.append((prompt.strip(), question.answer))
    return items


def _babi(base: BaseModel, config: BaseSuiteConfig, task: str) -> list[bool]:
    path = find_babi(config.babi, task)
    questions = read_babi(path)
    rng = random.Random(f"{task}/{config.seed}")
    chosen = rng.sample(questions, min(config.samples, len(questions)))
    items = [
        (question.prompt, question.answer)
        for question in chosen
        if len(base.encode(question.prompt)) <= config.window - 16
    ]
    if not items:
        raise DataError(f"{path}: no question fits a window of {config.window} tokens; raise it")
    return accuracy(base, items)


def _bits_per_byte(base: BaseModel, config: BaseSuiteConfig) -> list[float]:
    """Bits per byte of windows spread over the bundled book, which no training has seen."""
    ids = base.encode(read_book(DemoConfig(model=config.model)))
    window = min(config.window, len(ids) - 1)
    bits: list[float] = []
    for index in range(config.prose_windows):
        start = index * (len(ids) - window) // config.prose_windows
        chunk = ids[start : start + window]
        reading = ContextInput(base.embed(chunk[:-1]), torch.arange(window - 1))
        logits = base.prefill(reading).logits.float()
        nll = torch.nn.functional.cross_entropy(logits, chunk[1:].to(logits.device))
        size = len(base.decode(chunk[1:]).encode())
        bits.append(float(nll) * (window - 1) / math.log(2) / size)
    return bits
