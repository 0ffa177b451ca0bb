"""The engine over a random tiny model: ingest, stream, focus and decode."""

from __future__ import annotations

import pytest
import torch
from engine_cases import (
    K,
    check_window,
    config,
    contents,
    learned_gistnet,
    new_engine,
    words,
)
from tiny_models import tiny_base_model

from megacontext.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MemoryMismatchError,
    ReadOnlyMemoryError,
)
from megacontext.gistnet import GistNet
from megacontext.memory import Memory, Source
from megacontext.runtime.engine import Engine
from megacontext.runtime.focus_policies import AttentionPolicy, LexicalPolicy, RecencyPolicy
from megacontext.telemetry import MemorySink, Telemetry

SECRET = "the zebra sleeps in the blue barn. "


def told(engine):
    engine.ingest(words(400) + SECRET + words(600, seed=1))
    return engine


def answer(engine, prompt="where is the zebra? ", **options):
    return list(engine.generate(prompt, **{"max_new_tokens": 40, "eos_token_id": (), **options}))


def trace(engine):
    """Scores and edits of every refocus so far."""
    return [
        (r.round, r.cursor, r.proposals, r.edits, r.spans.tolist()) for r in engine.focus.records
    ]


# Ingest and stream


@pytest.mark.parametrize("kind", ["mean", "transformer"])
def test_contents_do_not_depend_on_how_the_text_came_in(base, kind, tmp_path):
    net = None if kind == "mean" else learned_gistnet(base)
    text = words(1500)
    whole = new_engine(tmp_path, base, gistnet=net)
    assert whole.ingest(text).end == 1500
    pieces = new_engine(tmp_path, base, gistnet=net, name="b")
    place = 0
    for length in (1, 30, 1, 33, 64, 500, 7, 395, 469):
        pieces.ingest(text[place : place + length])
        place += length
    assert place == 1500
    small_commits = new_engine(
        tmp_path, base, gistnet=net, name="c", config=config(chunk_tokens=96)
    )
    small_commits.ingest(text[i : i + 11] for i in range(0, 1500, 11))
    streamed = new_engine(tmp_path, base, gistnet=net, name="d")
    assert len(list(streamed.stream(text))) == 1500 // K
    assert contents(whole.memory)["search lotus north"][0]
    for other in (pieces, small_commits, streamed):
        assert contents(other.memory) == contents(whole.memory)
        assert other.context.cursor == 1500


