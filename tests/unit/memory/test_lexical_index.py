from __future__ import annotations

import math

import pytest
import torch

from megacontext.errors import InputError
from megacontext.memory import Memory


def index(make, texts):
    feeder = make()
    feeder.append(4 * len(texts), block_texts=texts)
    return feeder.memory


def test_scores_are_bm25_of_an_independent_computation(make):
    texts = [
        "apple pear pear",
        "apple",
        "plum plum plum pear",
        "fig " * 9,
        "fig kiwi",
        "fig",
        "kiwi",
    ]
    memory = index(make, texts)
    documents = [text.split() for text in texts]
    mean = sum(map(len, documents)) / len(documents)

    def score(document, query):
        total = 0.0
        for term in query:
            n = sum(term in other for other in documents)
            idf = max(math.log((len(documents) - n + 0.5) / (n + 0.5)), 1e-6)
            f = document.count(term)
            total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(document) / mean))
        return total

    query = ["pear", "kiwi", "plum"]
    expected = {i: s for i, d in enumerate(documents) if (s := score(d, query)) > 0}
    blocks, scores = memory.search_blocks(" ".join(query), 10)
    assert blocks.dtype == torch.int64
    assert scores.dtype == torch.float32
    assert blocks.tolist() == sorted(expected, key=lambda i: (-round(expected[i], 9), -i))
    assert scores.tolist() == pytest.approx([expected[i] for i in blocks.tolist()], rel=1e-5)


def test_ties_go_to_the_newer_block_and_limit_holds(make):
    memory = index(make, ["a b", "same words", "c d", "same words", "e f", "same words"])
    assert memory.search_blocks("same", 2)[0].tolist() == [5, 3]
    assert memory.search_blocks("same", 0)[0].tolist() == []


def test_words_match_without_case_accents_and_endings(make):
    memory = index(make, ["Die Blöcke", "running quickly", "CAFÉ", "decomposed cafe\u0301s", "x"])
    assert memory.search_blocks("blocke", 5)[0].tolist() == [0]
    assert memory.search_blocks("RUNS", 5)[0].tolist() == [1]
    assert sorted(memory.search_blocks("cafe\u0301", 5)[0].tolist()) == [2, 3]


def test_a_stem_that_would_be_stemmed_again_is_still_found(make):
    memory = index(make, ["they agreed", "nothing", "generalizations", "else"])
    assert memory.search_blocks("agreed", 5)[0].tolist() == [0]
    assert memory.search_blocks("generalizations", 5)[0].tolist() == [2]


@pytest.mark.parametrize(
    "query",
    [
        'apple" OR "pear',
        "apple AND NOT apple",
        "text:apple",
        "apple*",
        "^apple",
        "NEAR(apple pear, 2)",
        "{text} : apple",
        "-apple",
        "(apple",
        "'; DROP TABLE blocks; --apple",
        "\0apple\0",
        "\ud800apple",
    ],
)
def test_nothing_in_a_query_is_syntax(make, query):
    memory = index(make, ["apple", "other", "more", "text"])
    if "\ud800" in query:
        query = query.replace("apple", " apple")
    assert 0 in memory.search_blocks(query, 5)[0].tolist()


@pytest.mark.parametrize("query", ["", "   ", '"', "!?*()", "\0", "unheard-of", "\ud800"])
def test_a_query_without_known_words_finds_nothing(make, query):
    blocks, scores = index(make, ["apple", "other"]).search_blocks(query, 5)
    assert (blocks.shape, scores.shape) == ((0,), (0,))


def test_syntax_words_are_plain_words(make):
    memory = index(make, ["not near", "and so on", "or else", "x"])
    assert memory.search_blocks("NOT", 5)[0].tolist() == [0]
    assert memory.search_blocks("NEAR", 5)[0].tolist() == [0]


def test_common_words_are_left_out_where_rarer_ones_exist(make):
    texts = [f"common w{i % 50} v{i}" for i in range(200)]
    memory = index(make, texts)
    assert memory.search_blocks("common w7", 300)[0].tolist() == [157, 107, 57, 7]
    assert memory.search_blocks("common", 300)[0].shape == (200,)
    assert memory.search_blocks("common unheard", 300)[0].shape == (200,)


