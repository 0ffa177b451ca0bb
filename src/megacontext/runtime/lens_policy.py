"""Focus by LensNet: proposals of several indices, weighed together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.lensnet import (
    CacheFeatures,
    EntryFeatures,
    LensNet,
    SpanFacts,
    TailStates,
    entry_legality,
    span_features,
)
from megacontext.lensnet.features import share_of_best
from megacontext.memory import KeyIndex, KeyIndexConfig, Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.focus_policies import (
    FocusView,
    LexicalPolicy,
    entry_attention,
    proposals_to_scores,
    spread,
)
from megacontext.runtime.focus_scores import FocusScores
from megacontext.runtime.query_likelihood import QueryLikelihood
from megacontext.runtime.working_context import WorkingContext

# Newest rows whose attention is read, as by the attention policy.
_ASKING_ROWS = 16
# Keys compared at a time: as float32 they stay in a processor's cache, which halves the search.
_KEYS_AT_ONCE = 8_192
# So much relevance weighs as much as all of the best BM25 score, where both decide together.
_RELEVANCE_APART = 10.0


@dataclass(frozen=True, eq=False)
class _Proposed:
    """Blocks before the tail ``[m]``, and what each index says of them; NaN: nothing.

    ``unread``: whether some of the best are left to a further look.
    """

    blocks: Tensor
    lexical: Tensor
    learned: Tensor
    attention: Tensor
    likelihood: Tensor
    told: Tensor
    unread: bool


@dataclass(frozen=True, eq=False)
class _Searched:
    """What a query found: further looks of one round of looks ask the same of the same history.

    ``blocks`` are ``[c]`` int64, ascending; what an index does not say of one is NaN.
    """

    base: BaseModel
    memory: Memory
    generation: int
    cursor: int
    n_proposable: int
    query: Tensor
    tail: TailStates
    blocks: Tensor
    lexical: Tensor
    learned: Tensor

    def answers(self, view: FocusView) -> bool:
        """Whether a view would find just this."""
        asks = (view.memory.generation, view.context.cursor, view.n_proposable)
        return (
            view.memory is self.memory
            and view.base is self.base
            and asks == (self.generation, self.cursor, self.n_proposable)
            and torch.equal(view.query, self.query)
        )


@dataclass(frozen=True, eq=False)
class LensInputs:
    """What LensNet reads of one working context, a batch of one.

    Attributes:
        blocks: ``[m]`` int64, the proposed blocks, which the cache items are.
        entries: the working entries.
        cache: the proposed blocks.
        tail: the query.
        unread: whether the base model has yet to read some of the best proposals.
    """

    blocks: Tensor
    entries: EntryFeatures
    cache: CacheFeatures
    tail: TailStates
    unread: bool = False


class LensPolicy:
    """LensNet over the working entries and over what several indices propose.

    They are the lexical index, the lens's own keys and, where the lens reads it, the base model's
    attention to the gists of the window. Where somebody asks, the base model reads the best of them
    with the question, if the lens is told how likely they make it.

    Args:
        lens: the scorer.
        proposals: most blocks that each index, and both together, propose.
        candidates: best blocks of each index that both together choose from: what neither puts
            first may be what both know.
        reads: most texts that the base model reads in one look: in the first one the question and
            the best proposals behind it, in the next one for the same question the proposals that
            follow, so that no look costs much more than another. ``None``: all at once.
        relative_floor: what scores below this share of the best proposal is not asked for:
            scores say what a block is worth alone, not how much it distracts beside others.
        calm_nats: while nobody asks, what scores below this is not asked for, and raw blocks make
            room by age alone. ``None``: then nothing is scored at all. What comes next in a text is
            seldom told far back, and what was opened for it made prose harder to predict.
        neighbour_share: of a proposal's score that the block before it and the one behind it get at
            least.
        key_index: how keys are searched once they are many.

    Raises:
        ConfigError: ``reads`` is less than 2.
    """

    name = "lens"

    def __init__(
        self,
        lens: LensNet,
        *,
        proposals: int = 16,
        candidates: int = 1024,
        reads: int | None = 4,
        relative_floor: float = 0.2,
        calm_nats: float | None = None,
        neighbour_share: tuple[float, float] = (0.3, 0.3),
        key_index: KeyIndexConfig | None = None,
    ) -> None:
        self.lens = lens
        self.proposals = proposals
        self.candidates = candidates
        self.relative_floor = relative_floor
        self.calm_nats = calm_nats
        self.neighbour_share = neighbour_share
        self._key_config = key_index
        self._keys: KeyIndex | None = None
        self._searched: _Searched | None = None
        self._lexical = LexicalPolicy(proposals=candidates, nats_per_point=1.0)
        self._likelihood = QueryLikelihood(most_reads=reads)

    @torch.inference_mode()
    def score(self, view: FocusView) -> FocusScores:
        """The lens's scores; a proposed block that is raw already is kept for its score."""
        context = view.context
        if not len(context) or (not view.asked and self.calm_nats is None):
            return FocusScores.unknown(len(context))
        inputs = self.inputs(view)
        scores = self.lens(inputs.entries, inputs.cache, inputs.tail)
        signed = scores.entry[0].float()
        worth = scores.cache[0].float().clamp(min=0.0)
        n_old = context.raw_start // context.block_size
        blocks, worth = spread(inputs.blocks, worth, self.neighbour_share, n_old)
        least = self.relative_floor * float(worth[0]) if len(worth) else 0.0
        if not view.asked and self.calm_nats is not None:
            least = max(least, self.calm_nats)
            signed = signed.clamp(min=0.0)
        proposed = proposals_to_scores(context, blocks, worth.masked_fill(worth < least, 0.0))
        kept = proposed.entry_utility
        # A gist's score was measured by opening it: that detail is not worth having there is no
        # reason to give up the gist as well.
        harm = signed.clamp(max=0.0).masked_fill(context.levels > 0, 0.0)
        return FocusScores(
            proposal_blocks=proposed.proposal_blocks,
            proposal_utility=proposed.proposal_utility,
            entry_utility=torch.where(kept > 0, kept, harm),
            expand_utility=signed.masked_fill(signed < least, 0.0).clamp(min=0.0),
            unread=inputs.unread,
        )

    def inputs(self, view: FocusView) -> LensInputs:
        """What the lens is given for a view of at least one entry."""
        context = view.context
        searched = self._search(view)
        tail = searched.tail
        attention = torch.full((len(context),), torch.nan)
        if self.lens.config.reads_attention:
            attention = entry_attention(view, _ASKING_ROWS)
        proposed = self._propose(view, searched, attention)
        blocks = proposed.blocks
        facts = self._entry_facts(view, attention)
        legality = entry_legality(
            facts.levels,
            facts.starts,
            facts.mask,
            cursor=facts.cursor,
            tail_start=facts.tail_start,
            block_size=context.block_size,
        )
        entries = EntryFeatures(
            vectors=self._vectors(view, context.levels, context.starts)[None],
            features=span_features(facts),
            mask=facts.mask,
            can_expand=legality.can_expand,
            can_collapse=legality.can_collapse,
        )
        starts = blocks * context.block_size
        cache = CacheFeatures(
            vectors=self._vectors(view, torch.zeros_like(blocks), starts)[None],
            features=span_features(self._cache_facts(view, proposed)),
            mask=torch.ones(1, len(blocks), dtype=torch.bool),
        )
        return LensInputs(blocks, entries, cache, tail, proposed.unread)

    def _search(self, view: FocusView) -> _Searched:
        """What lexical index and keys find for the query, wherever the window stands."""
        known = self._searched
        if known is not None and known.answers(view):
            return known
        reads = view.asked and self.lens.config.likelihoods > 0
        features = self._likelihood.features(view) if reads else view.base.features(view.query)
        hidden = features.float().cpu()[None]
        tail = TailStates(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
        found, points = self._lexical.search(view)
        keyed, relevance = self._by_keys(view, tail)
        blocks = torch.unique(torch.cat((found, keyed)))
        self._searched = _Searched(
            view.base,
            view.memory,
            view.memory.generation,
            view.context.cursor,
            view.n_proposable,
            view.query.clone(),
            tail,
            blocks,
            _placed(blocks, found, points),
            _placed(blocks, keyed, relevance),
        )
        return self._searched

    def _propose(self, view: FocusView, searched: _Searched, attention: Tensor) -> _Proposed:
        """What any index proposes, raw blocks too; the base reads the best of them."""
        context = view.context
        attended = self._by_attention(context, attention)
        blocks = torch.unique(torch.cat((searched.blocks, attended)))
        blocks = blocks[blocks * context.block_size < context.raw_start]
        lexical = _placed(blocks, searched.blocks, searched.lexical)
        learned = _placed(blocks, searched.blocks, searched.learned)
        both = _together(lexical, learned)
        most = self.lens.config.likelihoods if view.asked else 0
        read = _by_turns(both, learned)[:most]
        ranked = [_best(values, self.proposals) for values in (lexical, learned, both)]
        known = torch.unique(
            torch.cat((read, *ranked, torch.isin(blocks, attended).nonzero()[:, 0]))
        )
        read = torch.searchsorted(known, read)
        blocks, lexical, learned = blocks[known], lexical[known], learned[known]
        likelihood = torch.full((len(blocks),), torch.nan)
        told = torch.zeros(len(blocks), dtype=torch.bool)
        if len(read):
            likelihood[read] = self._likelihood.gains(view, blocks[read])
            told[read] = self._likelihood.told(view, blocks[read])
        mass = attention[context.indices_of(blocks * context.block_size)]
        unread = bool(likelihood[read].isnan().any())
        return _Proposed(blocks, lexical, learned, mass, likelihood, told, unread)

    def _by_attention(self, context: WorkingContext, attention: Tensor) -> Tensor:
        """Blocks whose level-1 gists the base attends to most."""
        gists = ((context.levels == 1) & ~attention.isnan()).nonzero()[:, 0]
        most = attention[gists].topk(min(self.proposals, len(gists))).indices
        return context.starts[gists[most]] // context.block_size

    def _by_keys(self, view: FocusView, tail: TailStates) -> tuple[Tensor, Tensor]:
        """Blocks whose level-1 keys are closest to the tail's queries."""
        memory, old = view.memory, view.n_proposable
        nothing = torch.empty(0)
        if memory.identity.key_width == 0 or not old:
            return nothing.long(), nothing
        queries = self.lens.encode_queries(tail.hidden, tail.mask, view.query[None])
        # A mean over queries is the product with their mean.
        asked = queries[0] if self.lens.config.interaction == "max" else queries.mean(dim=1)
        if self._keys is None or self._keys.memory is not memory:
            self._keys = KeyIndex(memory, self._key_config)
        return self._keys.search(
            asked,
            self.candidates,
            old,
            lambda keys: self.lens.relevance(queries, keys, chunk=_KEYS_AT_ONCE)[0],
        )

    def _vectors(self, view: FocusView, levels: Tensor, starts: Tensor) -> Tensor:
        """Gists ``[n, gist_width]`` of spans: a raw block by its level-1 gist, or zeros."""
        memory, size = view.memory, view.context.block_size
        vectors = torch.zeros(len(levels), memory.identity.gist_width)
        known = levels.clamp(min=1)
        for level in torch.unique(known).tolist():
            index = starts // size**level
            here = (known == level) & (index < memory.count(level))
            if bool(here.any()):
                vectors[here] = memory.gists_at(level, index[here])
        return vectors

    def _entry_facts(self, view: FocusView, attention: Tensor) -> SpanFacts:
        context = view.context
        n = len(context)
        unmeasured, no = torch.full((1, n), torch.nan), torch.zeros(1, n, dtype=torch.bool)
        yes = torch.ones(1, n, dtype=torch.bool)
        return SpanFacts(
            levels=context.levels[None],
            starts=context.starts[None],
            stops=context.ends[None],
            costs=context.costs[None],
            depths=torch.zeros(1, n, dtype=torch.int64),
            fidelity=self._fidelity(view, context.levels, context.starts)[None],
            lexical=unmeasured,
            attention=attention[None],
            learned=unmeasured,
            likelihood=unmeasured,
            told=no,
            in_context=yes,
            newest=no,
            root=_roots(context)[None],
            proposal=no,
            mask=yes,
            cursor=torch.tensor([context.cursor]),
            tail_start=torch.tensor([context.tail_start]),
        )

    def _cache_facts(self, view: FocusView, proposed: _Proposed) -> SpanFacts:
        context, blocks = view.context, proposed.blocks
        m, starts = len(blocks), blocks * context.block_size
        # A block that is raw is described as if it were still its gist: that is what is at stake.
        block_cost = context.block_size - context.gist_cost
        no, yes = torch.zeros(1, m, dtype=torch.bool), torch.ones(1, m, dtype=torch.bool)
        return SpanFacts(
            levels=torch.zeros(1, m, dtype=torch.int64),
            starts=starts[None],
            stops=(starts + context.block_size)[None],
            costs=context.chain_costs(blocks).clamp(min=block_cost)[None],
            depths=context.levels[context.indices_of(starts)].clamp(min=1)[None],
            fidelity=self._fidelity(view, torch.ones_like(blocks), starts)[None],
            lexical=proposed.lexical[None],
            attention=proposed.attention[None],
            learned=proposed.learned[None],
            likelihood=proposed.likelihood[None],
            told=proposed.told[None],
            in_context=no,
            newest=no,
            root=no,
            proposal=yes,
            mask=yes,
            cursor=torch.tensor([context.cursor]),
            tail_start=torch.tensor([context.tail_start]),
        )

    def _fidelity(self, view: FocusView, levels: Tensor, starts: Tensor) -> Tensor:
        fidelity = torch.full((len(levels),), torch.nan)
        for level in torch.unique(levels[levels > 0]).tolist():
            here = levels == level
            index = starts[here] // view.context.block_size**level
            fidelity[here] = view.memory.fidelity_at(level, index)
        return fidelity


def _placed(blocks: Tensor, found: Tensor, values: Tensor) -> Tensor:
    """``values`` of the blocks ``found`` at their places in sorted ``blocks``; NaN elsewhere."""
    placed = torch.full((len(blocks),), torch.nan)
    known = torch.isin(found, blocks)
    placed[torch.searchsorted(blocks, found[known])] = values[known]
    return placed


def _together(lexical: Tensor, learned: Tensor) -> Tensor:
    """``[c]``: share of the best BM25 score, plus how close the key is to the closest one.

    What an index does not know counts as no match, or as the farthest key known.
    """
    points = share_of_best(lexical.nan_to_num()[None])[0]
    known = learned[~learned.isnan()]
    if not len(known):
        return points
    near = torch.where(learned.isnan(), known.min(), learned) - known.max()
    return points + near / _RELEVANCE_APART


def _best(values: Tensor, most: int) -> Tensor:
    """Places ``[m]`` of the highest values that are not NaN, best first."""
    known = (~values.isnan()).nonzero()[:, 0]
    return known[values[known].topk(min(most, len(known))).indices]


def _by_turns(first: Tensor, second: Tensor) -> Tensor:
    """All places ``[c]``: the best by ``first``, the best by ``second``, the next best of each."""
    turns = torch.full((2, len(first)), 2 * len(first))
    for number, values in enumerate((first, second)):
        order = _best(values, len(values))
        turns[number, order] = torch.arange(len(order)) * 2 + number
    return turns.amin(dim=0).argsort(stable=True)


def _roots(context: WorkingContext) -> Tensor:
    """``[n]`` bool: gists that no complete gist covers yet."""
    widths = context.widths * torch.where(context.levels > 0, context.block_size, 1)
    return (context.levels > 0) & (context.starts // widths * widths + widths > context.cursor)
