from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megacontext.tasks.recall_documents import Prose
from megacontext.training.lm_batches import MixtureConfig, RowSampler
from megacontext.training.recall_probe import probe_recall
from megacontext.training.tokenizer import train_tokenizer

PROSE = Prose(["The fox went to the sea. It was night. Nobody spoke. " * 100])
TOKENIZER = train_tokenizer([*PROSE.texts, "Question: Where is Mary?\nAnswer: the garden"], 400)
SAMPLER = RowSampler(TOKENIZER, PROSE, MixtureConfig(), 0)


class Clairvoyant(nn.Module):
    """Says the very next token, with a set probability; sees the whole input."""

    def __init__(self, share=0.9, wrong=()):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.share, self.wrong, self.lengths = share, wrong, []

    def forward(self, input_ids):
        size = TOKENIZER.get_vocab_size()
        self.lengths.append(input_ids.shape[1])
        target = input_ids.roll(-1, dims=1)
        for token in self.wrong:
            target = torch.where(target == token, (token + 1) % size, target)
        logits = torch.full((*input_ids.shape, size), math.log((1 - self.share) / (size - 1)))
        return SimpleNamespace(logits=logits.scatter(2, target[..., None], math.log(self.share)))


def test_a_perfect_model_is_right_everywhere():
    model = Clairvoyant()
    report = probe_recall(model, SAMPLER, length=240, rows=6)
    assert report.count > 5
    assert len(report.exact) > 2
    assert set(report.exact.values()) == {1.0}
    assert set(report.first.values()) == {1.0}
    assert report.prose_nll == pytest.approx(-math.log(0.9), rel=1e-3)
    assert max(model.lengths) <= 240
    assert min(model.lengths) >= 24


def test_one_wrong_token_spoils_the_answer_but_not_its_beginning():
    # Every answer ends its line.
    newline = TOKENIZER.encode("\n").ids[0]
    report = probe_recall(Clairvoyant(wrong=[newline]), SAMPLER, length=240, rows=6)
    assert set(report.exact.values()) == {0.0}
    assert set(report.first.values()) == {1.0}


def test_the_documents_are_the_same_on_every_call():
    model = Clairvoyant(wrong=range(40, 120))
    reports = [probe_recall(model, SAMPLER, length=200, rows=4) for _ in range(2)]
    assert repr(reports[0]) == repr(reports[1])
    other = probe_recall(model, SAMPLER, length=200, rows=4, seed=1)
    assert repr(other) != repr(reports[0])


def test_distances_are_sorted_into_buckets():
    report = probe_recall(Clairvoyant(), SAMPLER, length=240, rows=6)
    order = ["<=32", "<=64", "<=128", "<=256", "<=512", "<=1024", "<=2048", ">2048"]
    assert list(report.first) == [bucket for bucket in order if bucket in report.first]
    # No evidence can be further away than the document is long.
    assert set(report.first) <= set(order[:4])
    assert len(report.first) >= 2


def test_without_rows_there_is_nothing_to_report():
    report = probe_recall(Clairvoyant(), SAMPLER, length=100, rows=0)
    assert (report.exact, report.first, report.count) == ({}, {}, 0)
    assert math.isnan(report.prose_nll)
