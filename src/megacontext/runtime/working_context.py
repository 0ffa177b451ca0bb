"""The working context: raw blocks and gists that tile the history, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from megacontext.errors import ConfigError, InputError, InvariantError

PositionPolicy = Literal["gists_first", "packed", "timeline"]

_KEY_LEVELS = 64  # no int64 token index has a span of level 64, since K >= 2


def node_keys(levels: Tensor, starts: Tensor) -> Tensor:
    """One int64 per span ``(level, start)``, distinct for distinct spans, for set operations."""
    return starts * _KEY_LEVELS + levels


@dataclass(frozen=True, eq=False)
class SiblingGroups:
    """The groups of entries that may collapse now, oldest first; no entry is in two groups.

    Attributes:
        first: ``[g]`` int64, index of each group's first entry.
        size: ``[g]`` int64, entries in the group: 1 (a raw block) or ``K`` (gists).
        levels: ``[g]`` int64, level of the gist the group becomes.
        starts: ``[g]`` int64, token at which that gist starts.
        ends: ``[g]`` int64, token after its last one.
        freed: ``[g]`` int64, token-equivalents that collapsing gives back, always positive.
    """

    first: Tensor
    size: Tensor
    levels: Tensor
    starts: Tensor
    ends: Tensor
    freed: Tensor

    @cached_property
    def keys(self) -> Tensor:
        """``[g]`` int64: :func:`node_keys` of the gists the groups become."""
        return node_keys(self.levels, self.starts)

    def sums(self, values: Tensor) -> Tensor:
        """Sums a per-entry tensor ``[n]`` over each group, ``[g]``, in the dtype of ``values``."""
        members = torch.repeat_interleave(self.size)
        offsets = torch.arange(members.numel()) - (self.size.cumsum(0) - self.size)[members]
        sums = torch.zeros(self.first.numel(), dtype=values.dtype)
        return sums.index_add_(0, members, values[self.first[members] + offsets])

    def survivors(self, chosen: Tensor, n_entries: int) -> Tensor:
        """``[n]`` bool: entries left when the ``chosen`` groups collapse into their first entry."""
        edge = torch.zeros(n_entries + 1, dtype=torch.int64)
        edge[self.first[chosen] + 1] += 1
        edge[self.first[chosen] + self.size[chosen]] -= 1
        return edge.cumsum(0)[:n_entries] == 0


@dataclass(frozen=True, eq=False)
class WorkingContext:
    """What the base model reads: entries that tile ``[0, cursor)``, oldest first. Immutable.

    An entry of level 0 is one block of ``K`` raw tokens (the newest may still be open); an entry of
    level ``l >= 1`` is one gist of ``K**l`` tokens. Every operation returns a new context. The
    tensors belong to the context: read them, do not write to them.

    Attributes:
        levels: ``[n]`` int64.
        starts: ``[n]`` int64, token index at which each entry starts.
        cursor: tokens of history; the entries end here.
        block_size: ``K``.
        gist_cost: ``S``, token-equivalents (and rows read by the model) per gist, below ``K``.
        budget: ``W``, the most token-equivalents the entries may cost.
        tail_tokens: so many of the newest tokens are always raw.

    Raises:
        ConfigError: ``K``, ``S``, ``W``, the tail or the cursor is outside its range.
    """

    levels: Tensor
    starts: Tensor
    cursor: int
    block_size: int
    gist_cost: int
    budget: int
    tail_tokens: int

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError(f"block_size is {self.block_size}; it must be at least 2")
        if not 1 <= self.gist_cost < self.block_size:
            raise ConfigError(
                f"gist_cost is {self.gist_cost}; it must be at least 1 and below the block size "
                f"{self.block_size}, or collapsing a block would free nothing"
            )
        for name, least in (("budget", 1), ("tail_tokens", 0), ("cursor", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @classmethod
    def initial(
        cls, cursor: int, *, block_size: int, gist_cost: int, budget: int, tail_tokens: int
    ) -> Self:
        """The coarsest legal tiling: the largest complete gists from the left, then the raw tail.

        Raises:
            ConfigError: a value is outside its range, or even this tiling exceeds the budget.
        """
        nothing = torch.empty(0, dtype=torch.int64)
        empty = cls(nothing, nothing, cursor, block_size, gist_cost, budget, tail_tokens)
        levels: list[Tensor] = []
        starts: list[Tensor] = []
        position = 0
        for level in range(empty.top_level, 0, -1):
            width = block_size**level
            stop = empty.raw_start // width * width
            starts.append(torch.arange(position, stop, width))
            levels.append(torch.full_like(starts[-1], level))
            position = stop
        starts.append(torch.arange(position, cursor, block_size))
        levels.append(torch.zeros_like(starts[-1]))
        context = replace(empty, levels=torch.cat(levels), starts=torch.cat(starts))
        if context.cost > budget:
            raise ConfigError(
                f"budget {budget} is too small: the coarsest window over {cursor} tokens with a "
                f"raw tail of {tail_tokens} costs {context.cost}; raise budget or lower tail_tokens"
            )
        return context.check()

    def __len__(self) -> int:
        return self.levels.numel()

    @property
    def top_level(self) -> int:
        """The highest level at which a span can be complete."""
        level, width = 0, self.block_size
        while width <= self.cursor:
            level, width = level + 1, width * self.block_size
        return level

    @property
    def tail_start(self) -> int:
        """First token of the tail."""
        return max(0, self.cursor - self.tail_tokens)

    @property
    def raw_start(self) -> int:
        """Start of the block that holds the tail's first token: from here on all must be raw."""
        return self.tail_start // self.block_size * self.block_size

    @cached_property
    def ends(self) -> Tensor:
        """``[n]`` int64: token after each entry's last one."""
        widths = torch.tensor([self.block_size ** max(1, i) for i in range(self.top_level + 1)])
        ends = self.starts + widths[self.levels]
        return torch.where(self.levels == 0, ends.clamp(max=self.cursor), ends)

    @property
    def widths(self) -> Tensor:
        """``[n]`` int64: tokens each entry covers."""
        return self.ends - self.starts

    @cached_property
    def costs(self) -> Tensor:
        """``[n]`` int64 token-equivalents: a block its tokens, a gist ``S``."""
        return self.widths.masked_fill(self.levels > 0, self.gist_cost)

    @cached_property
    def cost(self) -> int:
        """Token-equivalents of all entries."""
        return int(self.costs.sum())

    @property
    def free(self) -> int:
        """Token-equivalents left of the budget; negative after an :meth:`extend` beyond it."""
        return self.budget - self.cost

    @property
    def coarsest_cost(self) -> int:
        """Token-equivalents of the coarsest legal tiling: no sequence of collapses gets below."""
        gists, blocks = 0, self.raw_start // self.block_size
        while blocks:
            blocks, digit = divmod(blocks, self.block_size)
            gists += digit
        return gists * self.gist_cost + self.cursor - self.raw_start

    @cached_property
    def keys(self) -> Tensor:
        """``[n]`` int64: :func:`node_keys` of the entries."""
        return node_keys(self.levels, self.starts)

    def spans(self) -> Tensor:
        """``[n, 3]`` int64: level, start and end of every entry."""
        return torch.stack((self.levels, self.starts, self.ends), dim=1)

    def index_of(self, token: int) -> int:
        """Index of the entry that covers ``token``.

        Raises:
            InputError: the token lies outside ``[0, cursor)``.
        """
        return int(self.indices_of(torch.tensor([token])))

    def indices_of(self, tokens: Tensor) -> Tensor:
        """Indices ``[m]`` int64 of the entries that cover ``tokens`` ``[m]`` int64.

        Raises:
            InputError: a token lies outside ``[0, cursor)``.
        """
        outside = (tokens < 0) | (tokens >= self.cursor)
        if bool(outside.any()):
            token = int(tokens[outside][0])
            raise InputError(f"token {token} is not in the history [0, {self.cursor})")
        return torch.searchsorted(self.starts, tokens, right=True) - 1

    @property
    def legal_expand(self) -> Tensor:
        """``[n]`` bool: the entry is a gist."""
        return self.levels > 0

    @cached_property
    def legal_collapse(self) -> Tensor:
        """``[n]`` bool: the entry is in a group that may collapse (:attr:`sibling_groups`)."""
        groups = self.sibling_groups
        edge = torch.zeros(len(self) + 1, dtype=torch.int64)
        edge.index_add_(0, groups.first, torch.ones_like(groups.first))
        edge.index_add_(0, groups.first + groups.size, -torch.ones_like(groups.first))
        return edge.cumsum(0)[:-1] > 0

    @cached_property
    def sibling_groups(self) -> SiblingGroups:
        """Complete groups outside the tail: single full blocks, and ``K`` gists of one parent."""
        k = self.block_size
        n = len(self)
        raw = self.levels == 0
        size = torch.where(raw, 1, k)
        spans = torch.where(raw, self.widths, self.widths * k)
        ends = self.starts + spans
        last = torch.arange(n) + size - 1
        inside = last.clamp(max=max(0, n - 1))
        # K entries that exactly fill a parent are its K children, unless some are raw: a block is
        # as wide as the level-1 gist it would become.
        raw_before = torch.cat((torch.zeros(1, dtype=torch.int64), raw.cumsum(0)))
        pure = raw | (raw_before[inside + 1] == raw_before[:-1])
        complete = pure & (last < n) & (self.ends[inside] == ends)
        aligned = self.starts % spans.clamp(min=1) == 0
        whole = ~raw | (spans == k)
        first = (complete & aligned & whole & (ends <= self.tail_start)).nonzero().flatten()
        levels = self.levels[first] + 1
        freed = torch.where(levels == 1, k - self.gist_cost, (k - 1) * self.gist_cost)
        return SiblingGroups(first, size[first], levels, self.starts[first], ends[first], freed)

    def expand(self, index: int) -> WorkingContext:
        """Replaces one gist by all its children; a level-1 gist by its raw block.

        Raises:
            InvariantError: the entry is raw already, or there is no such entry.
        """
        self._require_entry(index)
        level, start = int(self.levels[index]), int(self.starts[index])
        if level == 0:
            raise InvariantError(f"entry {index} at token {start} is raw; it cannot be expanded")
        return self.open_to(start, level - 1)

    def collapse(self, index: int) -> WorkingContext:
        """Replaces the whole sibling group of an entry by their parent gist.

        Raises:
            InvariantError: the group is not complete, or it reaches into the tail.
        """
        self._require_entry(index)
        if not bool(self.legal_collapse[index]):
            raise InvariantError(
                f"entry {index} (level {int(self.levels[index])}, token {int(self.starts[index])}) "
                f"cannot collapse: its siblings are not all here at its level, their parent is not "
                f"complete, or it reaches into the tail, which starts at {self.tail_start}"
            )
        first = self.sibling_groups.first
        return self.collapse_groups(
            torch.searchsorted(first, torch.tensor([index]), right=True) - 1
        )

    def collapse_groups(self, chosen: Tensor) -> WorkingContext:
        """Collapses several groups at once.

        Args:
            chosen: ``[c]`` int64, distinct indices into :attr:`sibling_groups`.
        """
        groups = self.sibling_groups
        left = groups.survivors(chosen, len(self))
        levels = self.levels.clone()
        levels[groups.first[chosen]] += 1
        return replace(self, levels=levels[left], starts=self.starts[left])

    def open_to(self, token: int, level: int) -> WorkingContext:
        """Expands the chain of gists over ``token`` until the entry there has at most ``level``.

        The siblings met on the way stay gists, so each gist crossed is replaced by all its children
        and the tiling stays gapless. The result may cost more than the budget: check it.

        Raises:
            InputError: the token lies outside ``[0, cursor)``, or the level is negative.
        """
        if level < 0:
            raise InputError(f"level is {level}; it must be at least 0")
        index = self.index_of(token)
        here, start = int(self.levels[index]), int(self.starts[index])
        if here <= level:
            return self
        levels, starts = [self.levels[:index]], [self.starts[:index]]
        right_levels, right_starts = [self.levels[index + 1 :]], [self.starts[index + 1 :]]
        while here > max(level, 1):
            here -= 1
            width = self.block_size**here
            children = start + torch.arange(self.block_size) * width
            child = (token - start) // width
            start += child * width
            for side_levels, side_starts, side in (
                (levels, starts, children[:child]),
                (right_levels, right_starts, children[child + 1 :]),
            ):
                side_levels.append(torch.full_like(side, here))
                side_starts.append(side)
        levels.append(torch.tensor([level]))
        starts.append(torch.tensor([start]))
        return replace(
            self,
            levels=torch.cat(levels + right_levels[::-1]),
            starts=torch.cat(starts + right_starts[::-1]),
        )

    def reveal(self, block: int) -> WorkingContext:
        """Brings L0 block ``block`` (tokens from ``block * K``) raw: the whole chain of expands.

        Raises:
            InputError: the block lies outside the history.
        """
        return self.open_to(block * self.block_size, 0)

    def chain_cost(self, block: int) -> int:
        """Token-equivalents that :meth:`reveal` of ``block`` would add; 0 if it is raw.

        Raises:
            InputError: the block lies outside the history.
        """
        return int(self.chain_costs(torch.tensor([block])))

    def chain_costs(self, blocks: Tensor) -> Tensor:
        """:meth:`chain_cost` of many blocks, ``[m]`` int64 to ``[m]`` int64."""
        return self.open_costs(blocks * self.block_size, torch.zeros_like(blocks))

    def open_costs(self, tokens: Tensor, levels: Tensor) -> Tensor:
        """Token-equivalents that :meth:`open_to` of each token and level would add, ``[m]`` int64.

        Raises:
            InputError: a token lies outside ``[0, cursor)``.
        """
        here = self.levels[self.indices_of(tokens)]
        gist_steps = (here - levels.clamp(min=1)).clamp(min=0)
        block_step = (here > 0) & (levels == 0)
        return gist_steps * self.gist_cost * (self.block_size - 1) + block_step * (
            self.block_size - self.gist_cost
        )

    def extend(self, n_tokens: int) -> WorkingContext:
        """Moves the cursor right; the new tokens join raw, the open block fills first.

        The result may cost more than the budget: ``FocusAllocator.make_room`` or ``plan`` must
        follow before the model reads it. All other invariants hold (``check(budget=False)``).

        Raises:
            InputError: ``n_tokens`` is negative.
        """
        if n_tokens < 0:
            raise InputError(f"n_tokens is {n_tokens}; history only grows")
        k = self.block_size
        cursor = self.cursor + n_tokens
        starts = torch.arange(-(-self.cursor // k), -(-cursor // k)) * k
        return replace(
            self,
            levels=torch.cat((self.levels, torch.zeros_like(starts))),
            starts=torch.cat((self.starts, starts)),
            cursor=cursor,
        )

    def positions(
        self, policy: PositionPolicy, max_positions: int, *, rows_per_gist: int | None = None
    ) -> Tensor:
        """Position of each entry's first row, ``[n]`` int64, distinct.

        ``packed`` numbers the rows 0, 1, 2, ... in the order of time; ``gists_first`` numbers those
        of all gists before those of all raw blocks, each in the order of time, so that statements
        stand as close together as in a text; ``timeline`` keeps the true distance to the cursor for
        the newest entries, and packs the oldest from 0 where that would leave the range.

        Args:
            policy: how positions follow from the entries.
            max_positions: positions to use, ``[0, max_positions)``: the model's trained range less
                the tokens still to be decoded after the cursor.
            rows_per_gist: positions a gist takes, at most ``S``; ``S`` where not given.

        Raises:
            ConfigError: the rows do not fit into ``max_positions``.
            InputError: ``rows_per_gist`` is outside ``[1, S]``.
        """
        rows_per_gist = self.gist_cost if rows_per_gist is None else rows_per_gist
        if not 1 <= rows_per_gist <= self.gist_cost:
            raise InputError(f"rows_per_gist is {rows_per_gist}; allowed: 1 to {self.gist_cost}")
        rows = self.widths.masked_fill(self.levels > 0, rows_per_gist)
        after = rows.cumsum(0)
        total = int(after[-1]) if len(self) else 0
        if total > max_positions:
            raise ConfigError(
                f"the window takes {total} positions, the model allows {max_positions} here; "
                f"lower budget"
            )
        packed = after - rows
        if policy == "packed":
            return packed
        if policy == "gists_first":
            of_gists = rows.masked_fill(self.levels == 0, 0)
            gists_before = of_gists.cumsum(0) - of_gists
            return torch.where(
                self.levels > 0, gists_before, packed - gists_before + int(of_gists.sum())
            )
        # An entry never takes more rows than it covers tokens, so the larger of two sequences that
        # both grow by at least the rows grows by at least the rows, too.
        return torch.maximum(packed, self.starts - max(0, self.cursor - max_positions))

    def check(self, *, budget: bool = True) -> Self:
        """Returns this context if every invariant holds.

        Args:
            budget: whether the cost must be within the budget, too.

        Raises:
            InvariantError: one does not; the message names the entry and the numbers.
        """
        self._check_form()
        self._check_tiling()
        if budget and self.cost > self.budget:
            raise InvariantError(
                f"the window's {len(self)} entries cost {self.cost} token-equivalents, over the "
                f"budget of {self.budget}; make room before the model reads it"
            )
        return self

    def _check_form(self) -> None:
        shapes = (tuple(self.levels.shape), tuple(self.starts.shape))
        dtypes = (self.levels.dtype, self.starts.dtype)
        if shapes[0] != shapes[1] or len(shapes[0]) != 1 or dtypes != (torch.int64, torch.int64):
            raise InvariantError(
                f"levels and starts must be int64 tensors of one shape [n]; they have shapes "
                f"{shapes[0]}, {shapes[1]} and dtypes {dtypes[0]}, {dtypes[1]}"
            )
        if (len(self) == 0) != (self.cursor == 0):
            raise InvariantError(f"{len(self)} entries cannot tile [0, {self.cursor})")
        self._refuse((self.levels < 0) | (self.levels > self.top_level), "has no complete level")

    def _check_tiling(self) -> None:
        units = torch.where(self.levels == 0, self.block_size, self.widths)
        self._refuse((self.levels > 0) & (self.ends > self.cursor), "is a gist past the cursor")
        self._refuse(self.starts % units.clamp(min=1) != 0, "is not aligned to its level")
        before = torch.cat((torch.zeros(1, dtype=torch.int64), self.ends))
        self._refuse(self.starts != before[:-1], "does not start where the one before it ends")
        self._refuse(self.widths <= 0, "covers no token")
        if int(before[-1]) != self.cursor:
            raise InvariantError(
                f"entry {len(self) - 1} ends at {int(before[-1])}, not at the cursor {self.cursor}"
            )
        in_tail = (self.levels > 0) & (self.ends > self.tail_start)
        self._refuse(in_tail, f"is a gist in the tail, which starts at {self.tail_start}")

    def _refuse(self, wrong: Tensor, problem: str) -> None:
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise InvariantError(
                f"entry {index} (level {int(self.levels[index])}, token {int(self.starts[index])}) "
                f"{problem}; cursor {self.cursor}, block size {self.block_size}"
            )

    def _require_entry(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise InvariantError(f"there is no entry {index}; the window has {len(self)} entries")
