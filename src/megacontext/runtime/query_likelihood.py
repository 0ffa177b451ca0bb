"""How much likelier the base model finds a question behind a block than by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.errors import ConfigError
from megacontext.memory import Memory
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.focus_policies import FocusView
from megacontext.runtime.plain_reading import read_plain


class QueryLikelihood:
    """Query likelihood of blocks, as a language model sees it (UPR, arXiv 2204.07496).

    A block that tells what a question asks makes the base expect its words. That needs no training,
    and tells things apart that keys and BM25 confuse. It costs a forward over ``n`` short texts;
    what was read is kept until the question changes, since further looks mostly ask for the same
    blocks, and read on where the one before ended.

    While an answer is written, what is expected is the answer so far alone: its last note says what
    to look for next, and blocks that told of the question have done their part.

    Args:
        margin: tokens on either side of a block that are read with it; statements cross borders.
        most_tokens: of the text that asks, the newest ones count.
        most_reads: texts that one look reads at most, that by itself counted with the blocks, at
            least 2; ``None``: all that it asks for.

    Raises:
        ConfigError: ``most_reads`` is less than 2.
    """

    def __init__(
        self, *, margin: int = 8, most_tokens: int = 96, most_reads: int | None = None
    ) -> None:
        if most_reads is not None and most_reads < 2:
            raise ConfigError(
                f"a look reads {most_reads} texts at most; 2 or more, the question by itself and a "
                "block behind it"
            )
        self.margin = margin
        self.most_tokens = most_tokens
        self.most_reads = most_reads
        self._memory: Memory | None = None
        self._text = torch.empty(0, dtype=torch.int64)
        self._alone: float | None = None
        self._known: dict[int, float] = {}
        self._told = torch.empty(0, dtype=torch.int64)

    def features(self, view: FocusView) -> Tensor:
        """The query's final hidden states ``[q, d_model]``, read along with the text by itself.

        One forward instead of two, where :meth:`gains` is asked for next.
        """
        text = self._attend(view)
        if self._alone is not None or len(text) < 2:
            return view.base.features(view.query)
        same = torch.equal(text, view.query)
        readings = read_plain(view.base, [view.query] if same else [view.query, text])
        self._alone = -float(readings[-1].nll.sum())
        return readings[0].hidden

    def gains(self, view: FocusView, blocks: Tensor) -> Tensor:
        """Log-likelihood of prompt and answer so far behind each block, less that without it.

        Args:
            view: what was written of the answer is expected, or else the pending text, or else the
                query.
            blocks: ``[m]`` int64, complete blocks of the history, the most promising ones first.

        Returns:
            ``[m]`` float32, in nats; NaN where a block is left to a later look, zeros where the
            text is a single token.
        """
        text = self._attend(view)
        if len(text) < 2:
            return torch.zeros(len(blocks))
        unread = [block for block in blocks.tolist() if block not in self._known]
        if self.most_reads is not None:
            # The text by itself is read in the first look, when no block is known yet.
            unread = unread[: self.most_reads - (not self._known)]
        if unread:
            if self._alone is None:
                self._alone = -float(read_plain(view.base, [text])[0].nll.sum())
            behind = -self._nll_behind(view, unread)
            self._known |= dict(zip(unread, (behind - self._alone).tolist(), strict=True))
        return torch.tensor([self._known.get(block, torch.nan) for block in blocks.tolist()])

    def told(self, view: FocusView, blocks: Tensor) -> Tensor:
        """Which blocks were raw already when the text was new, ``[m]`` bool.

        They are no news: others need not be as likely as they are.
        """
        self._attend(view)
        return torch.isin(blocks, self._told)

    def _attend(self, view: FocusView) -> Tensor:
        """The text that is expected; forgets what was read with another one."""
        pending = view.pending
        if view.written:
            pending = pending[len(pending) - view.written :]
        text = (pending if len(pending) else view.query)[-self.most_tokens :]
        if self._memory is not view.memory or not torch.equal(text, self._text):
            self._memory, self._text = view.memory, text.clone()
            self._alone, self._known = None, {}
            context = view.context
            self._told = context.starts[context.levels == 0] // context.block_size
        return text

    def _nll_behind(self, view: FocusView, blocks: list[int]) -> Tensor:
        """``[m]`` nats of the text but for its first token, behind blocks with their margins."""
        base, size = view.base, view.context.block_size
        n = min(size + 2 * self.margin, view.context.cursor)
        # At an end of the history the other margin is wider, so that all are equally long.
        starts = [
            min(max(0, block * size - self.margin), view.context.cursor - n) for block in blocks
        ]
        texts = torch.stack([view.memory.tokens(start, start + n).long() for start in starts])
        texts = torch.cat((texts, self._text[:1].expand(len(blocks), 1)), dim=1)
        positions = torch.arange(n + 1, device=base.device)
        contexts = [ContextInput(embeddings, positions) for embeddings in base.embed(texts)]
        return base.nll_batch(contexts, self._text[1:].expand(len(blocks), -1)).sum(dim=1)
