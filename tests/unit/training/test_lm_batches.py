from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import zstandard
from tokenizers import Tokenizer, models

from megacontext.errors import ConfigError, DataError
from megacontext.tasks.documents import RELATIONS, Piece
from megacontext.tasks.recall_documents import Prose, RecallDocuments
from megacontext.training.lm_batches import (
    END_OF_TEXT,
    MixtureConfig,
    PlannedStep,
    RowSampler,
    batches,
    read_documents,
)
from megacontext.training.tokenizer import train_tokenizer

PROSE = Prose(["The fox went to the sea. It was night. " * 60, "A king spoke. Nobody came! " * 80])
TOKENIZER = train_tokenizer(
    [*PROSE.texts, "Question: Where is Mary?\nAnswer: the garden moved to"], 400
)
EVERYTHING = {"statement_share": 1.0}
# Weights that tell the kinds apart, and no sampling of statements.
PLAIN = MixtureConfig(prose_weight=1.5, statement_weight=0.25, answer_weight=4.0, **EVERYTHING)


def sampler(mixture=PLAIN, seed=0):
    return RowSampler(TOKENIZER, PROSE, mixture, seed)


def only(kind, **values):
    shares = {"prose_share": 0, "recall_share": 0, "copy_share": 0, f"{kind}_share": 1}
    return MixtureConfig(**shares, **values)


def stretches(ids, weights):
    """The row's text in stretches of equal weight, as ``(text, weight)``."""
    found = []
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if not found or found[-1][1] != weight:
            found.append(([], weight))
        found[-1][0].append(token)
    return [(TOKENIZER.decode(part, skip_special_tokens=False), weight) for part, weight in found]


def test_a_row_is_a_function_of_seed_and_number():
    first, other = sampler(), sampler()
    other.row(3, 50)
    for number in (0, 7):
        ids, weights = first.row(number, 200)
        again, weights_again = other.row(number, 200)
        assert np.array_equal(ids, again)
        assert np.array_equal(weights, weights_again)
        assert (ids.shape, ids.dtype) == ((200,), np.int64)
        assert (weights.shape, weights.dtype) == ((200,), np.float32)
    rows = {first.row(number, 100)[0].tobytes() for number in range(20)}
    assert len(rows) == 20
    assert first.row(0, 100)[0].tobytes() != sampler(seed=1).row(0, 100)[0].tobytes()


@pytest.mark.parametrize("number", range(5))
def test_weights_line_up_with_the_pieces(number):
    mixture = MixtureConfig(prose_share=0, copy_share=0, answer_weight=4.0, **EVERYTHING)
    rows = sampler(mixture)
    found = stretches(*rows.row(number, 300))
    rng = random.Random(f"0/{number}")
    rng.choices((0, 1, 2), (0, 1, 0))
    size = int(48 * (300 / 48) ** rng.random())
    # The generator as the row had it when it drew its first document.
    rng = random.Random(f"0/{number}")
    recall = RecallDocuments(rng, PROSE)
    rng.choices((0, 1, 2), (0, 1, 0))
    rng.random()
    pieces = recall.draw(int(size * 0.95))
    text = "".join(piece.text for piece in pieces)
    row = "".join(part for part, _ in found)
    assert row.startswith(text[: len(row)])
    answers = [piece.text for piece in pieces if piece.kind == "answer"]
    weighted = [part for part, weight in found if weight == 4.0]
    whole = weighted if len(row) > len(text) else weighted[:-1]
    assert whole[: len(answers)] == answers[: len(whole)]


def test_every_kind_has_its_weight_in_every_token():
    kinds = ("prose", "statement", "question", "answer", "copy")
    pieces = [Piece(f" the fox {kind}\n", kind) for kind in kinds]
    encoded = list(sampler().encode(pieces))
    assert [weight for _, weight in encoded] == [1.5, 0.25, 0.25, 4.0, 1.0]
    for piece, (ids, _) in zip(pieces, encoded, strict=True):
        assert TOKENIZER.decode(ids) == piece.text


@pytest.mark.parametrize(("kind", "weight"), [("prose", 0.25), ("copy", 0.25)])
def test_documents_end_with_the_end_of_text(kind, weight):
    mixture = only(kind, statement_weight=weight, **EVERYTHING)
    ids, weights = sampler(mixture).row(0, 400)
    ends = np.flatnonzero(ids == TOKENIZER.token_to_id(END_OF_TEXT))
    assert len(ends)
    assert (weights[ends] == weight).all()


def test_a_sample_of_statement_tokens_carries_the_weight_of_all():
    rows = sampler(MixtureConfig(prose_share=0, copy_share=0, statement_share=0.25))
    weights = np.concatenate([rows.row(number, 400)[1] for number in range(12)])
    scored = np.float32(0.2 / 0.25)
    # Prose, the end of a document, and answers are weighed as they are.
    assert set(weights.tolist()) <= {0.0, float(scored), 1.0, float(np.float32(0.2)), 4.0}
    statements = weights[(weights == 0) | (weights == scored)]
    assert len(statements) > 1000
    assert statements.mean() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("weight", ["prose_weight", "answer_weight"])
def test_only_statements_and_questions_are_sampled_whatever_the_weights(weight):
    values = {"statement_weight": 0.5, weight: 0.5, "statement_share": 0.25}
    kind = "prose" if weight == "prose_weight" else "recall"
    rows = sampler(only(kind, **values))
    ids, weights = rows.row(0, 600)
    if kind == "prose":
        assert (weights == 0.5).all()
    else:
        full = [part for part, w in stretches(ids, weights) if w == 0.5]
        assert sum(part.endswith("\n") for part in full) >= 3


