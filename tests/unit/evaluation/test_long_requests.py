"""Contexts of any length: the plain model where they fit, the engine's own contexts where not."""

from __future__ import annotations

import tempfile
from contextlib import closing

import pytest
import torch
from engine_cases import words
from tiny_models import tiny_model, tiny_tokenizer

from megacontext.errors import ConfigError, InputError
from megacontext.evaluation.long_requests import LongRequests
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.session import Session, SessionConfig

BUDGET = 192
FACT = "the zebra sleeps in the blue barn. "
NOTHING = torch.empty(0, dtype=torch.int64)
GREEDY = {"do_sample": False, "eos_token_id": ()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    tiny_model("qwen3", max_positions=256).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def session(model):
    # Exact, since tests count the rows that are read at once.
    engine = EngineConfig(budget=BUDGET, tail_tokens=32, query_tokens=24, kv="exact")
    with Session(SessionConfig(model=str(model), engine=engine)) as session:
        yield session


@pytest.fixture
def requests(session):
    with LongRequests(session, stride=32) as requests:
        yield requests


def plain_log_probs(base, ids, n_targets):
    """The model's own, without MegaContext."""
    with torch.no_grad():
        logits = base.model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
    return logits.gather(1, ids[1:, None])[-n_targets:, 0]


def rows_read(base, monkeypatch):
    """Grows by the rows of every context that the base reads."""
    seen: list[int] = []
    prefill = base.prefill

    def count(context, *rest, **options):
        seen.append(context.n_rows)
        return prefill(context, *rest, **options)

    monkeypatch.setattr(base, "prefill", count)
    return seen


@pytest.mark.parametrize(("n", "h"), [(1, 1), (1, 191), (40, 20), (191, 1)])
def test_what_fits_is_scored_as_the_plain_model_scores_it(session, requests, n, h):
    ids = session.base.encode(words(n + h))
    scored = requests.score(ids[:n], ids[n:])
    expected = plain_log_probs(session.base, ids, h)
    torch.testing.assert_close(scored.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert requests.beyond_window == 0


def test_greedy_tells_whether_every_token_is_the_likeliest(session, requests):
    context = session.base.encode(words(30))
    with torch.no_grad():
        likeliest = session.base.model.generate(
            context[None], max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0, 30:]
    assert requests.score(context, likeliest).greedy
    for place in (0, 7):
        other = likeliest.clone()
        other[place] = (other[place] + 1) % 256
        assert not requests.score(context, other).greedy


def test_nothing_is_certain(session, requests):
    scored = requests.score(session.base.encode("a"), NOTHING)
    assert scored.greedy
    assert scored.log_probs.shape == (0,)


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize(("n", "h"), [(700, 20), (193, 32), (300, 80), (160, 60), (1, 400)])
def test_what_does_not_fit_is_scored_from_the_engines_contexts(
    session, requests, n, h, rolling, tmp_path, monkeypatch
):
    text = words(200) + FACT + words(n + h)
    ids = session.base.encode(text)[: n + h]
    seen = rows_read(session.base, monkeypatch)
    scored = requests.score(ids[:n], ids[n:], rolling=rolling)
    assert requests.beyond_window == 1
    assert max(seen) <= BUDGET
    # The same by hand, with an engine of its own and the base's teacher-forced likelihoods.
    done = max(n, min(BUDGET, n + h))
    parts = [plain_log_probs(session.base, ids[:done], done - n)] if done > n else []
    engine = session.create(tmp_path / "byhand.mctx")
    rounds, stored = 4, 0
    with engine.memory:
        while done < n + h:
            engine.ingestor.append(ids[stored:done])
            engine.focus.advance(done)
            asked = None if rolling else ids[max(0, n - 24) : done]
            for _ in range(rounds):
                plan = engine.focus.refocus(NOTHING, query=asked)
                if not plan.more:
                    break
            targets = ids[done : done + 32]
            reading = engine.reader.read(engine.context, NOTHING)
            parts.append(-session.base.nll(reading, targets))
            rounds, stored = 1, done
            done += len(targets)
    torch.testing.assert_close(scored.log_probs, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_the_focus_finds_what_the_end_of_the_context_asks_for(session, requests):
    context = session.base.encode(words(300) + FACT + words(500) + "where does the zebra sleep?")
    requests.score(context, session.base.encode(" barn"))
    held = requests._held
    assert held is not None
    window = held.engine.context
    where = len(words(300)) + FACT.index("blue")
    assert window.levels[window.indices_of(torch.tensor([where]))].tolist() == [0]
    assert window.levels.max() > 0, "the rest is gists"


def test_a_score_depends_on_its_request_alone(session, monkeypatch):
    ids = session.base.encode(words(400) + FACT + words(200))
    other = session.base.encode(words(500, seed=1))
    targets = [session.base.encode(text) for text in ("barn", "blue b", words(70, seed=2))]
    alone = []
    for target in targets:
        with LongRequests(session) as fresh:
            alone.append(fresh.score(ids, target).log_probs)
    with LongRequests(session) as requests:
        made = []
        create = session.create
        monkeypatch.setattr(session, "create", lambda path: made.append(path) or create(path))
        for order in ([0, 1, 2], [2, 1, 0]):
            for index in order:
                found = requests.score(ids, targets[index]).log_probs
                torch.testing.assert_close(found, alone[index], rtol=0, atol=0)
        assert len(made) == 3, "one memory for a context until more goes into it"
        requests.score(other, targets[0])
        again = requests.score(ids, targets[0]).log_probs
        torch.testing.assert_close(again, alone[0], rtol=0, atol=0)


def test_a_long_text_is_scored_token_by_token_once(session, requests):
    ids = session.base.encode(words(333))
    scored = requests.score(ids[:1], ids[1:])
    assert scored.log_probs.shape == (332,)
    window = plain_log_probs(session.base, ids[:BUDGET], BUDGET - 1)
    torch.testing.assert_close(scored.log_probs[: BUDGET - 1], window, rtol=1e-4, atol=1e-4)
    assert bool((scored.log_probs < 0).all())


def test_a_shorter_stride_moves_the_focus_more_often(session, monkeypatch):
    ids = session.base.encode(words(300))
    counts = {}
    for stride in (8, 32):
        with LongRequests(session, stride=stride) as requests:
            seen = rows_read(session.base, monkeypatch)
            assert len(requests.score(ids[:1], ids[1:]).log_probs) == 299
            counts[stride] = len(seen)
            assert max(seen) <= BUDGET
    # One window of 192 tokens, then 108 more.
    assert counts == {8: 1 + 14, 32: 1 + 4}


def test_what_fits_is_continued_as_the_plain_model_does(session, requests):
    context = session.base.encode(words(40))
    with torch.no_grad():
        expected = session.base.model.generate(
            context[None], max_new_tokens=50, do_sample=False, eos_token_id=None
        )[0, 40:]
    written = [token.id for token in requests.write(context, max_new_tokens=50, **GREEDY)]
    assert written == expected.tolist()
    assert requests.beyond_window == 0


@pytest.mark.parametrize("n", [150, 192, 700])
def test_what_does_not_fit_is_continued_by_the_engine(session, requests, n, tmp_path, monkeypatch):
    context = session.base.encode(words(n))
    seen = rows_read(session.base, monkeypatch)
    written = list(requests.write(context, max_new_tokens=70, **GREEDY))
    assert max(seen) <= BUDGET
    assert requests.beyond_window == 1
    engine = session.create(tmp_path / "byhand.mctx")
    with engine.memory:
        expected = list(
            engine.generate(words(n), query=words(n)[-24:], max_new_tokens=70, **GREEDY)
        )
    assert [token.id for token in written] == [token.id for token in expected]
    assert len(written) == 70


def test_an_answer_is_likeliest_by_its_own_scores(session, requests):
    """Scoring moves the focus where writing does."""
    context = session.base.encode(words(500) + FACT + words(300))
    written = [token.id for token in requests.write(context, max_new_tokens=40, **GREEDY)]
    assert requests.score(context, torch.tensor(written)).greedy


def test_no_folder_is_left_behind(session, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = session.base.encode(words(300))
    with LongRequests(session) as requests:
        assert not list(tmp_path.iterdir())
        requests.score(context, context[:40])
        with closing(requests.write(context, max_new_tokens=40, **GREEDY)) as tokens:
            next(tokens)
            assert len(list(tmp_path.iterdir())) == 2
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_asked_is_refused(session, requests, model):
    ids = session.base.encode("abc")
    with pytest.raises(InputError, match="no token to predict from"):
        requests.score(NOTHING, ids)
    with pytest.raises(InputError, match="nothing to continue"):
        next(requests.write(NOTHING, max_new_tokens=1))
    with pytest.raises(ConfigError, match="bogus"):
        next(requests.write(ids, max_new_tokens=1, bogus=1))
    with pytest.raises(InputError, match="stride is 0"):
        LongRequests(session, stride=0)
    with (
        Session(SessionConfig(model=str(model), engine=EngineConfig(budget=512))) as large,
        pytest.raises(ConfigError, match="budget 512 is more than the 256 positions"),
    ):
        LongRequests(large)
