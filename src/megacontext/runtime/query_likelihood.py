"""How much likelier the base model finds a question behind a block than by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.focus_policies import FocusView
from megacontext.runtime.plain_decode import raw_context


class QueryLikelihood:
    """Query likelihood of blocks, as a language model sees it (UPR, arXiv 2204.07496).

    A block that tells what a question asks makes the base expect its words. That needs no training,
    and tells things apart that keys and BM25 confuse. It costs a forward over ``n`` short texts;
    what was read is kept until the question changes, since further looks mostly ask for the same
    blocks.

    While an answer is written, what is expected is the answer so far alone: its last note says what
    to look for next, and blocks that told of the question have done their part.

    Args:
        margin: tokens on either side of a block that are read with it; statements cross borders.
        most_tokens: of the text that asks, the newest ones count.
    """

    def __init__(self, *, margin: int = 8, most_tokens: int = 96) -> None:
        self.margin = margin
        self.most_tokens = most_tokens
        self._memory: Memory | None = None
        self._text = torch.empty(0, dtype=torch.int64)
        self._known: dict[int, float] = {}
        self._told = torch.empty(0, dtype=torch.int64)

    def gains(self, view: FocusView, blocks: Tensor) -> Tensor:
        """Log-likelihood of prompt and answer so far behind each block, less that without it.

        Args:
            view: what was written of the answer is expected, or else the pending text, or else the
                query.
            blocks: ``[m]`` int64, complete blocks of the history.

        Returns:
            ``[m]`` float32, in nats; zeros where the text is a single token.
        """
        text = self._attend(view)
        if len(text) < 2:
            return torch.zeros(len(blocks))
        unread = [block for block in blocks.tolist() if block not in self._known]
        if unread:
            alone = -float(_nll(view.base, text[None, :1], text))
            behind = -_nll(view.base, self._texts(view, unread), text)
            self._known |= dict(zip(unread, (behind - alone).tolist(), strict=True))
        return torch.tensor([self._known[block] for block in blocks.tolist()])

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
            self._memory, self._text, self._known = view.memory, text.clone(), {}
            context = view.context
            self._told = context.starts[context.levels == 0] // context.block_size
        return text

    def _texts(self, view: FocusView, blocks: list[int]) -> Tensor:
        """``[m, n]``: the blocks with their margins and the first token of the text behind them."""
        size = view.context.block_size
        n = min(size + 2 * self.margin, view.context.cursor)
        # At an end of the history the other margin is wider, so that all are equally long.
        starts = [
            min(max(0, block * size - self.margin), view.context.cursor - n) for block in blocks
        ]
        texts = [view.memory.tokens(start, start + n).long() for start in starts]
        return torch.cat((torch.stack(texts), self._text[:1].expand(len(blocks), 1)), dim=1)


def _nll(base: BaseModel, contexts: Tensor, text: Tensor) -> Tensor:
    """``[b]`` nats of a text but for its first token, with which ``contexts [b, n]`` end."""
    targets = text[1:].expand(len(contexts), -1)
    return base.nll_batch([raw_context(base, ids) for ids in contexts], targets).sum(dim=1)
