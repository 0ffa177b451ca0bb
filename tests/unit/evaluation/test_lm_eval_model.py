"""MegaContext as the harness's model: tokens in, log-likelihoods and texts out, in order."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from engine_cases import words
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model

from megacontext.errors import ConfigError, InputError, ModelError
from megacontext.evaluation.lm_eval_model import MegaContextLM
from megacontext.tasks.documents import Question

SIZES = {"budget": 192, "tail_tokens": 32, "query_tokens": 24, "max_gen_toks": 12}
LONG = words(400) + "the zebra sleeps in the blue barn. " + words(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "llama", tiny_tokenizer())


def save(folder, tokenizer):
    tiny_model("llama", max_positions=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    lm = MegaContextLM(model=str(folder), **SIZES)
    yield lm
    lm.requests.close()


@pytest.fixture
def hooked(lm, monkeypatch):
    """What was handed to the cache, request by request."""
    partial: list[tuple[object, ...]] = []
    hook = SimpleNamespace(add_partial=lambda *seen: partial.append(seen))
    monkeypatch.setattr(lm, "cache_hook", hook)
    return partial


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(kind, {}, arguments, 0)


def plain_sum(lm, text: str, behind: str) -> float:
    """The plain model's log-likelihood of a text behind another."""
    ids = lm.base.encode(behind + text)
    with torch.no_grad():
        logits = lm.base.model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
    return float(logits.gather(1, ids[1:, None])[-len(lm.base.encode(text)) :].sum())


def test_the_harness_knows_the_model_by_name(folder):
    model = get_model("megacontext")
    assert model is MegaContextLM
    assert get_model("hf") is not model, "its own models are still there"
    made = model.create_from_arg_string(
        f"model={folder},budget=64,tail_tokens=16,strip_notes=true",
        {"batch_size": 1, "max_batch_size": None, "device": "cpu"},
    )
    assert (made.max_length, made.config.strip_notes, made.batch_size) == (64, True, 1)


def test_a_device_in_the_model_arguments_goes_before_the_harnesss(folder):
    made = MegaContextLM.create_from_arg_obj(
        {"model": str(folder), "budget": 64, "tail_tokens": 16, "device": "cpu"},
        {"device": "meta"},
    )
    assert str(made.device) == "cpu"


def test_short_requests_get_the_plain_models_likelihoods_in_order(lm, hooked):
    pairs = [("the cat sat", " on the mat"), ("one two", " three"), ("the cat sat", " down")]
    found = lm.loglikelihood([asked("loglikelihood", *pair) for pair in pairs])
    assert [likelihood for likelihood, _ in found] == pytest.approx(
        [plain_sum(lm, text, behind) for behind, text in pairs], abs=1e-3
    )
    assert hooked == [
        ("loglikelihood", pair, result) for pair, result in zip(pairs, found, strict=True)
    ]


def test_spaces_that_end_a_context_belong_to_the_continuation(lm):
    there, here = lm.loglikelihood(
        [asked("loglikelihood", "the cat ", "sat"), asked("loglikelihood", "the cat", " sat")]
    )
    assert there == here


@pytest.mark.parametrize("context", ["so: ", LONG])
def test_greedy_is_what_generate_writes(lm, context):
    ids = lm.tok_encode(context)
    written = lm.requests.write(torch.tensor(ids), max_new_tokens=6, do_sample=False)
    likeliest = [token.id for token in written]
    other = [*likeliest[:-1], (likeliest[-1] + 1) % 256]
    requests = [((context, ""), ids, tokens) for tokens in (likeliest, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests)] == [True, False]


def test_an_empty_context_is_the_tokenizers_first_token(lm):
    (found,) = lm.loglikelihood([asked("loglikelihood", "", "hello")])
    ids = torch.cat((torch.tensor([256]), lm.base.encode("hello")))
    expected = lm.requests.score(ids[:1], ids[1:])
    assert found[0] == pytest.approx(float(expected.log_probs.sum()))
    assert lm.loglikelihood([asked("loglikelihood", " ", "hello")])[0][0] == pytest.approx(
        float(lm.requests.score(ids[:1], lm.base.encode(" hello")).log_probs.sum())
    )


def test_rolling_scores_a_whole_text_of_any_length(lm, hooked):
    texts = ["hello there", LONG]
    found = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts])
    first = torch.tensor([256])
    for text, likelihood in zip(texts, found, strict=True):
        scored = lm.requests.score(first, lm.base.encode(text), rolling=True)
        assert len(scored.log_probs) == len(text)
        assert likelihood == pytest.approx(float(scored.log_probs.sum()), abs=1e-2)
    assert [entry[:2] for entry in hooked] == [("loglikelihood_rolling", (t,)) for t in texts]
    assert lm.get_model_info()["requests_beyond_budget"] >= 1


def test_answers_end_at_the_first_stop_text(lm, hooked):
    (whole,) = lm.generate_until([asked("generate_until", "so: ", {"until": ["\0"]})])
    assert len(lm.base.encode(whole)) >= 6, "long enough to be cut"
    late, early = whole[4], whole[2]
    settings = {"until": [late, early], "max_gen_toks": 12, "do_sample": False}
    (cut,) = lm.generate_until([asked("generate_until", "so: ", settings)])
    assert cut == whole[: min(whole.index(late), whole.index(early))]
    assert settings == {"until": [late, early], "max_gen_toks": 12, "do_sample": False}
    assert hooked[-1] == ("generate_until", ("so: ", settings), cut)
    (string,) = lm.generate_until([asked("generate_until", "so: ", {"until": early})])
    assert string == whole[: whole.index(early)]


