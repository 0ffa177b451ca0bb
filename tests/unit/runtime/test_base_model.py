import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_base_model, tiny_model, tiny_tokenizer

from megacontext.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ModelError,
    ModelNotFoundError,
)
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.kv_cache import crop
from megacontext.runtime.teacher_forcing import target_logits


@pytest.fixture(scope="module")
def base():
    return tiny_base_model()


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model")


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


class TestLoading:
    def test_a_saved_model_comes_back(self, folder):
        base = BaseModel.from_pretrained(folder)
        other = tiny_base_model()
        assert base.name == str(folder)
        assert (base.dtype, base.device) == (torch.float32, torch.device("cpu"))
        assert base.tokenizer_hash == other.tokenizer_hash
        ids = base.encode("frozen")
        assert torch.equal(base.features(ids), other.features(ids))

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_dtype_by_name_and_by_itself(self, folder, dtype):
        assert BaseModel.from_pretrained(folder, dtype=dtype).dtype == torch.bfloat16

    def test_auto_dtype_is_that_of_the_checkpoint(self, tmp_path):
        tiny_model("llama", dtype=torch.float16).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        assert BaseModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16

    def test_unknown_hub_id_without_network(self, monkeypatch):
        # The hub client reads the variable at import only.
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelNotFoundError) as error:
            BaseModel.from_pretrained("nobody/no-such-model")
        one_line(error, "nobody/no-such-model", "HF_HOME", "HF_HUB_OFFLINE", "local folder")

    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", Path("nowhere")])
    def test_unknown_folder(self, name):
        with pytest.raises(ModelNotFoundError) as error:
            BaseModel.from_pretrained(name)
        one_line(error, "no such folder")

    def test_folder_without_config(self, tmp_path):
        with pytest.raises(ModelNotFoundError) as error:
            BaseModel.from_pretrained(tmp_path)
        one_line(error, str(tmp_path), "config.json")

    def test_unknown_bundled_model(self):
        with pytest.raises(ModelNotFoundError) as error:
            BaseModel.from_pretrained("bundled:no-such")
        one_line(error, "bundled:no-such", "bundled are:")

    @pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
    def test_broken_weights(self, folder, damage):
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        damaged = {"cut": content[: len(content) // 2], "noise": b"\xff" * 400, "empty": b""}
        weights.write_bytes(damaged[damage])
        with pytest.raises(CheckpointError) as error:
            BaseModel.from_pretrained(folder)
        one_line(error, str(folder))

    def test_missing_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError) as error:
            BaseModel.from_pretrained(folder)
        one_line(error, str(folder))

    def test_incomplete_weights(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as error:
            BaseModel.from_pretrained(folder)
        one_line(error, "lack 1 tensors", "layers.1.mlp.up_proj")

    def test_weights_of_another_shape(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["intermediate_size"] = 40
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError) as error:
            BaseModel.from_pretrained(folder)
        one_line(error, str(folder))

    @pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-type"}', "{}", "[]"])
    def test_useless_config(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError) as error:
            BaseModel.from_pretrained(folder)
        one_line(error, str(folder))

    def test_missing_tokenizer(self, folder):
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ModelError) as error:
            BaseModel.from_pretrained(folder)
        one_line(error, "tokenizer", str(folder))

    @pytest.mark.parametrize(
        "option", [{"dtype": "float33"}, {"dtype": torch.int64}, {"device": "abacus"}], ids=str
    )
    def test_impossible_options(self, folder, option):
        with pytest.raises(ConfigError) as error:
            BaseModel.from_pretrained(folder, **option)
        one_line(error, str(next(iter(option.values()))))

    def test_attention_without_masks_is_refused(self):
        model = tiny_model("llama")
        model.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
            BaseModel(model, tiny_tokenizer(), "fast")


class TestText:
    @given(st.text())
    @settings(max_examples=100, deadline=None)
    def test_any_text_survives(self, base, text):
        assert base.decode(base.encode(text)) == text

    def test_nothing_and_nul(self, base):
        assert base.encode("").shape == (0,)
        assert base.encode("").dtype == torch.int64
        assert base.decode(base.encode("a\0b")) == "a\0b"

    def test_surrogates(self, base):
        assert base.decode(base.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
        assert base.decode(base.encode("\ud83d\ude00")) == "\U0001f600"

    def test_no_special_tokens_are_added(self, base):
        assert base.encode("ab").shape == (2,)

    def test_token_texts(self, base):
        assert base.token_texts(base.encode("Hi!")) == ["H", "i", "!"]
        assert base.token_texts(base.encode("é")) == ["\ufffd", "\ufffd"]
        assert base.token_texts([base.tokenizer.eos_token_id]) == ["<|end|>"]

    def test_the_hash_sees_the_vocabulary_and_not_the_last_call(self, base):
        tokenizer = tiny_tokenizer()
        same = BaseModel(base.model, tokenizer, "same")
        tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
        assert same.tokenizer_hash == base.tokenizer_hash
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["new"])
        assert BaseModel(base.model, tokenizer, "other").tokenizer_hash != base.tokenizer_hash
        assert len(base.tokenizer_hash) == 16
        assert int(base.tokenizer_hash, 16) >= 0


class TestInputs:
    def test_ids_of_another_vocabulary(self, base):
        for ids in (torch.tensor([258]), torch.tensor([-1])):
            with pytest.raises(InputError, match="0…257"):
                base.embed(ids)

    def test_embeddings_of_another_model(self, base):
        with pytest.raises(InputError, match="7 wide"):
            base.prefill(ContextInput(torch.zeros(2, 7), torch.arange(2)))

    def test_gists_of_another_model(self, base):
        gists = torch.zeros(base.n_layers + 1, 1, base.n_kv_heads, base.head_dim)
        context = ContextInput(
            base.embed(torch.tensor([1])), torch.tensor([1]), gists, gists, torch.tensor([0])
        )
        with pytest.raises(InputError, match="another base model"):
            base.prefill(context)

    def test_nothing_to_read(self, base):
        empty = ContextInput(torch.zeros(0, base.d_model), torch.arange(0))
        with pytest.raises(InputError):
            base.prefill(empty)
        with pytest.raises(InputError, match="predicts nothing"):
            base.nll(empty, torch.tensor([1]))

    def test_a_cache_of_another_context(self, base):
        context = ContextInput(base.embed(torch.arange(4)), torch.arange(4))
        cache = base.prefill(context).cache
        with pytest.raises(InputError, match="resume"):
            base.prefill(context, cache)

    def test_targets_that_do_not_fit(self, base):
        context = ContextInput(base.embed(torch.arange(4)), torch.arange(4))
        with pytest.raises(InputError, match="need targets"):
            base.nll_batch([context, context], torch.ones(1, 2, dtype=torch.int64))
        with pytest.raises(InputError, match="need targets"):
            base.nll_batch([], torch.ones(0, 2, dtype=torch.int64))
        with pytest.raises(InputError, match="target positions"):
            base.nll(context, torch.tensor([1, 2]), torch.tensor([4]))

    @pytest.mark.parametrize("query_rows", [0, 5])
    def test_more_asking_rows_than_there_are(self, base, query_rows):
        context = ContextInput(base.embed(torch.arange(4)), torch.arange(4))
        with pytest.raises(InputError, match="query_rows"):
            base.attention_to(context, query_rows)

    def test_a_failed_step_leaves_the_cache_as_it_was(self, base):
        cache = base.prefill(ContextInput(base.embed(torch.arange(4)), torch.arange(4))).cache
        with pytest.raises(InputError):
            base.step(torch.tensor([999]), torch.tensor([4]), cache)
        assert cache.n_rows == 4


class TestReading:
    def test_gaps_in_positions_are_read_as_such(self, base):
        ids = torch.arange(8)
        gaps = torch.tensor([0, 1, 2, 10, 11, 30, 31, 32])
        with torch.no_grad():
            expected = base.model(
                input_ids=ids[None],
                position_ids=gaps[None],
                # Without it, transformers takes gaps for borders between packed sequences.
                attention_mask=torch.ones(1, 8, dtype=torch.int64),
            ).logits[0]
        context = ContextInput(base.embed(ids), gaps)
        assert (base.prefill(context).logits - expected).abs().max() < 1e-4
        nll = base.nll(ContextInput(base.embed(ids[:5]), gaps[:5]), ids[5:], gaps[5:])
        by_hand = torch.nn.functional.cross_entropy(expected[4:7], ids[5:], reduction="none")
        assert (nll - by_hand).abs().max() < 1e-4

    @pytest.mark.parametrize("name", ["mixtral-sliding", "gemma3"])
    def test_sliding_windows_are_measured_in_positions(self, name):
        base = tiny_base_model(name)
        ids = torch.arange(8)
        far = torch.tensor([0, 1, 2, 3, 20, 21, 22, 23])
        alone = base.prefill(ContextInput(base.embed(ids[4:]), far[4:])).logits
        both = base.prefill(ContextInput(base.embed(ids), far)).logits[4:]
        out_of_sight = bool((both - alone).abs().max() < 1e-4)
        assert out_of_sight == ("full" not in base.architecture.layer_kinds)

    def test_inputs_of_another_dtype(self, base):
        ids = torch.arange(6)
        context = ContextInput(base.embed(ids).double(), torch.arange(6))
        expected = base.prefill(ContextInput(base.embed(ids), torch.arange(6))).logits
        assert torch.equal(base.prefill(context).logits, expected)

    def test_results_can_be_used_in_training(self, base):
        ids = torch.arange(6)
        context = ContextInput(base.embed(ids), torch.arange(6))
        layer = torch.nn.Linear(base.d_model, 1)
        for tensor in (base.embed(ids), base.features(ids)):
            layer(tensor).sum().backward()
        weight = torch.ones(3, requires_grad=True)
        (base.nll(context, ids[:3]) * weight).sum().backward()
        assert weight.grad.isfinite().all()

    @pytest.mark.parametrize("name", ["qwen3", "gemma3"])
    def test_gradients_reach_rows_and_gists_and_no_parameter(self, name):
        base = tiny_base_model(name)
        shape = (base.n_layers, 2, base.n_kv_heads, base.head_dim)
        inputs = [
            torch.randn(size, requires_grad=True) for size in ((3, base.d_model), shape, shape)
        ]
        context = ContextInput(inputs[0], torch.arange(2, 5), *inputs[1:], torch.arange(2))
        logits = target_logits(base, [context, context], torch.tensor([[1, 2], [3, 4]]))
        assert logits.shape == (2, 2, base.vocab_size)
        logits.sum().backward()
        for tensor in inputs:
            assert tensor.grad.abs().amax(dim=-1).min() > 0
        assert all(parameter.grad is None for parameter in base.model.parameters())

    def test_a_broken_forward_leaves_cache_and_hooks_as_they_were(self, base):
        ids = torch.arange(6)
        cache = base.prefill(ContextInput(base.embed(ids), torch.arange(6))).cache
        expected = base.step(ids[:1], torch.tensor([6]), crop(cache, 6))
        decoder = base.model.get_decoder()

        def stop(*_):
            raise KeyboardInterrupt

        hook = decoder.layers[1].register_forward_pre_hook(stop)
        both = ContextInput(base.embed(torch.arange(8)), torch.arange(8))
        try:
            with pytest.raises(KeyboardInterrupt):
                base.prefill(both, cache, hidden_states=True)
            with pytest.raises(KeyboardInterrupt):
                base.attention_to(both, 2)
        finally:
            hook.remove()
        assert cache.n_rows == 6
        assert not any(module._forward_hooks for module in base.model.modules())
        assert base.model.config._attn_implementation == "sdpa"
        assert torch.equal(base.step(ids[:1], torch.tensor([6]), cache), expected)

    def test_batches_without_padding_use_the_models_own_mask(self, base):
        contexts = [
            ContextInput(base.embed(row), torch.arange(5)) for row in torch.arange(15).view(3, 5)
        ]
        targets = torch.arange(12).view(3, 4)
        batch = base.nll_batch(contexts, targets)
        single = torch.stack([base.nll(c, t) for c, t in zip(contexts, targets, strict=True)])
        assert (batch - single).abs().max() < 1e-4

    def test_no_logits_to_keep(self, base):
        with pytest.raises(InputError, match="keep is 0"):
            base.prefill(ContextInput(base.embed(torch.arange(4)), torch.arange(4)), keep=0)

    def test_the_same_call_gives_the_same_bits(self, base):
        context = ContextInput(base.embed(torch.arange(9)), torch.arange(9))
        assert torch.equal(base.prefill(context).logits, base.prefill(context).logits)
