from __future__ import annotations

import random

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.errors import DataError, InputError
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.evaluation.noise import NoiseTokens
from megacontext.runtime.base_model import BaseModel
from megacontext.tasks.corpus import END_OF_TEXT

BASE = tiny_base_model()


def sentences(text: str) -> list[str]:
    noise = NoiseTokens(BASE, [text])
    starts = noise.sentence_starts.tolist()
    ids = noise._cut(0, len(noise))
    return [BASE.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? four.", ["\n\nOne.", " Two!", " Three? four."]),
        ('He said "No." Then left.', ['\n\nHe said "No."', " Then left."]),
        ("Mr. Fox and Mrs. Hen met. St. Ives.", ["\n\nMr. Fox and Mrs. Hen met.", " St. Ives."]),
        ("It ended.  Two spaces.", ["\n\nIt ended.", "  Two spaces."]),
        ("Title\n\nFirst line\nsecond.", ["\n\nTitle", "\n\nFirst line\nsecond."]),
        ("Stop.\nNew line.", ["\n\nStop.", "\nNew line."]),
        ("no end at all", ["\n\nno end at all"]),
    ],
)
def test_texts_are_cut_between_sentences(text, expected):
    assert sentences(text) == expected


def test_the_tokens_are_those_of_the_whole_text():
    base = BaseModel.from_pretrained("bundled:tiny")
    noise = NoiseTokens.read(base)
    whole = base.encode("\n\n" + read_book(DemoConfig()))
    assert noise._cut(0, len(noise)).equal(whole)
    lengths = torch.diff(noise.sentence_starts)
    assert lengths.float().mean() < 60


def test_a_draw_starts_with_a_sentence_and_goes_round():
    texts = ["One fox. Two hens.", "Three owls."]
    noise = NoiseTokens(BASE, texts)
    whole = "\n\nOne fox. Two hens.\n\nThree owls."
    assert len(noise) == len(whole)
    starts = set()
    for seed in range(20):
        drawn = BASE.decode(noise.draw(random.Random(seed), 100))
        assert len(drawn) == 100
        assert drawn in whole * 6
        starts.add((whole * 6).index(drawn))
    assert starts == {0, len("\n\nOne fox."), len("\n\nOne fox. Two hens.")}
    assert noise.draw(random.Random(0), 0).tolist() == []


def test_statements_are_encoded_as_they_stand_between_sentences():
    noise = NoiseTokens(BASE, ["One. Two."])
    assert BASE.decode(noise.encode("The fox ran.")) == " The fox ran."
    assert BASE.decode(noise.encode("\nkey fox: 12")) == "\nkey fox: 12"


def test_a_statement_stands_at_its_depth():
    noise = NoiseTokens(BASE, [" ".join(f"Sentence {i:03d}." for i in range(1000))])
    needle = noise.encode("The needle.")
    for depth in (0.0, 0.25, 0.5, 1.0):
        history, [(start, end)] = noise.splice(
            random.Random(3), [needle], 5000 + len(needle), depths=[depth]
        )
        assert history[start:end].equal(needle)
        assert abs(start - depth * 5000) <= 2 * len(" Sentence 000.")
    history, spans = noise.splice(random.Random(3), [needle] * 3, 3000, depths=[0, 0.5, 0.5])
    assert [len(history), spans[0][0], spans[2][0] - spans[1][1]] == [3000, 0, 0]


def test_every_place_between_sentences_is_used():
    noise = NoiseTokens(BASE, ["Aa. Bb. Cc. Dd."])
    places = set()
    for seed in range(300):
        rng = random.Random(seed)
        history, [(start, _)] = noise.splice(rng, [noise.encode("Xx.")], len(noise) + 4)
        text = BASE.decode(history)
        places.add((text.replace(" Xx.", ""), start))
    rounds = {text for text, _ in places}
    assert len(rounds) == 4
    assert len(places) == 4 * 4


def test_more_statements_than_places_share_them():
    noise = NoiseTokens(BASE, ["Aa. Bb."])
    ids = [noise.encode(f"X{i}.") for i in range(9)]
    history, spans = noise.splice(random.Random(0), ids, sum(map(len, ids)) + 6)
    assert [BASE.decode(history[a:b]) for a, b in spans] == [f" X{i}." for i in range(9)]


def test_statements_may_leave_no_room_for_noise():
    noise = NoiseTokens(BASE, ["Aa. Bb."])
    ids = [noise.encode("One."), noise.encode("Two.")]
    history, spans = noise.splice(random.Random(0), ids, 10)
    assert (BASE.decode(history), spans) == (" One. Two.", [(0, 5), (5, 10)])
    with pytest.raises(InputError, match="10 tokens of statements do not fit into a history of 9"):
        noise.splice(random.Random(0), ids, 9)


@pytest.mark.parametrize(
    "depths", [[0.5], [0.6, 0.5], [-0.1, 0.5], [0.5, 1.1], [0.5, float("nan")]]
)
def test_wrong_depths_are_refused(depths):
    noise = NoiseTokens(BASE, ["Aa. Bb."])
    ids = [noise.encode("One."), noise.encode("Two.")]
    with pytest.raises(InputError, match="depths"):
        noise.splice(random.Random(0), ids, 40, depths=depths)


def test_empty_noise_is_refused():
    with pytest.raises(InputError, match="the noise is empty"):
        NoiseTokens(BASE, [])


def test_a_corpus_gives_its_held_out_documents(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(END_OF_TEXT.join(f"Number {i}." for i in range(5)))
    noise = NoiseTokens.read(BASE, [path], held_out_every=2)
    text = BASE.decode(noise._cut(0, len(noise)))
    assert text == "\n\nNumber 0.\n\nNumber 2.\n\nNumber 4."
    with pytest.raises(DataError, match="too few to hold out one in 16"):
        NoiseTokens.read(BASE, [path])