@pytest.mark.parametrize("context", ["so: ", LONG])
def test_answers_are_as_long_as_asked(lm, context):
    for limit in (1, 5):
        tokens = [
            token.id
            for token in lm.requests.write(
                lm.base.encode(context), max_new_tokens=limit, look_again=".", do_sample=False
            )
        ]
        (text,) = lm.generate_until(
            [asked("generate_until", context, {"until": [], "max_new_tokens": limit})]
        )
        assert text == lm.base.decode(tokens)


def test_what_has_no_effect_in_a_greedy_search_is_left_out(lm):
    settings = {"until": [], "do_sample": False, "temperature": 0.0, "top_p": 0.9, "num_beams": 1}
    plain = {"until": [], "do_sample": False}
    assert lm.generate_until([asked("generate_until", "so", settings)]) == lm.generate_until(
        [asked("generate_until", "so", plain)]
    )
    with pytest.raises(ConfigError, match="num_beams"):
        lm.generate_until([asked("generate_until", "so", plain | {"num_beams": 4})])


def test_repeated_requests_are_sampled_anew(folder):
    sampled = {"until": [], "do_sample": True, "temperature": 2.0}

    def answers(seed: int) -> list[str]:
        lm = MegaContextLM(model=str(folder), seed=seed, **SIZES)
        return lm.generate_until([asked("generate_until", "so", sampled)] * 4)

    first = answers(0)
    assert len(set(first)) > 1
    assert answers(0) == first
    assert answers(7) != first


@pytest.mark.parametrize("strip", [False, True])
def test_notes_are_stripped_on_request_only(folder, monkeypatch, strip):
    lm = MegaContextLM(model=str(folder), strip_notes=strip, **SIZES)
    question = Question("What is the code?", "48213", 1, "code", notes=" lamp 48213")
    said = f" {question.written}"

    def write(*_args, **_options):
        for text in (said[:5], said[5:], "\nnever"):
            yield SimpleNamespace(text=text)

    monkeypatch.setattr(lm.requests, "write", write)
    (found,) = lm.generate_until([asked("generate_until", "code?", {"until": ["\n"]})])
    assert "lamp" in said
    assert found == ("48213" if strip else said)


def test_contexts_begin_with_the_first_token_on_request(folder, lm):
    plain = lm.tok_encode("hello")
    assert plain == lm.base.encode("hello").tolist()
    assert lm.tok_encode("hello", add_special_tokens=True) == [256, *plain]
    first = MegaContextLM(model=str(folder), add_bos_token=True, **SIZES)
    assert first.tok_encode("hello") == [256, *plain]
    assert first.tok_encode("<|begin|>hello") == [256, *plain], "never twice"
    assert first.tok_encode("hello", add_special_tokens=False) == plain
    # Of a pair, only the context begins with it.
    context, continuation = first._encode_pair("hello", " you")
    assert context == [256, *plain]
    assert continuation == lm.base.encode(" you").tolist()


def test_a_tokenizer_without_a_first_token_needs_one_named(tmp_path, folder):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    bare = save(tmp_path / "bare", tokenizer)
    lm = MegaContextLM(model=str(bare), **SIZES)
    assert lm.eot_token_id is None
    with pytest.raises(ModelError, match="prefix_token_id"):
        lm.loglikelihood_rolling([asked("loglikelihood_rolling", "hello")])
    assert lm.generate_until([asked("generate_until", "so", {"until": [], "max_gen_toks": 2})])
    named = MegaContextLM(model=str(bare), prefix_token_id=3, **SIZES)
    assert named.prefix_token_id == 3
    assert MegaContextLM(model=str(folder), **SIZES).prefix_token_id == 256


def test_chats_become_text_by_the_tokenizers_template(tmp_path, lm):
    history = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match="no chat template"):
        lm.apply_chat_template(history)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = MegaContextLM(model=str(save(tmp_path / "chatty", tokenizer)), **SIZES)
    assert chat.apply_chat_template(history) == "<user>Hi<assistant>"
    assert chat.chat_template(True) == tokenizer.chat_template
    assert "/" not in chat.tokenizer_name


def test_the_harnesss_cache_answers_the_second_time(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.ERROR, logger="lm_eval")
    requests = {
        "loglikelihood": [asked("loglikelihood", LONG, text) for text in (" amber", " birch")],
        "loglikelihood_rolling": [asked("loglikelihood_rolling", LONG[:300])],
        "generate_until": [asked("generate_until", "so", {"until": ["\n"]})],
    }
    lm = MegaContextLM(model=str(folder), **SIZES)
    caching = CachingLM(lm, str(tmp_path / "answers.db"))
    first = {kind: getattr(caching, kind)(asked_) for kind, asked_ in requests.items()}

    def fail(*_args, **_options):
        raise AssertionError("asked again")

    monkeypatch.setattr(lm.requests, "score", fail)
    monkeypatch.setattr(lm.requests, "write", fail)
    for kind, asked_ in requests.items():
        again = getattr(caching, kind)(asked_)
        assert [list(r) if isinstance(r, tuple) else r for r in again] == [
            list(r) if isinstance(r, tuple) else r for r in first[kind]
        ]