def test_stream_yields_a_record_every_block(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest("start")
    records = list(engine.stream([words(333), words(500)], Source(uri="book")))
    assert [record.cursor for record in records] == list(range(K, 838 + 1, K))
    assert engine.context.cursor == engine.memory.n_tokens == 838
    for record in records:
        check_window(engine.context, [tuple(s) for s in record.spans.tolist()], record.cursor)
    (source,) = engine.memory.sources()
    assert (source.uri, source.start, source.end) == ("book", 5, 838)


def test_a_stream_that_is_left_early_leaves_a_whole_history(base, tmp_path):
    engine = new_engine(tmp_path, base)
    for record in engine.stream(words(3000)):
        if record.cursor >= 3 * K:
            break
    assert engine.context.cursor == engine.memory.n_tokens > 3 * K
    engine.context.check()


def test_progress_counts_every_token(base, tmp_path):
    engine = new_engine(tmp_path, base, config=config(chunk_tokens=64))
    steps = []
    taken = engine.ingest(words(200), progress=steps.append)
    assert (taken.start, taken.end, sum(steps), max(steps)) == (0, 200, 200, 64)


# Decode


def test_remembering_or_not(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    before = engine.memory.n_tokens
    unremembered = answer(engine, remember=False)
    assert engine.memory.n_tokens == engine.context.cursor == before
    tokens = answer(engine, remember=True)
    prompt = base.encode("where is the zebra? ").tolist()
    held = engine.memory.tokens(before).tolist()
    assert held == prompt + [token.id for token in tokens]
    assert engine.context.cursor == engine.memory.n_tokens
    first = before + len(prompt)
    for run in (tokens, unremembered):
        assert [token.index for token in run] == list(range(first, first + 40))


def test_what_was_heard_is_remembered(base, tmp_path):
    """A caller that stops listening leaves no half-remembered answer."""
    engine = told(new_engine(tmp_path, base))
    before = engine.memory.n_tokens
    heard = []
    for token in engine.generate("so? ", eos_token_id=()):
        heard.append(token.id)
        if len(heard) == 5:
            break
    assert engine.memory.tokens(before).tolist()[: 4 + 5] == base.encode("so? ").tolist() + heard
    assert engine.context.cursor == engine.memory.n_tokens


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("policy", [LexicalPolicy, AttentionPolicy, RecencyPolicy])
def test_the_budget_holds_at_every_token(base, remember, policy, tmp_path):
    engine = told(new_engine(tmp_path, base, policy=policy(), config=config(budget=200)))
    rounds = {record.round: record for record in engine.focus.records}
    tokens = answer(engine, remember=remember, max_new_tokens=70)
    rounds |= {record.round: record for record in engine.focus.records}
    assert len(tokens) == 70
    assert len({token.round for token in tokens}) == 3, "a refocus every K tokens"
    for token in tokens:
        record = rounds[token.round]
        assert record.cost + token.index + 1 - record.cursor <= 200
        check_window(engine.context, [tuple(s) for s in record.spans.tolist()], record.cursor)


def test_a_window_at_the_bases_last_position(tmp_path):
    """Budget and positions are the same number here: nothing may read beyond it."""
    for positions in ("packed", "timeline"):
        for policy in (AttentionPolicy(), LexicalPolicy()):
            base = tiny_base_model("gpt2")  # its table of positions ends: one more would fail
            engine = new_engine(
                tmp_path,
                base,
                name=f"{positions}-{policy.name}",
                policy=policy,
                config=config(budget=128, tail_tokens=16, positions=positions),
            )
            engine.ingest(words(128))
            assert engine.context.cost == 128
            assert len(answer(engine, "and so? ", remember=False, max_new_tokens=34)) == 34


def test_a_planted_sentence_is_brought_back_raw(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    first, last = 400 // K, (400 + len(SECRET) - 1) // K
    engine.refocus("where does the zebra sleep")
    raw = {start // K for level, start, _ in engine.context.spans().tolist() if level == 0}
    assert {first, last} & raw
    record = engine.focus.records[-1]
    assert {block for block, _ in record.proposals} & {first, last}
    assert any(edit.kind == "expand" and edit.reason == "proposal" for edit in record.edits)


@pytest.mark.parametrize("remember", [True, False])
def test_the_whole_prompt_asks_and_nothing_else(base, remember, tmp_path):
    """Remembered or not, the query is prompt and answer, not the history that precedes them."""
    engine = told(new_engine(tmp_path, base))
    queries = []

    class Listening(LexicalPolicy):
        def score(self, view):
            queries.append(view.base.decode(view.query))
            return super().score(view)

    engine.focus.policy = Listening()
    tokens = answer(engine, "zebra? ", remember=remember, max_new_tokens=33)
    assert queries[0] == "zebra? "
    said = base.encode("zebra? ").tolist() + [token.id for token in tokens]
    assert queries[-1] == base.decode(said[:-1][-32:])


def test_stop_text(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    sampling = {"do_sample": True, "top_k": 4, "repetition_penalty": 2.0}
    for seed in range(20):
        sampling["seed"] = seed
        whole = answer(engine, remember=False, **sampling)
        text = "".join(token.text for token in whole)
        places = [
            i
            for i in range(5, len(text) - 3)
            if text[i - 1 : i + 3].isascii() and text.index(text[i : i + 3]) == i
        ]
        if places:
            break
    stop, before = text[places[0] : places[0] + 3], text[: places[0]]
    options = {"stop": stop, "eos_token_id": (), **sampling}
    assert engine.ask("where is the zebra? ", **options) == before
    start = engine.memory.n_tokens
    tokens = answer(engine, **options)
    assert "".join(token.text for token in tokens) == before
    assert [token.id for token in tokens] == [token.id for token in whole[: len(tokens)]]
    # Not even its beginning gets into the memory.
    assert base.decode(engine.memory.tokens(start)) == "where is the zebra? " + before


def test_the_models_own_end(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    whole = answer(engine, remember=False)
    end = whole[10].id
    place = [token.id for token in whole].index(end)
    ended = answer(engine, eos_token_id=[end], remember=False)
    assert [token.id for token in ended] == [token.id for token in whole[:place]]


def test_texts_join_to_the_text_of_the_tokens(base, tmp_path):
    """Random bytes: whole characters, split ones and invalid ones."""
    engine = told(new_engine(tmp_path, base))
    for seed in range(2):
        options = {"do_sample": True, "temperature": 5.0, "seed": seed, "remember": False}
        tokens = answer(engine, **options)
        ids = [token.id for token in tokens]
        assert "".join(token.text for token in tokens) == base.decode(ids)


def test_the_repetition_penalty_counts_prompt_and_answer(base, tmp_path):
    """The same whether they are remembered or not."""
    engine = told(new_engine(tmp_path, base))
    plain, *penalised = (
        [token.id for token in answer(engine, max_new_tokens=32, **options)]
        for options in (
            {"remember": False},
            {"remember": False, "repetition_penalty": 3.0},
            {"remember": True, "repetition_penalty": 3.0},
        )
    )
    assert penalised[0] == penalised[1] != plain


@pytest.mark.parametrize("sampled", [False, True])
def test_same_seed_same_everything(base, sampled, tmp_path):
    runs = []
    options = {"do_sample": True, "temperature": 2.0} if sampled else {}
    for name in "abc":
        engine = new_engine(tmp_path, base, name=name)
        list(engine.stream(words(300) + SECRET + words(400)))
        ids = [token.id for token in answer(engine, seed=7 + (name == "c"), **options)]
        runs.append((ids, trace(engine), contents(engine.memory)))
    assert runs[0] == runs[1]
    assert (runs[0][0] != runs[2][0]) == sampled


def test_explain_names_the_record_in_force(base, tmp_path):
    engine = told(new_engine(tmp_path, base, config=config(keep_records=3)))
    seen = {}
    for token in engine.generate("where? ", max_new_tokens=40, eos_token_id=()):
        seen[token.index] = engine.focus.records[-1]
        if token.index == max(seen):
            assert engine.explain(token.index).token == token
    last = max(seen)
    assert engine.explain(last).record is seen[last]
    assert engine.explain(last).record.round == engine.state().rounds
    with pytest.raises(InputError, match="not decoded in this session"):
        engine.explain(3)
    for _ in range(3):
        engine.refocus("zebra")
    with pytest.raises(InputError, match="raise keep_records"):
        engine.explain(last)


def test_state(base, tmp_path):
    engine = new_engine(tmp_path, base)
    state = engine.state()
    assert (state.cursor, state.cost, state.entries, state.rounds) == (0, 0, {}, 0)
    told(engine)
    engine.refocus()
    state = engine.state()
    assert state.cursor == engine.memory.n_tokens
    assert 0 < state.cost <= state.budget == 192
    assert sum(state.entries.values()) == len(engine.context)
    assert (state.rounds, state.policy) == (1, "lexical")
    assert 0 < state.utilization <= 1


def test_a_memory_goes_on_where_it_was_left(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    engine.memory.close()
    reopened = [Engine(base, Memory.open(tmp_path / "a.mctx"), config=config()) for _ in range(2)]
    first, second = ([token.id for token in answer(again, remember=False)] for again in reopened)
    fresh = told(new_engine(tmp_path, base, name="b"))
    assert first == second == [token.id for token in answer(fresh, remember=False)]
    with Memory.open(tmp_path / "a.mctx", "a") as memory:
        again = Engine(base, memory, config=config())
        again.ingest(words(100))
        fresh.ingest(words(100))
        assert contents(memory) == contents(fresh.memory)


def test_a_reader_sees_what_a_writer_commits(base, tmp_path):
    writer = told(new_engine(tmp_path, base))
    reader = Engine(base, Memory.open(tmp_path / "a.mctx"), config=config())
    writer.ingest(words(100))
    assert reader.memory.refresh()
    token = next(iter(reader.generate("so? ", remember=False)))
    assert token.index == writer.memory.n_tokens + 4


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
@pytest.mark.parametrize(("reader", "slots"), [("embedding", 1), ("kv", 1), ("kv", 3)])
def test_learned_gists_end_to_end(architecture, reader, slots, tmp_path):
    base = tiny_base_model(architecture, max_positions=256)
    net = learned_gistnet(base, reader=reader, slots=slots)
    for policy in (LexicalPolicy(), AttentionPolicy()):
        engine = new_engine(
            tmp_path, base, name=policy.name, gistnet=net, policy=policy, config=config(budget=224)
        )
        told(engine)
        tokens = answer(engine, max_new_tokens=40)
        assert len(tokens) == 40
        spans = engine.context.spans().tolist()
        gists = sum(level > 0 for level, _, _ in spans)
        raw = sum(end - start for level, start, end in spans if level == 0)
        assert gists > 3
        assert engine.context.cost == raw + slots * gists
        check_window(engine.context, [tuple(span) for span in spans], engine.memory.n_tokens)
        reading = engine.reader.read(engine.context, torch.empty(0, dtype=torch.int64))
        assert len(reading) == engine.context.cost
        assert reading.n_gists == (slots * gists if reader == "kv" else 0)


def test_gists_change_what_the_model_says(tmp_path):
    base = tiny_base_model(max_positions=256)
    logits = []
    for seed in (1, 2):
        net = learned_gistnet(base, seed=seed)
        engine = told(new_engine(tmp_path, base, name=f"{seed}", gistnet=net))
        reading = engine.reader.read(engine.context, torch.empty(0, dtype=torch.int64))
        logits.append(base.prefill(reading, keep=1).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_decode_event(base, tmp_path):
    for remember in (True, False):
        sink = MemorySink()
        engine = new_engine(tmp_path, base, name=f"{remember}", telemetry=Telemetry(sink))
        told(engine)
        start = engine.memory.n_tokens
        tokens = answer(engine, "so? ", remember=remember)
        (event,) = [event for event in sink.events if event.kind == "decode"]
        assert (event.start, event.tokens) == (start + 4, len(tokens))
        refocuses = [event for event in sink.events if event.kind == "refocus"]
        assert all(event.cost <= event.budget for event in refocuses)


def test_an_answer_that_is_not_remembered_leaves_the_focus_as_it_was(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    engine.refocus("amber")
    before, state = engine.context.spans().tolist(), engine.state()
    answer(engine, remember=False)
    assert engine.context.spans().tolist() == before
    assert engine.state().rounds > state.rounds, "its records stay apart"
    unheard = engine.generate("so? ", remember=False, eos_token_id=())
    next(unheard)
    engine.ingest(words(40))
    unheard.close()
    assert engine.context.cursor == engine.memory.n_tokens


def test_a_query_of_its_own(base, tmp_path):
    """What to look for need not be what is asked."""
    engine = told(new_engine(tmp_path, base))
    answer(engine, "amber birch? ", query="zebra barn", remember=False)
    blocks = {block for block, _ in engine.focus.records[-1].proposals}
    raw = {start // K for level, start, _ in engine.focus.records[-1].spans.tolist() if level == 0}
    planted = {400 // K, (400 + len(SECRET) - 1) // K}
    assert planted & (blocks | raw)
    # The old context again, so that only the prompt asks.
    answer(engine, "jade? ", remember=False)
    assert planted - {block for block, _ in engine.focus.records[-1].proposals}


# Errors


def test_nothing_to_continue(base, tmp_path):
    engine = new_engine(tmp_path, base)
    with pytest.raises(InputError, match="nothing to continue"):
        answer(engine, "")
    assert len(answer(engine, "hello ", remember=False)) == 40
    with pytest.raises(InputError, match="max_new_tokens"):
        answer(engine, max_new_tokens=0)


def test_a_prompt_too_long_can_be_remembered(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    before = engine.memory.n_tokens
    with pytest.raises(InputError, match="remember=True"):
        answer(engine, words(100), remember=False)
    assert engine.memory.n_tokens == before
    assert len(answer(engine, words(100), remember=True)) == 40


def test_an_answer_that_outgrows_the_budget_says_so(base, tmp_path):
    engine = told(new_engine(tmp_path, base))
    heard = []
    with pytest.raises(InputError, match="prompt and answer"):
        heard.extend(token.id for token in engine.generate("so? ", remember=False, eos_token_id=()))
    assert engine.context.cursor == engine.memory.n_tokens


def test_foreign_memories_are_refused(base, tmp_path):
    told(new_engine(tmp_path, base)).memory.close()
    memory = Memory.open(tmp_path / "a.mctx")
    with pytest.raises(MemoryMismatchError, match="megacontext regist"):
        Engine(base, memory, gistnet=learned_gistnet(base), config=config())
    with pytest.raises(MemoryMismatchError, match="base_model"):
        Engine(tiny_base_model("llama"), memory, config=config())


def test_a_gistnet_for_another_base_is_refused(base, tmp_path):
    memory = Memory.create(tmp_path / "a.mctx", Engine.identity(base))
    with pytest.raises(CheckpointError, match="tiny-qwen3"):
        Engine(base, memory, gistnet=GistNet.untrained(16), config=config())
    other = learned_gistnet(tiny_base_model("llama"))
    with pytest.raises(CheckpointError, match="head_dim"):
        Engine(base, memory, gistnet=other, config=config())


def test_a_memory_open_for_reading_cannot_remember(base, tmp_path):
    told(new_engine(tmp_path, base)).memory.close()
    engine = Engine(base, Memory.open(tmp_path / "a.mctx"), config=config())
    for prompt in ("", "so? "):
        with pytest.raises(ReadOnlyMemoryError, match="remember=False"):
            answer(engine, prompt, remember=True)
    with pytest.raises(ReadOnlyMemoryError):
        engine.ingest("more")
    assert engine.ask("so? ", max_new_tokens=3, eos_token_id=()) is not None


def test_budgets_that_cannot_work(base, tmp_path):
    told(new_engine(tmp_path, base)).memory.close()
    memory = Memory.open(tmp_path / "a.mctx")
    with pytest.raises(ConfigError, match="coarsest"):
        Engine(base, memory, config=config(budget=64))
    with pytest.raises(ConfigError, match="positions"):
        Engine(base, memory, config=config(budget=257))
    grown = new_engine(tmp_path, base, name="b", config=config(budget=64))
    with pytest.raises(ConfigError, match="raise budget or lower tail_tokens"):
        grown.ingest(words(2000))
    assert grown.memory.n_tokens == 2000, "what was committed stands"


def test_the_kv_reader_needs_a_tail(base, tmp_path):
    with pytest.raises(ConfigError, match="tail_tokens"):
        new_engine(tmp_path, base, gistnet=learned_gistnet(base), config=config(tail_tokens=0))
    engine = new_engine(tmp_path, base, name="b", config=config(tail_tokens=0))
    engine.ingest(words(320))
    assert len(answer(engine, "", remember=False)) == 40


def test_the_base_stays_frozen(tmp_path):
    base = tiny_base_model(max_positions=256)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    answer(told(new_engine(tmp_path, base, policy=AttentionPolicy())))
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module._forward_hooks for module in base.model.modules())