def test_another_mixture_changes_what_is_drawn_only():
    rows = sampler(only("prose"))
    other = rows.with_mixture(only("copy"))
    assert (other.tokenizer, other.prose, other.seed) == (rows.tokenizer, rows.prose, rows.seed)
    assert "List again:" in TOKENIZER.decode(other.row(0, 200)[0])
    assert "List again:" not in TOKENIZER.decode(rows.row(0, 200)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_follow_the_plan_from_any_step(workers):
    rows = sampler()
    plan = [PlannedStep(2, 40, rows), PlannedStep(3, 60, rows), PlannedStep(1, 60, rows)]
    drawn = list(batches(plan, workers=workers))
    assert [tuple(batch.ids.shape) for batch in drawn] == [(2, 40), (3, 60), (1, 60)]
    for step, batch in enumerate(batches(plan, first=1, workers=workers), start=1):
        assert torch.equal(batch.ids, drawn[step].ids)
        assert torch.equal(batch.weights, drawn[step].weights)
    assert (drawn[0].ids.dtype, drawn[0].weights.dtype) == (torch.int64, torch.float32)
    # No two rows of a run are the same.
    assert torch.equal(drawn[1].ids[2], torch.from_numpy(rows.row(4096 + 2, 60)[0]))


def test_nothing_is_left_to_draw_at_the_end():
    assert list(batches([PlannedStep(1, 40, sampler())], first=1, workers=0)) == []


def test_documents_are_read_plain_and_compressed(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.zst"
    plain.write_text(f" one\n{END_OF_TEXT}\n\n{END_OF_TEXT}two — ü ", encoding="utf-8")
    packed.write_bytes(zstandard.compress(f"three{END_OF_TEXT}".encode()))
    assert read_documents([plain, packed]) == ["one", "two — ü", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file; name an existing text file in `corpus`"),
        ("latin.txt", b"caf\xe9 ", "UTF-8 text"),
        ("plain.zst", b"not compressed", "UTF-8 text"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused_with_its_name(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_documents([path])
    assert str(path) in str(caught.value)


def test_a_folder_is_no_corpus(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_documents([tmp_path])


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "cut.zst"
    path.write_bytes(zstandard.compress(random.Random(0).randbytes(4000).hex().encode())[:900])
    with pytest.raises(DataError, match=r"cut\.zst.*ends early"):
        read_documents([path])


def test_a_file_of_several_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "two.zst"
    path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert read_documents([path]) == ["one two"]


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(DataError, match=r"no token <\|endoftext\|>"):
        RowSampler(Tokenizer(models.BPE()), PROSE, PLAIN, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prose_share": -0.1}, "'prose_share' has value -0.1.*greater than or equal to 0"),
        ({"answer_weight": 0}, "'answer_weight' has value 0.*greater than 0"),
        ({"statement_share": 0}, "'statement_share' has value 0.*greater than 0"),
        ({"statement_share": 1.5}, "'statement_share' has value 1.5.*less than or equal to 1"),
        ({"shortest_document": 8}, "'shortest_document' has value 8.*equal to 16"),
        ({"recall_share": float("inf")}, "'recall_share' has value inf.*finite"),
        ({"noise": 1}, "unknown key 'noise'"),
        (
            {"prose_share": 0, "recall_share": 0, "copy_share": 0},
            "prose_share, recall_share and copy_share must not all be 0",
        ),
    ],
)
def test_mixtures_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        MixtureConfig.parse(values)


def test_facts_stand_at_the_ends_of_their_sentences():
    mixture = only("recall", story_share=0.99, state_labels=3, **EVERYTHING)
    rows = sampler(mixture)
    found = 0
    for number in range(12):
        ids, weights, states = rows.row_with_states(number, 300)
        plain_ids, plain_weights = rows.row(number, 300)
        assert np.array_equal(ids, plain_ids)
        assert np.array_equal(weights, plain_weights)
        for position, relation, entity, value in states:
            assert 0 <= position < 300
            assert 0 <= relation < len(RELATIONS)
            told = TOKENIZER.decode(ids[: position + 1].tolist(), skip_special_tokens=False)
            # A sentence's full stop, or the colon that an answer follows.
            assert told.endswith((".", ":"))
            sentence = told.rpartition(". ")[2]
            # What is asked about is named there; its first token may be part of a word.
            assert TOKENIZER.decode([entity]).strip() in sentence
            assert 0 <= value < TOKENIZER.get_vocab_size()
            found += 1
    assert found > 20


def test_without_labels_there_are_no_facts():
    mixture = only("recall", story_share=0.99, **EVERYTHING)
    assert sampler(mixture).row_with_states(0, 300)[2] == []


def test_a_batch_numbers_the_rows_of_its_facts():
    mixture = only("recall", story_share=0.99, state_labels=2, **EVERYTHING)
    rows = sampler(mixture)
    (batch,) = batches([PlannedStep(rows=4, length=200, sampler=rows)], workers=0)
    assert batch.states.dtype == torch.int64
    assert batch.states.shape[1] == 5
    for row in range(4):
        expected = rows.row_with_states(row, 200)[2]
        assert batch.states[batch.states[:, 0] == row][:, 1:].tolist() == expected


def test_no_document_is_longer_than_allowed():
    mixture = only("prose", shortest_document=32, longest_document=64, **EVERYTHING)
    ids, _ = sampler(mixture).row(0, 600)
    ends = np.flatnonzero(ids == TOKENIZER.token_to_id(END_OF_TEXT))
    # Prose is cut by characters, about four a token.
    assert np.diff(ends).max() < 200
    assert len(ends) >= 4
