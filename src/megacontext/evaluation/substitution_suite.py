"""Suite ``substitution``: whether a gist can stand in for the tokens of its span."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.evaluation.gist_answers import answer_all, single_fact_questions
from megacontext.evaluation.metrics import Estimate, mean, proportion, rank_correlation, ratio
from megacontext.evaluation.substitution import HORIZON, Substitution, WindowNLL, measure
from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import load_gistnet
from megacontext.runtime.gist_features import GistFeatures
from megacontext.runtime.plain_decode import raw_context
from megacontext.tasks.recall_documents import Prose, RecallDocuments

_HORIZONS = (32, 64, HORIZON)
_SOURCES = ("prose", "recall")
# A window counts as substitutable where the gists cost at most this share of the NLL.
_SUBSTITUTABLE = 0.05
_ANSWER_BLOCKS = 8


class SubstitutionSuiteConfig(FrozenConfig):
    """What the suite measures.

    Attributes:
        model: base model.
        gistnet: GistNet checkpoint, or ``bundled``.
        windows: windows per source and shape.
        answers: questions whose evidence is read as gists only.
        context_blocks: blocks of the windows in which 1 or 8 are replaced.
        ingest_tokens: tokens of the speed comparison.
        seed: of texts and samples.
    """

    model: str = "bundled:tiny"
    gistnet: str | Path = "bundled"
    windows: int = Field(default=200, ge=2)
    answers: int = Field(default=300, ge=2)
    context_blocks: int = Field(default=16, ge=8)
    ingest_tokens: int = Field(default=16_384, ge=1024)
    seed: int = 0


def substitutions(config: SubstitutionSuiteConfig, gistnet: GistNet) -> dict[str, Substitution]:
    """The window shapes by name.

    One and eight spans stand right before what is predicted; ``N32`` keeps 64 raw tokens between;
    ``budget`` compares 64 raw tokens and gists for the price of 64 more with 128 raw tokens.
    """
    blocks, size = config.context_blocks, gistnet.config.block_size
    tail = (0,) * (64 // size)
    bought = 64 // gistnet.cost
    return {
        "L1.N1": Substitution("L1.N1", (0,) * (blocks - 1) + (1,)),
        "L1.N8": Substitution("L1.N8", (0,) * (blocks - 8) + (1,) * 8),
        "L1.N32": Substitution("L1.N32", (1,) * 32 + tail),
        "L2": Substitution("L2", (2,) * size),
        "budget": Substitution("budget", (1,) * bought + tail, recent=128),
    }


def run_substitution_suite(
    config: SubstitutionSuiteConfig, progress: Callable[[str], None] | None = None
) -> dict[str, Estimate]:
    """ΔNLL, degradation, recovered share and more, by source, shape and horizon.

    Args:
        config: the suite.
        progress: called with each measure's name before it is taken.

    Raises:
        ConfigError: the model has too few positions, or the GistNet is not one for it.
    """
    base = BaseModel.from_pretrained(config.model)
    gistnet = load_gistnet(config.gistnet, base, config.model)
    shapes = substitutions(config, gistnet)
    size = gistnet.config.block_size
    longest = max(shape.tokens(size) for shape in shapes.values())
    if longest > base.max_positions:
        raise ConfigError(
            f"windows of {longest} tokens are needed, {config.model} has {base.max_positions} "
            "positions"
        )
    prose = read_book(DemoConfig(model=config.model))
    say = progress or _silent
    results: dict[str, Estimate] = {}
    ranks: list[tuple[float, float]] = []
    for source in _SOURCES:
        stream = (
            base.encode(prose)
            if source == "prose"
            else recall_stream(base, prose, config.windows, config.seed)
        )
        for name, shape in shapes.items():
            if name == "budget" and source != "prose":
                continue
            say(f"{source}, {name}")
            ids = spread_windows(stream, config.windows, shape.tokens(size))
            measured = measure(base, gistnet, ids, shape)
            if name == "budget":
                gain = measured.nll["recency"] - measured.nll["gist"]
                results["equal_budget_gain.prose"] = mean(gain.mean(1).tolist())
                continue
            results |= _estimates(f"{source}.{name}", measured)
            if name == "L1.N1":
                cost = measured.cost[:, :64].mean(1).tolist()
                ranks += zip(measured.predicted.tolist(), cost, strict=True)
    correlation = rank_correlation([p for p, _ in ranks], [c for _, c in ranks])
    results["fidelity.rank_correlation"] = Estimate(
        correlation, correlation, correlation, len(ranks)
    )
    say("answers from gists")
    results |= _answers(base, gistnet, prose, config)
    say("speed")
    results["ingest_ratio"] = _ingest_ratio(base, gistnet, config)
    return results


def _silent(_: str) -> None:
    """Nobody wants to know."""


def spread_windows(stream: Tensor, count: int, tokens: int) -> Tensor:
    """``count`` windows spread evenly over a stream, ``[count, tokens]``."""
    starts = torch.arange(count) * (len(stream) - tokens) // max(1, count - 1)
    return stream[starts[:, None] + torch.arange(tokens)]


def recall_stream(base: BaseModel, prose: str, n_windows: int, seed: int) -> Tensor:
    """Generated texts with held-out facts and questions, one after the other, for many windows."""
    rng = random.Random(f"substitution/{seed}")
    documents = RecallDocuments(rng, Prose([prose]), "held_out")
    wanted = max(4096, n_windows * 640)
    parts: list[Tensor] = []
    while sum(len(part) for part in parts) < wanted:
        text = "".join(piece.text for piece in documents.draw(rng.randint(100, 800)))
        parts.append(base.encode(text + "\n"))
    return torch.cat(parts)


def _estimates(where: str, measured: WindowNLL) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for horizon in _HORIZONS:
        nll = {v: values[:, :horizon].mean(1).tolist() for v, values in measured.nll.items()}
        delta = [g - f for g, f in zip(nll["gist"], nll["full"], strict=True)]
        worth = [d - f for d, f in zip(nll["dropped"], nll["full"], strict=True)]
        at = f"@{horizon}.{where}"
        found[f"delta_nll{at}"] = mean(delta)
        found[f"degradation{at}"] = ratio(delta, nll["full"])
        for variant in ("gist", "mean", "recency"):
            kept = [d - v for d, v in zip(nll["dropped"], nll[variant], strict=True)]
            prefix = "recovered" if variant == "gist" else f"recovered.{variant}"
            found[f"{prefix}{at}"] = ratio(kept, worth)
        fine = [d <= _SUBSTITUTABLE * f for d, f in zip(delta, nll["full"], strict=True)]
        found[f"substitutability{at}"] = proportion(sum(fine), len(fine))
        for variant in ("full", "gist", "mean", "dropped", "recency"):
            found[f"nll.{variant}{at}"] = mean(nll[variant])
    return found


def _answers(
    base: BaseModel, gistnet: GistNet, prose: str, config: SubstitutionSuiteConfig
) -> dict[str, Estimate]:
    """Accuracy by arm and family, and the gain over the best answer without evidence, in points."""
    questions = single_fact_questions(
        base,
        prose,
        config.answers,
        blocks=_ANSWER_BLOCKS,
        block_size=gistnet.config.block_size,
        seed=config.seed,
    )
    right = answer_all(base, gistnet, questions)
    found = {f"answers.{arm}": proportion(sum(hits), len(hits)) for arm, hits in right.items()}
    for family in sorted({question.family for question in questions}):
        of = [i for i, question in enumerate(questions) if question.family == family]
        hits = sum(right["gist"][i] for i in of)
        found[f"answers.gist.{family}"] = proportion(hits, len(of))
    gain = [
        100.0 * (gist - without)
        for gist, without in zip(right["gist"], right["no_evidence"], strict=True)
    ]
    found["gist_only_answer_gain"] = mean(gain)
    return found


@torch.inference_mode()
def _ingest_ratio(
    base: BaseModel, gistnet: GistNet, config: SubstitutionSuiteConfig, rounds: int = 5
) -> Estimate:
    """Tokens per second of making gists over those of the base reading the same tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(base.vocab_size, (config.ingest_tokens,), generator=generator)
    window = min(1024, base.max_positions)
    features = GistFeatures(base, gistnet.config)

    def gists() -> None:
        made = gistnet.encode_level(features.of(ids), 1).vectors
        size = gistnet.config.block_size
        gistnet.encode_level(made[: len(made) // size * size], 2)

    def prefill() -> None:
        for chunk in ids.split(window):
            base.prefill(raw_context(base, chunk), keep=1)

    seconds: dict[str, list[float]] = {"gists": [], "prefill": []}
    for turn in range(rounds + 1):
        for name, run in (("gists", gists), ("prefill", prefill)):
            started = time.perf_counter()
            run()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return ratio(seconds["prefill"], seconds["gists"])
