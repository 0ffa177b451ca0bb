"""Gists without focus: the newest tokens raw, everything older as gists, whatever is asked."""

from __future__ import annotations

from megacontext.evaluation.baselines.engine_rival import EngineRival
from megacontext.runtime.engine import Engine


class GistsOnly(EngineRival):
    """An engine whose policy asks for nothing.

    Args:
        engine: with the recency policy.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__("gists_only", engine)

    def answer(self, prompt: str, question: str, *, max_new_tokens: int, stop: str = "\n") -> str:
        """The answer from the window as it stands: a question of its own would empty it first."""
        self.follow(self.engine.memory.n_tokens)
        self.reader.watch()
        return self.engine.ask(prompt, max_new_tokens=max_new_tokens, stop=stop)
