from __future__ import annotations

import pytest
import torch
from torch import nn

from megacontext.errors import ConfigError
from megacontext.training.optimizers import HybridOptimizer, OptimizerConfig

CONFIG = OptimizerConfig(warmup_steps=2, decay_share=0.3)


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)

    def loss(self, ids):
        logits = self.lm_head(self.norm(torch.tanh(self.up(self.embed_tokens(ids)))))
        return nn.functional.cross_entropy(logits, ids.flip(0))


def optimizer_of(net, config=CONFIG):
    return HybridOptimizer(net.named_parameters(), config)


def train(net, optimizer, first, last):
    norms = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        net.loss(torch.randint(0, 11, (20,), generator=generator)).backward()
        norms.append(optimizer.step(optimizer.rate(step, 10)))
    return norms


def test_only_hidden_matrices_go_to_muon():
    muon, adam = optimizer_of(Net()).names
    assert muon == ["up.weight"]
    assert adam == ["embed_tokens.weight", "up.bias", "norm.weight", "norm.bias", "lm_head.weight"]


def test_adamw_may_take_the_matrices_too():
    net = Net()
    config = OptimizerConfig(
        matrices="adamw", adam_lr=0.01, weight_decay=0.1, warmup_steps=0, decay_share=0.0
    )
    plain = Net()
    optimizer = optimizer_of(net, config)
    (names,) = optimizer.names
    assert names == [name for name, _ in net.named_parameters()]
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    train(net, optimizer, 0, 4)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        plain.loss(torch.randint(0, 11, (20,), generator=generator)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.clip_norm)
        reference.step()
        reference.zero_grad()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value)


def test_only_matrices_decay_beside_muon_and_everything_without_it():
    names = {name for name, _ in Net().named_parameters()}
    for matrices, decayed in (("muon", {"up.weight"}), ("adamw", names)):
        net = Net()
        optimizer = optimizer_of(net, OptimizerConfig(matrices=matrices, weight_decay=0.5))
        before = {name: value.detach().clone() for name, value in net.named_parameters()}
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(1.0)
        changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        # What is zero stays zero.
        assert changed == {name for name in decayed if before[name].any()}


@pytest.mark.parametrize(
    ("warmup", "share", "total", "expected"),
    [
        (2, 0.4, 10, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (0, 0.5, 4, [1, 1, 1, 0.5]),
        (4, 0.0, 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        (0, 1.0, 4, [1, 0.75, 0.5, 0.25]),
        # Where they overlap, the lower one counts.
        (4, 1.0, 4, [0.25, 0.5, 0.5, 0.25]),
        (1, 0.3, 1, [1]),
    ],
)
def test_the_rate_rises_stays_and_falls(warmup, share, total, expected):
    optimizer = optimizer_of(Net(), OptimizerConfig(warmup_steps=warmup, decay_share=share))
    assert [optimizer.rate(step, total) for step in range(total)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "share", "total", "expected"),
    [
        (2, 0.4, 10, [0.5, 1, 1, 1, 1, 1, 1, 0.8536, 0.5, 0.1464]),
        (0, 1.0, 4, [1, 0.8536, 0.5, 0.1464]),
        (4, 0.0, 6, [0.25, 0.5, 0.75, 1, 1, 1]),
    ],
)
def test_the_rate_may_fall_along_a_cosine(warmup, share, total, expected):
    config = OptimizerConfig(schedule="cosine", warmup_steps=warmup, decay_share=share)
    optimizer = optimizer_of(Net(), config)
    found = [optimizer.rate(step, total) for step in range(total)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_decay_ends_just_above_zero_and_never_below():
    optimizer = optimizer_of(Net(), OptimizerConfig(warmup_steps=50, decay_share=0.3))
    rates = [optimizer.rate(step, 1000) for step in range(1000)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[50:701] == [1.0] * 651
    assert rates[-1] == pytest.approx(1 / 300)
    assert sorted(rates[700:], reverse=True) == rates[700:]


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("pause", [1, 3])
def test_a_restored_state_goes_on_bit_by_bit(pause, matrices):
    config = OptimizerConfig(warmup_steps=2, matrices=matrices, schedule="cosine")
    straight = Net()
    train(straight, optimizer_of(straight, config), 0, 8)

    net = Net()
    before = optimizer_of(net, config)
    train(net, before, 0, pause)
    saved = before.state_tensors()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, before, pause, pause + 2)  # what is saved must not change with it

    resumed = Net(seed=5)
    resumed.load_state_dict(weights)
    after = optimizer_of(resumed, config)
    after.load_state_tensors(saved)
    for name, value in after.state_tensors().items():
        assert torch.equal(value, saved[name]), name
    train(resumed, after, pause, 8)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_state_covers_every_parameter():
    net = Net()
    optimizer = optimizer_of(net)
    assert optimizer.state_tensors() == {}
    train(net, optimizer, 0, 1)
    covered = {name.rpartition("|")[0] for name in optimizer.state_tensors()}
    assert covered == {name for name, _ in net.named_parameters()}
    assert {name.rpartition("|")[2] for name in optimizer.state_tensors()} == {
        "momentum_buffer", "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip


def test_gradients_are_clipped_reported_and_cleared():
    net = Net()
    optimizer = optimizer_of(net)
    net.loss(torch.arange(11)).backward()
    for parameter in net.parameters():
        parameter.grad.mul_(1000)
    squares = sum(float(p.grad.double().square().sum()) for p in net.parameters())
    assert optimizer.step(0.0) == pytest.approx(squares**0.5, rel=1e-5)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_rate_of_zero_changes_nothing():
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = optimizer_of(net)
    net.loss(torch.arange(11)).backward()
    optimizer.step(0.0)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_lowers_the_loss():
    net = Net()
    optimizer = optimizer_of(net, OptimizerConfig(muon_lr=0.02, adam_lr=0.02, warmup_steps=0))
    ids = torch.arange(11)
    first = net.loss(ids).item()
    for _ in range(30):
        net.loss(ids).backward()
        optimizer.step(1.0)
    assert net.loss(ids).item() < first / 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"muon_lr": 0}, "'muon_lr' has value 0: Input should be greater than 0"),
        ({"adam_lr": float("inf")}, "'adam_lr' has value inf.*finite"),
        ({"weight_decay": -1}, "'weight_decay' has value -1.*greater than or equal to 0"),
        ({"warmup_steps": -1}, "'warmup_steps' has value -1.*greater than or equal to 0"),
        ({"decay_share": 1.2}, "'decay_share' has value 1.2.*less than or equal to 1"),
        ({"clip_norm": 0}, "'clip_norm' has value 0.*greater than 0"),
        ({"matrices": "sgd"}, "'matrices' has value 'sgd'.*'muon' or 'adamw'"),
        ({"schedule": "step"}, "'schedule' has value 'step'.*'linear' or 'cosine'"),
        ({"momentum": 0.9}, "unknown key 'momentum'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig.parse(values)
