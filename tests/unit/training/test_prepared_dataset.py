from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import datasets
import pytest
import torch
from tiny_models import tiny_base_model
from torch.utils.data import DataLoader

from megacontext.errors import ConfigError, DataError
from megacontext.training.lm_batches import END_OF_TEXT
from megacontext.training.prepare_dataset import (
    PrepareDatasetConfig,
    Progress,
    prepare_dataset,
)
from megacontext.training.prepared_dataset import PreparedDataset
from megacontext.training.slice_manifest import Manifest

CONTEXT, HORIZON, WIDTH = 64, 32, 32
TEXT = "".join(f"{number} little birds sat on a wall. " for number in range(30))


def config_for(folder: Path, **changes: object) -> PrepareDatasetConfig:
    corpus = folder / "corpus.txt"
    corpus.write_text(END_OF_TEXT.join([TEXT, "too short", TEXT[:150], "also short"]))
    values = {
        "output": folder / "slices",
        "corpus": [str(corpus)],
        "slices": {"context_tokens": CONTEXT, "horizon": HORIZON},
        "shard_slices": 4,
    }
    return PrepareDatasetConfig.parse(values | changes)


def folder_digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base():
    return tiny_base_model()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, base) -> Path:
    config = config_for(tmp_path_factory.mktemp("prepared"))
    prepare_dataset(config, base=base)
    return config.output


def test_a_slice_is_a_stretch_of_its_document(prepared, base):
    data = PreparedDataset.open(prepared, base)
    document = base.encode(TEXT.strip())
    whole = (len(document) - HORIZON) // CONTEXT
    for index in range(whole):
        found = data[index]
        assert (found.source_id, found.document_id, found.offset) == (0, 0, index * CONTEXT)
        end = found.offset + CONTEXT
        assert torch.equal(found.context_tokens, document[found.offset : end])
        assert torch.equal(found.future_tokens, document[end : end + HORIZON])
        assert found.context_mask.all()
        assert found.context_tokens.dtype == torch.int64


def test_a_short_slice_is_padded_at_the_end(prepared, base):
    data = PreparedDataset.open(prepared, base)
    last = data[len(data) - 1]
    document = base.encode(TEXT[:150].strip())
    assert (last.document_id, last.offset) == (2, 64)
    assert last.context_mask.tolist() == [True] * 32 + [False] * 32
    assert torch.equal(last.context_tokens[:32], document[64:96])
    assert set(last.context_tokens[32:].tolist()) == {base.tokenizer.pad_token_id}
    assert torch.equal(last.future_tokens, document[96:128])
    assert last.teacher_states is not None
    assert last.teacher_states[:, :32].any()
    assert not last.teacher_states[:, 32:].any()


def test_teacher_states_give_the_nll_of_the_full_context(prepared, base):
    data = PreparedDataset.open(prepared, base)
    for index in (1, len(data) - 1):
        found = data[index]
        context = found.context_tokens[found.context_mask]
        ids = torch.cat([context, found.future_tokens])
        with torch.inference_mode():
            logits = base.model(input_ids=ids[None]).logits[0].float()
            expected = torch.nn.functional.cross_entropy(
                logits[len(context) - 1 : -1], found.future_tokens, reduction="none"
            )
            assert found.teacher_states is not None
            assert found.teacher_future_states is not None
            cached = torch.cat(
                [found.teacher_states[0, : len(context)][-1:], found.teacher_future_states[0, :-1]]
            )
            nll = torch.nn.functional.cross_entropy(
                base.model.lm_head(cached.float()), found.future_tokens, reduction="none"
            )
        assert torch.allclose(nll, expected, atol=2e-2)


def test_hugging_face_datasets_loads_the_folder(prepared):
    ours = PreparedDataset.open(prepared)
    theirs = datasets.load_from_disk(str(prepared))
    assert isinstance(theirs, datasets.Dataset)
    assert len(theirs) == len(ours)
    torch_rows = theirs.with_format("torch")
    for index in (0, 5, len(ours) - 1):
        row, found = torch_rows[index], ours[index]
        assert torch.equal(row["context_tokens"], found.context_tokens)
        assert torch.equal(row["context_mask"], found.context_mask)
        assert torch.equal(row["future_tokens"], found.future_tokens)
        assert torch.equal(row["teacher_states"].half(), found.teacher_states)
        assert torch.equal(row["teacher_future_states"].half(), found.teacher_future_states)
        assert row["offset"] == found.offset
        assert row["source"] == found.source
    assert theirs[0]["base_model"] == "tiny-qwen3"
    assert theirs[0]["stride"] == CONTEXT


