"""Slow, plain Python counterparts of the working context and the allocator, to test against."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from megacontext.runtime.focus_allocator import AllocatorConfig
from megacontext.runtime.working_context import WorkingContext

Span = tuple[int, int, int]  # level, start, end


def spans_of(context: WorkingContext) -> list[Span]:
    return [tuple(row) for row in context.spans().tolist()]


def coarsest(cursor: int, k: int, tail: int) -> list[Span]:
    """The largest complete aligned gist outside the tail at every step, by trying all levels."""
    spans: list[Span] = []
    position = 0
    while position < cursor:
        fitting = [
            level
            for level in range(1, 60)
            if position % k**level == 0
            and position + k**level <= cursor
            and position + k**level <= max(0, cursor - tail)
        ]
        level = max(fitting, default=0)
        end = position + k**level if level else min(position + k, cursor)
        spans.append((level, position, end))
        position = end
    return spans


def parent_of(span: Span, k: int) -> Span:
    level, start, _ = span
    width = k ** (level + 1)
    return (level + 1, start // width * width, start // width * width + width)


def children_of(span: Span, k: int) -> list[Span]:
    level, start, end = span
    if level == 1:
        return [(0, start, end)]
    width = k ** (level - 1)
    return [(level - 1, s, s + width) for s in range(start, end, width)]


def groups_of(spans: list[Span], k: int, cursor: int, tail: int) -> list[tuple[Span, list[Span]]]:
    """All (parent, children) that may collapse, oldest first."""
    here = set(spans)
    found = []
    for span in spans:
        parent = parent_of(span, k)
        children = children_of(parent, k)
        complete = parent[2] <= cursor and all(child in here for child in children)
        if children[0] == span and complete and parent[2] <= max(0, cursor - tail):
            found.append((parent, children))
    return found


def replaced(spans: list[Span], old: list[Span], new: list[Span]) -> list[Span]:
    at = spans.index(old[0])
    assert spans[at : at + len(old)] == old
    return spans[:at] + new + spans[at + len(old) :]


def cost_of(spans: list[Span], s: int) -> int:
    return sum(s if level else end - start for level, start, end in spans)


class ReferenceAllocator:
    """One plan, one group at a time, on lists and dicts."""

    def __init__(self, context, scores, config: AllocatorConfig, cooling: set[tuple[int, int]]):
        self.k, self.s = context.block_size, context.gist_cost
        self.cursor, self.tail = context.cursor, context.tail_tokens
        self.budget = context.budget
        self.config, self.cooling = config, cooling
        self.spans = spans_of(context)
        self.edits: list[tuple[str, Span, int, str]] = []
        self.touched: set[tuple[int, int]] = set()
        self.counted = self.moved = 0
        proposals: dict[int, float] = {}
        for block, utility in zip(
            scores.proposal_blocks.tolist(), scores.proposal_utility.tolist(), strict=True
        ):
            proposals[block] = max(utility, proposals.get(block, -math.inf))
        self.keep: dict[Span, float] = {}
        self.candidates: dict[tuple[int, int], tuple[float, bool]] = {
            (block * self.k, 0): (utility, True)
            for block, utility in proposals.items()
            if utility >= config.expand_threshold
        }
        for span, keep, expand in zip(
            self.spans, scores.entry_utility.tolist(), scores.expand_utility.tolist(), strict=True
        ):
            level, start, end = span
            inside = [u for b, u in proposals.items() if start <= b * self.k < end and u > 0]
            if level and expand > 0:
                inside.append(expand)
            self.keep[span] = max([keep, *inside])
            if level and expand >= config.expand_threshold:
                utility, proposed = self.candidates.get((start, level - 1), (-math.inf, False))
                self.candidates[start, level - 1] = (max(utility, expand), proposed)

    @property
    def cost(self) -> int:
        return cost_of(self.spans, self.s)

    def freed(self, parent: Span) -> int:
        return self.k - self.s if parent[0] == 1 else (self.k - 1) * self.s

    def ranked(self):
        """(loss, parent, children), worst first."""
        rows = []
        for parent, children in groups_of(self.spans, self.k, self.cursor, self.tail):
            loss = sum(self.keep[child] for child in children)
            late = parent[:2] in self.cooling
            rows.append((loss / self.freed(parent), late, parent[1], loss, parent, children))
        return [row[3:] for row in sorted(rows, key=lambda row: row[:3])]

    def collapse(self, loss: float, parent: Span, children: list[Span], reason: str) -> None:
        self.spans = replaced(self.spans, children, [parent])
        self.keep[parent] = max(0.0, loss)
        self.touched.add(parent[:2])
        self.edits.append(("collapse", parent, -self.freed(parent), reason))
        self.counted += reason != "room"

    def enough(self, rows, needed: int):
        taken, freed = [], 0
        for row in rows:
            if freed >= needed:
                break
            taken.append(row)
            freed += self.freed(row[1])
        return taken, freed

    def make_room(self, limit: int, spare: int) -> None:
        """As often as the need demands; then what loses nothing, until there is room to spare."""
        goal = limit
        while self.cost > goal:
            rows = self.ranked()
            idle = [row for row in rows if row[0] <= 0]
            taken = self.enough(idle, self.cost - limit + spare)[0]
            needed = self.enough(rows, self.cost - limit)[0]
            for row in max(taken, needed, key=len):
                self.collapse(*row, "room")
            if not taken and not needed:
                return
            goal = limit - spare

    def path(self, token: int, floor: int) -> list[tuple[int, int]]:
        level = next(level for level, start, end in self.spans if start <= token < end)
        return [(i, token // self.k**i * self.k**i) for i in range(level, floor, -1)]

    def price(self, token: int, floor: int) -> int:
        path = self.path(token, floor)
        if any(node in self.touched or node in self.cooling for node in path):
            return 0
        return sum(self.freed((level, start, 0)) for level, start in path)

    def pay(self, needed: int, gain: float, token: int) -> bool:
        saved = (self.spans, dict(self.keep), set(self.touched), list(self.edits), self.counted)
        frozen = self.touched | self.cooling
        lost = 0.0
        most = self.config.max_edits - 1
        while needed > 0:
            frozen |= self.touched
            rows = [
                row
                for row in self.ranked()
                if row[1][:2] not in frozen and not row[1][1] <= token < row[1][2]
            ]
            taken, freed = self.enough(rows, needed)
            if self.counted + len(taken) > most:
                rows.sort(key=lambda row: -self.freed(row[1]))
                taken, freed = self.enough(rows, needed)
            lost += sum(row[0] for row in taken)
            if not taken or self.counted + len(taken) > most or lost >= gain:
                self.spans, self.keep, self.touched, self.edits, self.counted = saved
                return False
            needed -= freed
            for row in taken:
                self.collapse(*row, "payment")
        return True

    def expand(self, limit: int) -> None:
        config = self.config
        open_ = {
            target: (utility, self.price(*target), proposed)
            for target, (utility, proposed) in self.candidates.items()
            if self.price(*target)
        }

        def priority(target):
            utility, price, _ = open_[target]
            rank = utility / config.temperature - math.log(price)
            return -(rank if config.competition == "softmax" else utility / price)

        for target in sorted(open_, key=lambda t: (round(priority(t), 9), -t[0], t[1])):
            utility, _, proposed = open_[target]
            price = self.price(*target)
            if not price or self.counted >= config.max_edits:
                continue
            if self.moved + price > config.move_budget:
                continue
            if not self.pay(self.cost + price - limit, utility - config.swap_margin, target[0]):
                continue
            path = self.path(*target)
            width = self.k ** path[0][0]
            entry = (path[0][0], path[0][1], path[0][1] + width)
            for level, start in path:
                span = (level, start, start + self.k**level)
                self.spans = replaced(self.spans, [span], children_of(span, self.k))
                self.touched.add((level, start))
            for span in self.spans:
                self.keep.setdefault(span, 0.0)
            self.edits.append(("expand", entry, price, "proposal" if proposed else "utility"))
            self.counted += 1
            self.moved += price

    def relax(self, scored: set[Span]) -> None:
        frozen = self.touched | self.cooling
        for loss, parent, children in self.ranked():
            blocked = parent[:2] in frozen or not all(child in scored for child in children)
            if blocked or loss >= self.config.collapse_threshold:
                continue
            if self.counted >= self.config.max_edits:
                break
            self.moved += self.freed(parent)
            if self.moved > self.config.move_budget:
                break
            self.collapse(loss, parent, children, "threshold")

    def plan(self, limit: int):
        scored = set(self.spans)
        self.make_room(limit, int(self.config.spare_share * self.budget))
        self.expand(limit)
        # An entry that was closed and opened again cannot occur: a plan never undoes its edits.
        self.relax(scored)
        return self.edits, self.spans


@st.composite
def contexts(draw, max_cursor: int = 400) -> WorkingContext:
    """A legal window: the coarsest tiling, opened at a few tokens, within a generous budget."""
    k = draw(st.sampled_from([2, 3, 4]))
    s = draw(st.integers(1, k - 1))
    cursor = draw(st.integers(0, max_cursor))
    tail = draw(st.sampled_from([0, 1, k, 2 * k + 1, 40]))
    context = WorkingContext.initial(
        cursor, block_size=k, gist_cost=s, budget=4096, tail_tokens=tail
    )
    if cursor:
        opened = st.tuples(st.integers(0, cursor - 1), st.integers(0, 3))
        for token, level in draw(st.lists(opened, max_size=12)):
            context = context.open_to(token, level)
    return context
