"""Long histories in which all groups of questions that fit are planted together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megacontext.errors import ConfigError
from megacontext.evaluation.baselines import Span
from megacontext.evaluation.focus_questions import FocusKind, Group, Planted
from megacontext.evaluation.noise import NoiseTokens
from megacontext.tasks.documents import QUESTION_TEMPLATE, Question

# Of a history, how much the statements of one group and of several may take: noise shall stand
# between them.
_MOST_OF_ONE, _MOST_OF_SEVERAL = 0.6, 0.3


@dataclass(frozen=True)
class FocusQuestion:
    """A question about a history.

    Attributes:
        kind: what is tested.
        number: the same question, of those of its kind, at every length.
        asked: the question with the expected answer and notes.
        needed: the statements that the answer needs, in the order in which they are told.
        evidence: spans of them in the history.
    """

    kind: FocusKind
    number: int
    asked: Question
    needed: tuple[str, ...]
    evidence: tuple[Span, ...]

    @property
    def prompt(self) -> str:
        """The question as the model reads it behind the history."""
        return QUESTION_TEMPLATE.format(question=self.asked.text)

    def blocks(self, size: int) -> list[int]:
        """Blocks that hold what the answer needs, ascending."""
        return sorted(
            {
                block
                for start, end in self.evidence
                for block in range(start // size, -(-end // size))
            }
        )


@dataclass(frozen=True, eq=False)
class FocusHistory:
    """A history and everything that is asked about it.

    Attributes:
        tokens: int64 ``[length]``.
        questions: group by group.
    """

    tokens: Tensor
    questions: tuple[FocusQuestion, ...]


class Histories:
    """Plants batches of groups in noise.

    Args:
        noise: what the statements stand in.
        batches: groups that may stand in one history, a batch at a time.
        seed: of noise and places.
    """

    def __init__(self, noise: NoiseTokens, batches: Sequence[Sequence[Group]], seed: int) -> None:
        self.noise = noise
        self.batches = batches
        self.seed = seed
        self._costs = [[_tokens(noise, group) for group in batch] for batch in batches]

    def count(self, length: int) -> int:
        """How many histories of ``length`` tokens the groups need."""
        return len(self._packed(length))

    def of_length(self, length: int) -> Iterator[FocusHistory]:
        """All groups in as few histories of ``length`` tokens as hold them, one at a time.

        Raises:
            ConfigError: one group is too much for a history.
        """
        made: dict[FocusKind, int] = {}
        for number, groups in enumerate(self._packed(length)):
            rng = random.Random(f"focus/{self.seed}/{length}/{number}")
            yield self._history(rng, groups, length, made)

    def _packed(self, length: int) -> list[list[Group]]:
        room, shared = int(_MOST_OF_ONE * length), int(_MOST_OF_SEVERAL * length)
        packed: list[list[Group]] = []
        for batch, costs in zip(self.batches, self._costs, strict=True):
            left = -1  # groups of different batches may share names
            for group, cost in zip(batch, costs, strict=True):
                if cost > room:
                    raise ConfigError(
                        f"a group of questions needs {cost} tokens of statements, a history of "
                        f"{length} has room for {room}; lower `asked`, or raise the length"
                    )
                if cost > left:
                    packed.append([])
                    left = shared
                packed[-1].append(group)
                left -= cost
        return packed

    def _history(
        self, rng: random.Random, groups: Sequence[Group], length: int, made: dict[FocusKind, int]
    ) -> FocusHistory:
        themes = [planted for group in groups for planted in group]
        order = _scattered(rng, themes)
        ids = [self.noise.encode(themes[theme].statements[index]) for theme, index in order]
        tokens, spans = self.noise.splice(rng, ids, length)
        where = dict(zip(order, spans, strict=True))
        questions: list[FocusQuestion] = []
        for theme, planted in enumerate(themes):
            for asked in planted.questions:
                number = made.setdefault(planted.kind, 0)
                made[planted.kind] += 1
                needed = sorted(set(asked.needed))
                questions.append(
                    FocusQuestion(
                        kind=planted.kind,
                        number=number,
                        asked=asked,
                        needed=tuple(planted.statements[index] for index in needed),
                        evidence=tuple(where[theme, index] for index in needed),
                    )
                )
        return FocusHistory(tokens, tuple(questions))


def _tokens(noise: NoiseTokens, group: Group) -> int:
    return sum(len(noise.encode(text)) for planted in group for text in planted.statements)


def _scattered(rng: random.Random, themes: Sequence[Planted]) -> list[tuple[int, int]]:
    """Theme and index of every statement, each theme's in their order, mixed with all others."""
    timeline: list[tuple[float, int, int]] = []
    for theme, planted in enumerate(themes):
        times = sorted(rng.random() for _ in planted.statements)
        timeline += [(time, theme, index) for index, time in enumerate(times)]
    return [(theme, index) for _, theme, index in sorted(timeline)]
