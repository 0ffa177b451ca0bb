"""What a look has found, said of the windows that follow it."""

from __future__ import annotations

import pytest
import torch

from megacontext.runtime.focus_scores import FocusScores
from megacontext.runtime.held_scores import HeldScores
from megacontext.runtime.working_context import WorkingContext


@pytest.fixture
def window():
    """K = 4, S = 1: 16 level-1 gists as one of level 3, then a raw tail of two blocks."""
    return WorkingContext.initial(72, block_size=4, gist_cost=1, budget=99, tail_tokens=8)


def held(window, proposals=(), entry=(), expand=()):
    unknown = FocusScores.unknown(len(window))
    entries, opened = unknown.entry_utility.clone(), unknown.expand_utility.clone()
    for values, target in ((entry, entries), (expand, opened)):
        for token, value in values:
            target[window.index_of(token)] = value
    blocks, worth = [list(column) for column in zip(*proposals, strict=True)] or [[], []]
    found = FocusScores(
        torch.tensor(blocks, dtype=torch.int64), torch.tensor(worth).float(), entries, opened
    )
    return HeldScores(window, found)


def worth(scores, window):
    assert not len(scores.proposal_blocks)
    assert not scores.expand_utility.any(), "nothing is asked for"
    pairs = zip(window.starts.tolist(), scores.entry_utility.tolist(), strict=True)
    return {start: value for start, value in pairs if value}


def test_a_block_that_was_opened_is_kept_for_what_it_was_asked_for(window):
    found = held(window, proposals=[(5, 2.0), (9, 3.0), (5, 2.5)])
    assert worth(found.scores(window), window) == {}
    opened = window.reveal(5)
    assert worth(found.scores(opened), opened) == {20: 2.5}


def test_a_block_that_was_raw_is_kept_and_harm_is_not_held(window):
    window = window.reveal(5).reveal(6)
    found = held(window, entry=[(20, 2.0), (24, -1.0), (64, 0.5)])
    assert worth(found.scores(window), window) == {20: 2.0, 64: 0.5}
    closed = window.collapse(window.index_of(20))
    assert worth(found.scores(closed), closed) == {64: 0.5}


def test_a_gist_that_was_opened_leaves_its_block(window):
    window = window.open_to(20, 1)
    found = held(window, expand=[(20, 1.5), (32, 9.0)])
    opened = window.reveal(5).open_to(32, 1)
    assert worth(found.scores(opened), opened) == {20: 1.5}


def test_the_window_may_have_grown(window):
    found = held(window, entry=[(68, 2.0)])
    grown = window.extend(5)
    assert worth(found.scores(grown), grown) == {68: 2.0}


def test_nothing_was_scored():
    empty = WorkingContext.initial(0, block_size=4, gist_cost=1, budget=99, tail_tokens=8)
    found = HeldScores(empty, FocusScores.unknown(0))
    grown = empty.extend(5)
    assert worth(found.scores(grown), grown) == {}
