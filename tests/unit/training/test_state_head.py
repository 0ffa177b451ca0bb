from __future__ import annotations

import math

import torch

from megacontext.training.state_head import StateHead, StateHeadConfig

WIDTH, VOCAB = 16, 40


def labels(count=200):
    """The value is a fixed function of relation and hidden state: one of two, by its sign."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 50, WIDTH, generator=generator)
    row = torch.randint(4, (count,), generator=generator)
    position = torch.randint(50, (count,), generator=generator)
    relation = torch.randint(3, (count,), generator=generator)
    entity = torch.randint(20, (count,), generator=generator)
    value = 20 + 2 * relation + (hidden[row, position, 0] > 0).long()
    return hidden, torch.stack((row, position, relation, entity, value), dim=1)


def test_it_learns_what_hidden_states_tell():
    torch.manual_seed(0)
    head = StateHead(WIDTH, StateHeadConfig(layer=1, d_hidden=32))
    table = torch.randn(VOCAB, WIDTH)
    hidden, states = labels()
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    losses = []
    for _ in range(150):
        loss = head(hidden, states, table)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < math.log(2) / 2


def test_gradients_reach_the_hidden_states_that_are_asked_about_and_no_others():
    head = StateHead(WIDTH, StateHeadConfig(layer=1))
    hidden = torch.randn(2, 6, WIDTH, requires_grad=True)
    states = torch.tensor([[1, 3, 0, 5, 7]])
    head(hidden, states, torch.randn(VOCAB, WIDTH)).backward()
    touched = hidden.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[1, 3]]


def test_what_lies_behind_the_hidden_states_does_not_count():
    head = StateHead(WIDTH, StateHeadConfig(layer=1))
    table, hidden = torch.randn(VOCAB, WIDTH), torch.randn(1, 6, WIDTH)
    inside = torch.tensor([[0, 3, 0, 5, 7]])
    beyond = torch.tensor([[0, 6, 0, 5, 7]])
    both = torch.cat((inside, beyond))
    assert head(hidden, beyond, table) == 0
    assert head(hidden, inside[:0], table) == 0
    torch.testing.assert_close(head(hidden, both, table), head(hidden, inside, table))
