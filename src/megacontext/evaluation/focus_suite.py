"""Suite ``focus``: whether the focus finds what a question needs, however long the history is."""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megacontext.errors import ConfigError, InvariantError
from megacontext.evaluation.focus_asking import Answered, Asker, RefocusTimes, TellingOracle
from megacontext.evaluation.focus_config import FocusPolicyName, FocusSuiteConfig
from megacontext.evaluation.focus_histories import FocusQuestion, Histories
from megacontext.evaluation.focus_questions import (
    BABI_KINDS,
    FocusKind,
    Group,
    group_batches,
)
from megacontext.evaluation.focus_results import (
    Cell,
    answer_results,
    cost_results,
    length_name,
    stream_results,
)
from megacontext.evaluation.focus_streams import Models, Streamed, refocus_cost, stream_prose
from megacontext.evaluation.focus_work import FinishedWork
from megacontext.evaluation.metrics import Estimate
from megacontext.evaluation.noise import NoiseTokens
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import load_gistnet, load_lens
from megacontext.runtime.focus_policies import (
    FocusPolicy,
)
from megacontext.runtime.plain_decode import decode_plain, raw_context
from megacontext.runtime.policy_names import make_policy
from megacontext.runtime.sampling import TokenSampler
from megacontext.telemetry import Telemetry

Say = Callable[[str], None]
_SAMPLED = 4096


def run_focus_suite(
    config: FocusSuiteConfig, progress: Say | None = None, note: Say | None = None
) -> dict[str, Estimate]:
    """Accuracy, evidence, restlessness and cost of every policy, by kind and length.

    Args:
        config: the suite.
        progress: called with what is being measured.
        note: called with everything that is left out, and why.

    Raises:
        ConfigError: no policy is left, or a group of questions does not fit a history.
        DataError: the bAbI folder or the corpus is there but cannot be read.
        CheckpointError: a checkpoint does not belong to the model.
        InputError: the ``work`` folder cannot be used.
    """
    suite = _FocusSuite(config, progress or _silent, note or _silent)
    with tempfile.TemporaryDirectory(prefix="megacontext-focus-") as folder:
        return suite.run(Path(folder))


def _silent(_: str) -> None:
    """Nobody wants to know."""


