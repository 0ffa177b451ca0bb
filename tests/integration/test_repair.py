"""``megacontext repair``: everything but the tokens can be made anew."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.memory import KeyIndex, KeyIndexConfig, Memory
from megacontext.memory import tree as tree_module
from megacontext.memory.resident import ResidentLimit
from megacontext.runtime import repair as repair_module
from tools._memory_script import describe

STORY = "amber birch cobalt delta. The baker went to the river. "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3", max_positions=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def memory(megacontext, tmp_path, model) -> Path:
    """Two sources in several commits, four levels."""
    for name, times in (("a.txt", 500), ("b.txt", 130)):
        (tmp_path / name).write_text(STORY * times)
        done = megacontext(
            *("ingest", tmp_path / "m.mctx", tmp_path / name, "--author", "Ada"),
            *("--set", f"model={model}", "engine.chunk_tokens=5000"),
        )
        assert done.status == 0, done.err
    return tmp_path / "m.mctx"


def everything(path: Path) -> dict:
    with Memory.open(path) as memory:
        return {**describe(memory), "records": memory.sources()}


def digests(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        # What whoever opens it writes anew.
        if file.name != "lock" and "catalog.sqlite-" not in file.name
    }


def execute(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path / "catalog.sqlite", isolation_level=None)
    connection.execute(statement)
    connection.close()


def flip(file: Path, place: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "L1.ctx", 500),
        lambda path: (path / "L2.ctx").unlink(),
        lambda path: (path / "fidelity.L1.ctx").write_bytes(b""),
        lambda path: execute(path, "UPDATE blocks_data SET block = zeroblob(50) WHERE id > 9999"),
        lambda path: execute(path, "DELETE FROM files WHERE kind = 'gists' AND level = 2"),
        lambda path: (path / "acknowledged").unlink(),
    ],
    ids=["gist", "no level", "fidelity", "index", "catalog", "note"],
)
def test_a_repaired_memory_is_what_it_was(megacontext, memory, model, damage):
    before = everything(memory)
    damage(memory)
    damaged = digests(memory)
    assert megacontext("verify", memory).status == 2
    done = megacontext("repair", memory, "--set", f"model={model}", "--json=-")
    assert done.status == 0, done.err
    kept = memory.with_name("m.mctx.damaged")
    assert done.result["repaired"] is True
    assert done.result["tokens"] == len(before["tokens"]) // 4
    assert done.result["damaged"] == str(kept)
    assert digests(kept) == damaged
    assert megacontext("verify", memory).status == 0
    assert everything(memory) == before
    assert sorted(path.name for path in memory.parent.iterdir()) == [
        "a.txt",
        "b.txt",
        "m.mctx",
        "m.mctx.damaged",
    ]


@pytest.mark.parametrize(
    "damage",
    [lambda path: flip(path / "keys.L1.ctx", 500), lambda path: (path / "keys.L2.ctx").unlink()],
    ids=["key", "no level of keys"],
)
def test_keys_and_their_index_are_made_anew(megacontext, tmp_path, damage):
    path, index = tmp_path / "m.mctx", KeyIndexConfig(flat_keys=16, rerank=1 << 20)
    (tmp_path / "a.txt").write_text(STORY * 300)
    assert megacontext("ingest", path, tmp_path / "a.txt").status == 0
    with Memory.open(path, "a") as memory:
        KeyIndex(memory, index).update()
        query, half = memory.keys(1)[:1].float(), memory.count(1) // 2
    before = everything(path)
    assert (path / "keys.L1.faiss").exists()
    assert len(before["keys 2"]) > 0
    damage(path)
    assert megacontext("repair", path).status == 0
    assert megacontext("verify", path).status == 0
    assert everything(path) == before
    with Memory.open(path, "a") as memory:
        keys = memory.keys(1).float()
        found, _ = KeyIndex(memory, index).search(
            query, half, memory.count(1), lambda keys: (query @ keys.float().T)[0]
        )
        best = (query @ keys.T)[0].sort(descending=True).values[:half]
        scores = (query @ keys[found].T)[0].sort(descending=True).values
        torch.testing.assert_close(scores, best)


def test_it_keeps_to_a_limit_to_what_stays_in_ram(megacontext, memory, model, monkeypatch):
    kept = []

    class Watched(ResidentLimit):
        def announce(self, mapped, start, stop):
            kept.append(id(self))
            super().announce(mapped, start, stop)

    for module in (tree_module, repair_module):
        monkeypatch.setattr(module, "ResidentLimit", Watched)
    (memory / "L1.ctx").unlink()
    told = ("repair", memory, "--set", f"model={model}")
    refused = megacontext(*told, "resident_mb=1")
    assert refused.status == 2
    assert "resident_mb" in refused.err
    assert megacontext(*told, "resident_mb=16").status == 0
    # The damaged memory's tokens, and the new memory.
    assert len(set(kept)) == 2


def test_nothing_is_done_to_a_whole_memory(megacontext, memory, model):
    before = digests(memory)
    done = megacontext("repair", memory, "--set", f"model={model}", "--json=-")
    assert (done.status, done.result) == (0, {"repaired": False})
    assert digests(memory) == before


def test_damaged_tokens_are_refused_and_nothing_changes(megacontext, memory, model):
    flip(memory / "L0.ctx", 700)
    before = digests(memory)
    line = megacontext("repair", memory, "--set", f"model={model}").complaint
    assert "L0.ctx (level 0" in line
    assert "nothing else holds these tokens" in line
    assert digests(memory) == before
    assert not memory.with_name("m.mctx.repaired").exists()


def test_a_catalog_that_is_gone_is_refused(megacontext, memory, model):
    (memory / "catalog.sqlite").unlink()
    assert "catalog.sqlite" in megacontext("repair", memory, "--set", f"model={model}").complaint


def test_another_model_is_refused(megacontext, memory, tmp_path):
    (memory / "L1.ctx").unlink()
    other = save_tiny_model(tmp_path / "other", "llama")
    line = megacontext("repair", memory, "--set", f"model={other}").complaint
    assert "base_model is" in line
    assert "made with" in line
    assert not memory.with_name("m.mctx.repaired").exists()


def test_a_repair_that_was_cut_off_is_in_the_way_until_removed(megacontext, memory, model):
    (memory / "L1.ctx").unlink()
    left = memory.with_name("m.mctx.repaired")
    left.mkdir()
    option = ["--set", f"model={model}"]
    assert "remove it" in megacontext("repair", memory, *option).complaint
    left.rmdir()
    assert megacontext("repair", memory, *option).status == 0
    (memory / "L1.ctx").unlink()
    assert megacontext("repair", memory, *option).status == 0
    assert memory.with_name("m.mctx.damaged2").exists()


def test_a_memory_in_use_is_not_repaired(megacontext, memory, model):
    with Memory.open(memory, "a"):
        flip(memory / "L1.ctx", 500)
        line = megacontext("repair", memory, "--set", f"model={model}").complaint
    assert "open for writing by process" in line


def test_what_cannot_be_vouched_for_is_told(megacontext, memory, model, tmp_path):
    execute(memory, "UPDATE sources SET author = 'Eve' WHERE id = 1")
    (memory / "L1.ctx").unlink()
    net = GistNet(GistNetConfig(d_model=32, n_heads=2, n_layers=1, context_tokens=0, init_seed=3))
    net.save_pretrained(tmp_path / "net")
    shutil.copytree(memory, tmp_path / "copy.mctx")
    done = megacontext(
        *("repair", memory, "--json=-"),
        *("--set", f"model={model}", f"gistnet={tmp_path / 'net'}"),
    )
    assert done.status == 0, done.err
    rows, version = done.result["doubts"]
    assert "sources may be wrong" in rows
    assert version.startswith("gist_version was ")
    assert rows in done.err
    assert megacontext("verify", memory).status == 0
    with Memory.open(memory) as found:
        assert [source.author for source in found.sources()] == ["Eve", "Ada"]
        assert found.identity.gist_version == net.version
