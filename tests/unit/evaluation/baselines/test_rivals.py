"""What holds for all rivals alike."""

from __future__ import annotations

import itertools
import random
from contextlib import contextmanager

import pytest
import torch
from engine_cases import learned_gistnet, words
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError, InputError, MemoryMismatchError
from megacontext.evaluation.baselines import RIVALS, Informed, RivalsConfig, rivals
from megacontext.evaluation.baselines import extras as extras_module
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.tasks.documents import QUESTION_TEMPLATE
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.planting import plant

RAW = ("window", "sink_window", "bm25", "own_keys", "infllm")
ENGINES = ("gists_only", "focus_only", "oracle", "megacontext", "megacontext.attention")


@contextmanager
def entries_read(base, monkeypatch):
    """Rows and gists of every context that the base reads inside, prompt included."""
    sizes: list[int] = []
    prefill, nll = base.prefill, base.nll

    def watched(context, *rest, **options):
        sizes.append(len(context))
        return prefill(context, *rest, **options)

    def watched_nll(context, targets):
        sizes.append(len(context) + len(targets))
        return nll(context, targets)

    with monkeypatch.context() as patched:
        patched.setattr(base, "prefill", watched)
        patched.setattr(base, "nll", watched_nll)
        yield sizes


def told(rival, answer, evidence):
    if isinstance(rival, Informed):
        rival.inform(answer, evidence)
    return rival


@pytest.mark.parametrize("name", RAW + ENGINES)
def test_a_rival_answers_and_predicts_within_the_budget(name, base, remember, habits, monkeypatch):
    memory = remember(base)
    (rival,) = rivals([name], base, memory, config=habits)
    assert rival.name == name
    told(rival, "iris", [(40, 44)])
    with entries_read(base, monkeypatch) as sizes:
        text = rival.answer("\nlotus? ", "lotus jade", max_new_tokens=8, stop="\0")
    assert text
    # Looking for keys or for what to focus on, a rival may read up to the budget before.
    assert sizes[-1] + 8 <= 192
    assert max(sizes) <= 192
    check_spans(rival.raw_spans, memory.n_tokens, 192 - 8 - 8)
    with entries_read(base, monkeypatch) as sizes:
        nll = rival.nll(500, memory.tokens(500, 520).long())
    assert nll.shape == (20,)
    assert bool((nll > 0).all())
    assert max(sizes) <= 192
    check_spans(rival.raw_spans, 500, 192 - 20)
    assert rival.raw_spans[-1][1] == 500, "the newest tokens are always raw"


def check_spans(spans, cursor, room):
    assert spans == sorted(spans)
    assert all(0 <= start < end <= cursor for start, end in spans)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    assert 0 < sum(end - start for start, end in spans) <= room


@pytest.mark.parametrize("name", RAW)
def test_a_raw_rival_spends_the_whole_budget_and_reads_what_it_says(name, base, remember, habits):
    memory = remember(base)
    (rival,) = rivals([name], base, memory, config=habits)
    pending = base.encode("\nlotus? ")
    reading = rival.context(memory.n_tokens, pending, 8, "lotus jade")
    # Blocks found may overlap the newest tokens, never by a whole block for each.
    assert 192 - 8 - 64 < reading.n_rows <= 192 - 8
    ids = torch.cat([memory.tokens(*span).long() for span in rival.raw_spans] + [pending])
    torch.testing.assert_close(reading.embeddings, base.embed(ids))
    assert reading.positions.tolist() == list(range(len(ids)))