def test_a_single_shard_loads_with_the_same_features(prepared):
    shard = datasets.Dataset.from_file(str(prepared / "shard-00001.arrow"))
    whole = datasets.load_from_disk(str(prepared))
    assert shard.features == whole.features
    assert shard[0]["offset"] == whole[4]["offset"]


def test_gists_are_never_stored(prepared):
    columns = datasets.load_from_disk(str(prepared)).column_names
    assert not [name for name in columns if "gist" in name or "logit" in name]


def test_it_travels_to_the_workers_of_a_data_loader(prepared):
    data = PreparedDataset.open(prepared)
    first = data[0].context_tokens
    sent = pickle.dumps(data)
    assert len(sent) < 20_000, "maps are opened by the worker, not sent"
    assert torch.equal(pickle.loads(sent)[0].context_tokens, first)
    loader = DataLoader(data, batch_size=None)
    assert len(list(loader)) == len(data)


def test_the_same_input_gives_the_same_bytes(tmp_path, prepared, base):
    (tmp_path / "again").mkdir()
    config = config_for(prepared.parent, output=tmp_path / "again")
    prepare_dataset(config, base=tiny_base_model())
    assert folder_digests(tmp_path / "again") == folder_digests(prepared)


@pytest.mark.parametrize("slices", [1, 4, 5, 10])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, prepared, base, slices):
    config = config_for(prepared.parent, output=tmp_path / "slices")
    seen: list[int] = []

    def interrupt(progress: Progress) -> None:
        seen.append(progress.slices)
        if progress.slices == slices:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(config, base=base, on_progress=interrupt)
    finished = Manifest.read(config.output)
    assert not finished.complete
    assert finished.n_slices == slices // 4 * 4
    with pytest.raises(DataError, match="unfinished"):
        PreparedDataset.open(config.output)
    seen.clear()
    prepare_dataset(config, base=base, on_progress=lambda p: seen.append(p.slices))
    assert seen[0] == finished.n_slices + 1, "finished shards are not computed again"
    assert folder_digests(config.output) == folder_digests(prepared)


def test_a_finished_data_set_is_left_as_it_is(prepared, base):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    prepare_dataset(config_for(prepared.parent), base=base, on_progress=pytest.fail)
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_the_manifest_counts(prepared):
    manifest = Manifest.read(prepared)
    assert manifest.complete
    assert manifest.documents_skipped == 2
    assert [shard.slices for shard in manifest.shards][:-1] == [4] * (len(manifest.shards) - 1)
    data = PreparedDataset.open(prepared)
    tokens = sum(int(data[index].context_mask.sum()) for index in range(len(data)))
    assert sum(shard.context_tokens for shard in manifest.shards) == tokens


def test_skipping_leaves_short_slices_out(tmp_path, base):
    slices = {"context_tokens": CONTEXT, "horizon": HORIZON, "short_documents": "skip"}
    config = config_for(tmp_path, slices=slices)
    prepare_dataset(config, base=base)
    data = PreparedDataset.open(config.output)
    assert all(data[index].context_mask.all() for index in range(len(data)))


def test_at_most_as_many_slices_as_asked_for(tmp_path, base):
    config = config_for(tmp_path, max_slices=6)
    assert prepare_dataset(config, base=base).n_slices == 6


def test_without_a_teacher_any_model_of_the_tokenizer_may_use_it(tmp_path, base):
    config = config_for(tmp_path, teacher={"enabled": False})
    prepare_dataset(config, base=base)
    data = PreparedDataset.open(config.output, tiny_base_model("llama"))
    assert data[0].teacher_states is None
    assert "teacher_states" not in datasets.load_from_disk(str(config.output)).column_names


