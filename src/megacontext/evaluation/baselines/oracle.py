"""Oracle focus: MegaContext with a focus that knows the answer; an upper bound."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megacontext.errors import InputError
from megacontext.evaluation.baselines.engine_rival import EngineRival
from megacontext.evaluation.baselines.rival import Span
from megacontext.runtime.engine import Engine
from megacontext.runtime.oracle_policy import OraclePolicy

# Besides the evidence, what BM25 finds is tried too: there may be more than one place.
_PROPOSALS = 2


class OracleFocus(EngineRival):
    """Measures with the base itself which blocks make the right answer likely.

    Args:
        engine: its policy is replaced.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__("oracle", engine)
        self._told: tuple[str, list[int]] | None = None

    def inform(self, answer: str, evidence: Sequence[Span]) -> None:
        """Tells the right answer to the next question, and where its evidence lies."""
        size = self.engine.memory.identity.block_size
        blocks = {
            block for start, end in evidence for block in range(start // size, -(-end // size))
        }
        self._told = (answer, sorted(blocks))

    def answer(self, prompt: str, question: str, *, max_new_tokens: int, stop: str = "\n") -> str:
        """The answer with the focus that makes the right one likeliest.

        Raises:
            InputError: nobody told what that is.
        """
        if self._told is None:
            raise InputError("oracle: tell it the answer with inform() before every question")
        (answer, hints), self._told = self._told, None
        future = self.engine.base.encode(f" {answer}{stop}")
        self.engine.focus.policy = OraclePolicy(future, hints, _PROPOSALS)
        return super().answer(prompt, question, max_new_tokens=max_new_tokens, stop=stop)

    def nll(self, cursor: int, targets: Tensor) -> Tensor:
        """NLL of the tokens that follow, with the focus that makes just these likeliest."""
        self.engine.focus.policy = OraclePolicy(targets, (), _PROPOSALS)
        return super().nll(cursor, targets)