@pytest.mark.parametrize("name", ["full", *RAW, *ENGINES])
def test_a_short_history_is_read_whole_and_answered_like_the_plain_model(
    name, base, remember, habits
):
    text = words(90)
    memory = remember(base, text)
    (rival,) = rivals([name], base, memory, config=habits)
    told(rival, "iris", [])
    prompt = "\nlotus? "
    answer = rival.answer(prompt, prompt, max_new_tokens=6, stop="\0")
    ids = base.encode(text + prompt)
    for _ in range(6):
        ids = torch.cat((ids, base.model(input_ids=ids[None]).logits[0, -1].argmax()[None]))
    if name in ENGINES and name != "gists_only":
        # A question of its own starts from gists; what it brings into detail is up to the policy.
        assert len(answer) == len(base.decode(ids[-6:]))
    else:
        assert answer == base.decode(ids[-6:])
        assert rival.raw_spans == [(0, 90)]
    (fresh,) = rivals([name], base, memory, config=habits)
    targets = base.encode(text)[70:80]
    logits = base.model(input_ids=base.encode(text)[None, :80]).logits[0, 69:79]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(fresh.nll(70, targets), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", RAW + ENGINES)
def test_a_memory_open_for_reading_is_enough_and_stays_as_it_is(name, base, remember, habits):
    memory = remember(base)
    with Memory.open(memory.path) as reader:
        (rival,) = rivals([name], base, reader, config=habits)
        first, second = (
            told(rival, "iris", []).answer("\nlotus? ", "lotus", max_new_tokens=4, stop="\0")
            for _ in range(2)
        )
    assert first == second
    assert memory.n_tokens == 900


@pytest.mark.parametrize("name", RAW + ENGINES)
def test_a_memory_may_grow_between_questions(name, base, remember, habits):
    memory = remember(base, words(300, seed=1))
    (old,) = rivals([name], base, memory, config=habits)
    told(old, "iris", []).answer("\nlotus? ", "lotus", max_new_tokens=4, stop="\0")
    Engine(base, memory, config=habits.engine).ingest(words(400, seed=2))
    (new,) = rivals([name], base, memory, config=habits)
    answers = [
        told(rival, "iris", []).answer("\nlotus? ", "lotus", max_new_tokens=4, stop="\0")
        for rival in (old, new)
    ]
    assert answers[0] == answers[1]
    assert old.raw_spans == new.raw_spans
    assert old.raw_spans[-1][1] == 700


def test_gists_through_the_kv_reader(base, remember, habits):
    gistnet = learned_gistnet(base)
    memory = remember(base, gistnet=gistnet)
    names = ["window", "gists_only", "focus_only", "megacontext"]
    losses = {
        rival.name: rival.nll(800, memory.tokens(800, 816).long())
        for rival in rivals(names, base, memory, gistnet, config=habits)
    }
    assert not torch.allclose(losses["gists_only"], losses["window"], atol=1e-3)
    assert not torch.allclose(losses["focus_only"], losses["megacontext"], atol=1e-3)
    with pytest.raises(MemoryMismatchError):
        rivals(["megacontext"], base, memory, config=habits)


def test_full_context_says_where_it_does_not_apply(base, remember, habits):
    memory = remember(base)
    (full,) = rivals(["full"], base, memory, config=habits)
    assert full.nll(200, memory.tokens(200, 220).long()).shape == (20,)
    assert full.raw_spans == [(0, 200)]
    with pytest.raises(InputError, match="not applicable: 900 tokens of history, and 240 of"):
        full.answer("\nlotus? ", "lotus", max_new_tokens=8)


def test_names_and_sizes_that_cannot_be_are_refused(base, remember, habits):
    memory = remember(base, words(64))
    with pytest.raises(ConfigError, match="unknown rival 'bm52'; known are full, window, sink"):
        rivals(["window", "bm52"], base, memory, config=habits)
    with pytest.raises(ConfigError, match="more than the 256 positions"):
        rivals(["window"], base, memory, config=RivalsConfig(engine=EngineConfig(budget=512)))
    with pytest.raises(ConfigError, match="needs a LensNet"):
        rivals(["megacontext.lens"], base, memory, config=habits)
    with pytest.raises(ConfigError, match="3 layers"):
        rivals(["own_keys"], base, memory, config=habits.model_copy(update={"key_layers": (3,)}))
    (oracle,) = rivals(["oracle"], base, memory, config=habits)
    with pytest.raises(InputError, match="inform"):
        oracle.answer("\nlotus? ", "lotus", max_new_tokens=2)
    for name in RAW:
        (rival,) = rivals([name], base, memory, config=habits)
        with pytest.raises(InputError, match="do not fit into 192"):
            rival.answer("x" * 190, "x", max_new_tokens=3)


def test_a_missing_extra_is_named(base, remember, habits, monkeypatch):
    def nothing_there(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras_module.importlib, "import_module", nothing_there)
    with pytest.raises(ConfigError, match=r"kvpress.*pip install 'megacontext\[kvpress\]'"):
        rivals(["kvpress.knorm"], base, remember(base, words(64)), config=habits)


def test_every_name_is_listed_once():
    assert len(set(RIVALS)) == len(RIVALS)
    assert {*RAW, *ENGINES, "full", "dense", "kvpress.snapkv"} <= set(RIVALS)


@pytest.fixture(scope="module")
def bundled():
    return BaseModel.from_pretrained("bundled:tiny")


def test_a_planted_fact_is_found_by_those_who_look(bundled, tmp_path):
    rng = random.Random("planted")
    book = read_book(DemoConfig(max_characters=14_000))
    text, facts = plant(book, FactThemes(rng, "held_out").plain(3), rng, last_share=0.5)
    config = RivalsConfig(engine=EngineConfig(budget=512, tail_tokens=128))
    names = ["window", "sink_window", "bm25", "own_keys", "focus_only", "oracle", "megacontext"]
    right = dict.fromkeys(names, 0)
    with Memory.create(tmp_path / "book.mctx", Engine.identity(bundled)) as memory:
        Engine(bundled, memory, config=config.engine).ingest(text)
        for rival in rivals(names, bundled, memory, config=config):
            for fact in facts:
                start = len(bundled.encode(text[: fact.character]))
                evidence = (start, start + len(bundled.encode(fact.statement)))
                answer = told(rival, fact.answer, [evidence]).answer(
                    QUESTION_TEMPLATE.format(question=fact.question),
                    fact.question,
                    max_new_tokens=12,
                )
                seen = any(a <= evidence[0] and evidence[1] <= b for a, b in rival.raw_spans)
                if rival.name != "own_keys":  # what it finds is up to the base model
                    assert seen == ("window" not in rival.name), (rival.name, rival.raw_spans)
                right[rival.name] += answer.strip() == fact.answer
    assert right["window"] == right["sink_window"] == 0
    assert right["own_keys"] >= 1
    assert min(right[name] for name in ("bm25", "focus_only", "oracle", "megacontext")) >= 2, right


def test_the_order_of_the_names_is_kept(habits, remember):
    base = tiny_base_model(max_positions=256)
    names = ["oracle", "window", "bm25"]
    assert [r.name for r in rivals(names, base, remember(base), config=habits)] == names