def test_a_stack_of_layers_without_the_horizon(tmp_path, base):
    teacher = {"layers": [0, 2, -1], "horizon": False}
    config = config_for(tmp_path, teacher=teacher, max_slices=2)
    prepare_dataset(config, base=base)
    found = PreparedDataset.open(config.output, base)[1]
    assert found.teacher_states is not None
    assert found.teacher_states.shape == (3, CONTEXT, WIDTH)
    assert torch.equal(found.teacher_states[2], base.features(found.context_tokens).half())
    assert found.teacher_future_states is None


@pytest.mark.parametrize("other", [("qwen3", 1), ("llama", 0)])
def test_a_teacher_cache_of_another_model_is_refused(prepared, other):
    with pytest.raises(DataError, match="teacher states come from tiny-qwen3"):
        PreparedDataset.open(prepared, tiny_base_model(*other))


def test_tokens_of_another_tokenizer_are_refused(prepared):
    other = tiny_base_model()
    other.tokenizer.add_tokens(["little birds"])
    with pytest.raises(DataError, match="its tokens were made for tiny-qwen3"):
        PreparedDataset.open(prepared, other)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"shard_slices": 5}, "shard_slices 4, not 5"),
        ({"teacher": {"enabled": False}}, "teacher"),
        ({"max_slices": 2}, "max_slices None, not 2"),
    ],
)
def test_another_recipe_does_not_touch_a_folder(prepared, base, changes, difference):
    before = folder_digests(prepared)
    with pytest.raises(DataError, match=difference):
        prepare_dataset(config_for(prepared.parent, **changes), base=base)
    assert folder_digests(prepared) == before


def test_a_changed_corpus_is_not_mixed_with_the_old_one(tmp_path, base):
    config = config_for(tmp_path, max_slices=2)
    prepare_dataset(config, base=base)
    with Path(config.corpus[0]).open("a") as corpus:
        corpus.write("and one more line")
    with pytest.raises(DataError, match="sources"):
        prepare_dataset(config, base=base)


def test_a_folder_with_something_else_is_left_alone(tmp_path, base):
    config = config_for(tmp_path, output=tmp_path)
    with pytest.raises(DataError, match=r"corpus.txt and no data set"):
        prepare_dataset(config, base=base)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_corpus_without_one_long_document_is_refused(tmp_path, base):
    slices = {"context_tokens": 2048, "short_documents": "skip"}
    config = config_for(tmp_path, slices=slices, teacher={"enabled": False})
    with pytest.raises(DataError, match="4 documents and none long enough"):
        prepare_dataset(config, base=base)


def test_a_context_beyond_the_models_positions_is_refused(tmp_path, base):
    with pytest.raises(ConfigError, match="128 positions"):
        prepare_dataset(config_for(tmp_path, slices={"context_tokens": 128}), base=base)


def copied(prepared: Path, to: Path) -> Path:
    to.mkdir()
    for path in prepared.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_damage_is_found(tmp_path, prepared, base):
    folder = copied(prepared, tmp_path / "copy")
    PreparedDataset.open(folder, base).verify()
    shard = folder / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00001.arrow: the checksum"):
        PreparedDataset.open(folder, base).verify()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"shard-00001.arrow: missing or of the wrong size"):
        PreparedDataset.open(folder, base)
    with pytest.raises(DataError, match=r"shard-00001.arrow: missing or of the wrong size"):
        prepare_dataset(config_for(prepared.parent, output=folder), base=base)
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=r"shard-00001.arrow"):
        _ = PreparedDataset.open(folder, base)[4]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "format version None"),
        ('{"version": 2}', "format version 2"),
        ('{"version": 1}', "recipe"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, content, complaint):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=complaint):
        PreparedDataset.open(tmp_path)


def test_a_folder_without_data_is_refused_with_the_command(tmp_path):
    with pytest.raises(DataError, match=r"tools.prepare_dataset"):
        PreparedDataset.open(tmp_path)


def test_indices_end_where_the_data_ends(prepared):
    data = PreparedDataset.open(prepared)
    for index in (len(data), -1):
        with pytest.raises(IndexError):
            _ = data[index]


def test_the_files_say_nothing_of_time_or_place(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    del manifest["recipe"]["sources"]
    assert str(prepared.parent) not in json.dumps(manifest)
    assert json.loads((prepared / "dataset_info.json").read_text())["splits"]["train"]