def test_postings_beyond_the_bound_drop_the_most_frequent_terms(make, monkeypatch):
    monkeypatch.setattr("megacontext.memory.lexical_index.MAX_POSTINGS", 6)
    texts = ["rare mid", "mid", "mid", "often mid"] + ["often"] * 9
    memory = index(make, texts)
    assert sorted(memory.search_blocks("often rare mid", 20)[0].tolist()) == [0, 1, 2, 3]
    assert memory.search_blocks("often", 20)[0].shape == (10,)


def test_counts_follow_every_commit(make):
    feeder = make()
    feeder.append(8, block_texts=["pear", "pear"])
    before = feeder.memory.term_weights(["pear"])["pear"]
    feeder.append(40, block_texts=["fig"] * 10)
    assert feeder.memory.term_weights(["pear"])["pear"] > before


@pytest.fixture
def counted_anew():
    """Lists the statements with which a memory counts the blocks of a term."""
    said: list[str] = []

    def watch(memory):
        memory._catalog._connection.set_trace_callback(
            lambda statement: said.append(statement) if "block_terms" in statement else None
        )
        return said

    return watch


def test_counts_are_carried_over_a_commit_of_this_process(make, counted_anew):
    feeder = make()
    feeder.append(8, block_texts=["pear", "pear fig"])
    feeder.memory.term_weights(["pear", "fig", "plum"])
    said = counted_anew(feeder.memory)
    feeder.append(12, block_texts=["pears pear", "plum", "kiwi"])
    feeder.append(6, block_texts=["pear"])
    feeder.append(2)
    weights = feeder.memory.term_weights(["pear", "fig", "plum"])
    assert said == []
    counts = {"pear": 4, "fig": 1, "plum": 1}
    expected = {word: math.log(1 + (7 - n + 0.5) / (n + 0.5)) for word, n in counts.items()}
    assert weights == pytest.approx(expected)
    feeder.memory.term_weights(["kiwi"])
    assert len(said) == 1


def test_commits_of_another_process_are_counted_anew(make, counted_anew):
    feeder = make()
    feeder.append(8, block_texts=["pear", "fig"])
    with Memory.open(feeder.memory.path) as reader:
        before = reader.term_weights(["pear"])
        said = counted_anew(reader)
        feeder.append(8, block_texts=["pear", "pear"])
        assert reader.term_weights(["pear"]) == before
        assert said == []
        assert reader.refresh()
        assert reader.term_weights(["pear"]) == feeder.memory.term_weights(["pear"]) != before
        assert len(said) == 1


def test_only_so_many_counts_are_kept(make, monkeypatch):
    monkeypatch.setattr("megacontext.memory.lexical_index._MOST_COUNTS", 3)
    memory = index(make, ["pear fig", "pear", "pear plum", "kiwi"])
    weights = memory.term_weights(["pear", "fig", "plum", "kiwi", "unheard"])
    assert len(memory._catalog.lexical._frequencies) == 2
    assert (
        weights["fig"] == weights["plum"] == weights["kiwi"] == pytest.approx(math.log(1 + 7 / 3))
    )
    assert memory.term_weights(["pear"])["pear"] == weights["pear"]


def test_term_weights_fall_with_frequency(make):
    memory = index(make, ["pear fig", "pear", "pear plum", "kiwi"])
    weights = memory.term_weights(["Pears", "fig", "unheard", "?!", "pear-fig"])
    assert weights["Pears"] == pytest.approx(math.log(1 + 1.5 / 3.5))
    assert weights["fig"] == pytest.approx(math.log(1 + 3.5 / 1.5))
    assert weights["unheard"] == pytest.approx(math.log(1 + 4.5 / 0.5))
    assert weights["?!"] == 0.0
    assert weights["pear-fig"] == weights["fig"]


def test_blocks_without_text_are_never_found(make):
    feeder = make()
    feeder.append(8)
    feeder.append(8, block_texts=["pear", "fig"])
    assert feeder.memory.search_blocks("pear fig", 9)[0].tolist() == [3, 2]


def test_a_negative_limit_is_refused(make):
    with pytest.raises(InputError):
        index(make, ["x"]).search_blocks("x", -1)