class _FocusSuite:
    """One run: what is asked, of which models, and what is known already."""

    def __init__(self, config: FocusSuiteConfig, say: Say, note: Say) -> None:
        self.config = config
        self.say = say
        base = BaseModel.from_pretrained(config.model)
        gistnet = load_gistnet(config.gistnet, base, config.model)
        lens = load_lens(config.lens, base, gistnet, config.model)
        self.models = Models(base, gistnet, lens, config.engine)
        self.policies: list[FocusPolicyName] = [
            name for name in config.policies if name != "lens" or lens is not None
        ]
        if len(self.policies) < len(config.policies):
            note("policy lens is left out: there is no LensNet for these gists; name one in `lens`")
        if not self.policies:
            raise ConfigError("policies is ['lens'], but there is no LensNet; name one in `lens`")
        babi = config.babi if config.babi is not None and config.babi.is_dir() else None
        if babi is None and any(kind in config.kinds for kind in BABI_KINDS):
            note(f"kinds {', '.join(BABI_KINDS)} are left out: there is no folder {config.babi}")
        self.noise = NoiseTokens.read(base, config.corpus)
        batches = list(
            group_batches(
                groups=config.groups,
                together=config.together,
                asked=config.asked,
                seed=config.seed,
                babi=babi,
            )
        )
        self.histories = Histories(self.noise, batches, config.seed)
        self.work = FinishedWork(config.work)
        self._run = _digest(config, self.models, self.noise, batches)
        # Only what depends on the lens is measured again when it changes.
        self._lens = "" if lens is None else lens.version

    def run(self, folder: Path) -> dict[str, Estimate]:
        """Measures what is not known yet; memories are made in ``folder``."""
        cells: dict[Cell, list[Answered]] = {}
        in_window: dict[FocusKind, list[Answered]] = {}
        lengths = sorted(self.config.lengths)
        for length in lengths:
            for number, history in enumerate(self.histories.of_length(length)):
                asked = [one for one in history.questions if one.kind in self.config.kinds]
                for question in asked if length == lengths[0] else ():
                    if question.needed:
                        alone = in_window.setdefault(question.kind, [])
                        alone.append(self._in_window(question))
                name = f"{length_name(length)}, history {number + 1}"
                path = folder / f"{length}-{number}.mctx"
                timed = length == lengths[-1] and number == 0
                self._finish(name, path, length, history.tokens, asked, timed=timed)
                for policy in self.policies:
                    for question in asked:
                        cell = Cell(question.kind, length, policy)
                        known = self.work[self._key_of(cell, question)]
                        cells.setdefault(cell, []).append(Answered(**known))
        streams = {policy: self._streamed(policy, folder) for policy in self._streaming}
        costs = {policy: self.work[self._cost_key(policy)] for policy in self._timed}
        return {
            **answer_results(cells, in_window),
            **stream_results(streams),
            **cost_results(costs),
        }

    @property
    def _streaming(self) -> list[FocusPolicyName]:
        return self.policies if self.config.prose_streams else []

    @property
    def _timed(self) -> list[FocusPolicyName]:
        """Policies whose refocus is timed; what the oracle costs is no question."""
        return [name for name in self.policies if name != "oracle" and self.config.cost_samples]

    def _finish(
        self,
        name: str,
        path: Path,
        length: int,
        tokens: Tensor,
        asked: Sequence[FocusQuestion],
        *,
        timed: bool,
    ) -> None:
        """Asks what is still open about a history; its memory is made only for that."""
        open_: dict[FocusPolicyName, list[FocusQuestion]] = {
            policy: [
                one
                for one in asked
                if self._key_of(Cell(one.kind, length, policy), one) not in self.work
            ]
            for policy in self.policies
        }
        costs: list[FocusPolicyName] = [
            p for p in self._timed if timed and self._cost_key(p) not in self.work
        ]
        if not costs and not any(open_.values()):
            return
        self.say(f"{name}: ingesting")
        with self.models.memory(tokens, path) as memory:
            times = RefocusTimes()
            engine = self.models.engine(memory, telemetry=Telemetry(times))
            asker = Asker(engine, times, self.config.max_new_tokens)
            for policy, questions in open_.items():
                for count, question in enumerate(questions, start=1):
                    self.say(f"{name}: {policy}, question {count} of {len(questions)}")
                    answered = asker.ask(question, _asked_policy(self.models, policy, question))
                    cell = Cell(question.kind, length, policy)
                    self.work.add(self._key_of(cell, question), answered.as_json())
            for policy in costs:
                self.say(f"{name}: {policy}, cost of a refocus")
                samples = [asked[i % len(asked)] for i in range(self.config.cost_samples + 1)]
                scores = _policy(self.models, policy)
                cost = refocus_cost(self.models.engine(memory), scores, samples)
                self.work.add(self._cost_key(policy), cost)
        shutil.rmtree(path, ignore_errors=True)

    def _in_window(self, question: FocusQuestion) -> Answered:
        """The answer where nothing but the evidence and a little noise is in the window."""
        key = self._key("in_window", question.kind, question.number)
        if key not in self.work:
            self.say(f"evidence alone: {question.kind} {question.number + 1}")
            base = self.models.base
            rng = random.Random(f"focus/{self.config.seed}/{question.kind}/{question.number}")
            needed = [self.noise.encode(statement) for statement in question.needed]
            length = sum(map(len, needed)) + self.config.in_window_noise
            history, _ = self.noise.splice(rng, needed, length)
            prompt = base.encode(question.prompt)
            tokens = decode_plain(
                base,
                base.prefill(raw_context(base, torch.cat((history, prompt))), keep=1),
                prompt,
                TokenSampler(base.generation_config),
                max_new_tokens=self.config.max_new_tokens,
                stop="\n",
            )
            written = "".join(token.text for token in tokens)
            self.work.add(key, Answered.of(written, question.asked.answer).as_json())
        return Answered(**self.work[key])

    def _streamed(self, policy: FocusPolicyName, folder: Path) -> Streamed:
        """All streams of prose under one policy, one after the other."""
        config, whole = self.config, Streamed.nothing()
        for number in range(config.prose_streams):
            shape = (config.prose_history, config.prose_blocks, number)
            key = self._key("prose", policy, *shape)
            if key not in self.work:
                self.say(f"prose: {policy}, stream {number + 1} of {config.prose_streams}")
                path = folder / f"{policy}-{number}.mctx"
                streamed = stream_prose(
                    self.models,
                    None if policy == "oracle" else _policy(self.models, policy),
                    self.noise,
                    path,
                    history=config.prose_history,
                    blocks=config.prose_blocks,
                    seed=f"focus/{config.seed}/prose/{number}",
                )
                self.work.add(key, asdict(streamed))
                shutil.rmtree(path, ignore_errors=True)
            whole.extend(Streamed(**self.work[key]))
        return whole

    def _cost_key(self, policy: FocusPolicyName) -> str:
        return self._key("cost", policy, max(self.config.lengths), self.config.cost_samples)

    def _key_of(self, cell: Cell, question: FocusQuestion) -> str:
        return self._key("ask", cell.policy, cell.kind, question.number, cell.length)

    def _key(self, what: str, *parts: object) -> str:
        """Tells a result from those of other configurations, weights and questions."""
        lens = self._lens if "lens" in parts else ""
        return "/".join(map(str, (self._run, what, *parts, lens)))


def _policy(models: Models, name: FocusPolicyName) -> FocusPolicy:
    """A policy that need not be told anything."""
    if name == "oracle":
        raise InvariantError("an oracle cannot be made without being told more")
    return make_policy(name, models.lens)


def _asked_policy(models: Models, name: FocusPolicyName, question: FocusQuestion) -> FocusPolicy:
    """The policy for one question; an oracle is told what shall be written."""
    if name != "oracle":
        return _policy(models, name)
    n_prompt, size = len(models.base.encode(question.prompt)), models.gistnet.config.block_size
    return TellingOracle(question, models.base, n_prompt, size)


def _digest(
    config: FocusSuiteConfig, models: Models, noise: NoiseTokens, batches: Sequence[Sequence[Group]]
) -> str:
    """Tells runs apart whose answers may differ; 16 hexadecimal digits."""
    habits = (config.engine, config.in_window_noise, config.max_new_tokens, config.seed)
    digest = hashlib.sha256(repr((habits, models.gistnet.version, batches)).encode())
    digest.update(noise.draw(random.Random(0), len(noise)).numpy().tobytes())
    for name, weights in sorted(models.base.model.state_dict().items()):
        # Of every tensor a few thousand numbers: any training changes them.
        sample = weights.flatten()[:: max(1, weights.numel() // _SAMPLED)]
        digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
