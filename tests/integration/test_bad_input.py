"""Whatever is given to a command: a right result, or status 2 and one line that says what to do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_base_model, tiny_model, tiny_tokenizer

from megacontext.errors import InputError, MemoryStoreError, ModelError
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.text_files import decoded
from tools._memory_script import IDENTITY, append

SHORT = "decode.max_new_tokens=4"
LONG = "n" * 300


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3", max_positions=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base():
    return tiny_base_model()


def engine_over(base, path: Path) -> Engine:
    memory = Memory.create(path, Engine.identity(base))
    return Engine(base, memory, config=EngineConfig(budget=128, tail_tokens=32))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=[]), max_size=300))
def test_any_text_is_read_back_with_half_characters_replaced(base, tmp_path_factory, text):
    engine = engine_over(base, tmp_path_factory.mktemp("m") / "m.mctx")
    with engine.memory as memory:
        engine.ingest(text)
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        assert base.decode(memory.tokens()) == whole
        assert memory.verify().ok
        memory.search_blocks(text, 3)


@settings(max_examples=200)
@given(raw=st.binary(max_size=200), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_bytes_in_pieces_are_the_text_they_are_or_refused_at_the_right_byte(raw, sizes):
    pieces, place = [], 0
    while place < len(raw):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(raw[place : place + size])
        place += size
    try:
        expected = raw.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(InputError, match=rf"\(byte {error.start}\)"):
            list(decoded(pieces, "x"))
    else:
        assert "".join(decoded(pieces, "x")) == expected


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fELF" + bytes(range(256)) * 9,
        "Grüße".encode("latin-1"),
        b"both" + "ü".encode() + "ü".encode("latin-1"),
        "text".encode("utf-16"),
        b"\xed\xa0\x80",
        b"\xf8\x88\x80\x80\x80",
        b"\xc0\x80",
    ],
    ids=["binary", "latin-1", "mixed", "utf-16", "surrogate", "five bytes", "overlong"],
)
def test_a_file_in_another_encoding_is_refused_and_leaves_no_trace(
    megacontext, tmp_path, model, content
):
    (tmp_path / "odd").write_bytes(content)
    line = megacontext(
        "ingest", tmp_path / "m.mctx", tmp_path / "odd", "--set", f"model={model}"
    ).complaint
    assert "not UTF-8 text (byte" in line
    assert not (tmp_path / "m.mctx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["x1yz-", "a"])
def test_a_line_of_a_hundred_megabytes_is_the_same_tokens(tmp_path, word):
    base = BaseModel.from_pretrained("bundled:tiny")
    size, piece = 100 * 1024 * 1024, word * 200_000
    with Memory.create(tmp_path / "m.mctx", Engine.identity(base)) as memory:
        ingestor = Engine(base, memory).ingestor
        pieces = (piece for _ in range(size // len(piece)))
        place = 0
        for chunk in ingestor.token_chunks(pieces, 1 << 16):
            text = base.decode(chunk)
            start = place % len(word)
            assert text == (word * (len(text) // len(word) + 2))[start : start + len(text)]
            place += len(text)
        assert place == size // len(piece) * len(piece)
        ingestor.append(chunk)
        assert memory.verify().ok


def test_a_line_of_five_megabytes_is_the_same_tokens_however_it_comes(tmp_path):
    base = BaseModel.from_pretrained("bundled:tiny")
    line = "x1yé-" * (5 * 1024 * 1024 // 6)
    with Memory.create(tmp_path / "m.mctx", Engine.identity(base)) as memory:
        ingestor = Engine(base, memory).ingestor
        chunks = list(ingestor.token_chunks([line[:99], line[99:]], 1 << 16))
        assert all(len(chunk) == 1 << 16 for chunk in chunks[:-1])
        assert base.decode(torch.cat(chunks)) == line
        ingestor.append(chunks[-1])
        assert memory.verify().ok


@pytest.mark.parametrize("ids", [[258], [-1], [0, 2**31], [2**40]])
def test_tokens_outside_the_vocabulary_are_refused_and_nothing_is_stored(base, tmp_path, ids):
    engine = engine_over(base, tmp_path / "m.mctx")
    with engine.memory as memory:
        with pytest.raises(InputError, match=r"0…257"):
            engine.ingestor.append(torch.tensor(ids))
        assert memory.n_tokens == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 257) | st.integers(-(2**63), 2**63 - 1), max_size=9))
def test_any_numbers_are_stored_as_they_are_or_refused(base, tmp_path_factory, ids):
    engine = engine_over(base, tmp_path_factory.mktemp("m") / "m.mctx")
    with engine.memory as memory:
        tokens = torch.tensor(ids, dtype=torch.int64)
        if all(0 <= number <= 257 for number in ids):
            engine.ingestor.append(tokens)
        else:
            with pytest.raises(InputError, match=r"^[^\n]*0…257[^\n]*$"):
                engine.ingestor.append(tokens)
            ids = []
        assert memory.tokens().tolist() == ids


def test_tokens_that_another_program_stored_are_refused_when_read(megacontext, tmp_path, model):
    base = BaseModel.from_pretrained(model)
    with Memory.create(tmp_path / "m.mctx", Engine.identity(base)) as memory:
        memory.append(torch.tensor([5, 999_999, 7]), {}, {})
    option = ["--set", f"model={model}"]
    memory = tmp_path / "m.mctx"
    assert "257" in megacontext("inspect", memory, "--tokens=0:3", *option).complaint
    ask = ["ask", "--memory", memory, "Who?", *option, SHORT]
    assert "257" in megacontext(*ask).complaint
    assert megacontext("verify", memory).status == 0


@pytest.mark.parametrize("text", ["", "a"])
def test_a_history_of_no_token_or_one_does_what_a_long_one_does(megacontext, tmp_path, model, text):
    memory, file = tmp_path / "m.mctx", tmp_path / "t.txt"
    file.write_text(text)
    option = ["--set", f"model={model}"]
    assert megacontext("ingest", memory, file, *option).status == 0
    for command in (
        ["verify", memory],
        ["stats", memory],
        ["inspect", memory],
        ["inspect", memory, f"--tokens=0:{len(text)}", *option],
        ["inspect", memory, "--search=a", *option],
        ["regist", memory, *option],
        ["repair", memory, *option],
        ["ask", "--memory", memory, "Who?", *option, SHORT],
        ["ingest", memory, file, *option],
    ):
        done = megacontext(*command)
        assert done.status == 0, done.err
    done = megacontext("ask", "--memory", memory, "", *option, SHORT, "template=none")
    assert done.status == (0 if text else 2), done.err
    forget = ["forget", memory, "--source", file, *option]
    assert megacontext(*forget).status == (0 if text else 2)
    assert megacontext("verify", memory).status == 0


@pytest.mark.parametrize(
    "tokens", ["0:" + "9" * 5000, "٠:١", "1:0", ":", "0", "-1:0", "0:99", "0:1:2", "²:³"]
)
def test_a_span_that_is_none_is_refused(megacontext, tmp_path, model, tokens):
    (tmp_path / "t.txt").write_text("text")
    option = ["--set", f"model={model}"]
    assert megacontext("ingest", tmp_path / "m.mctx", tmp_path / "t.txt", *option).status == 0
    done = megacontext("inspect", tmp_path / "m.mctx", f"--tokens={tokens}", *option)
    assert "--tokens" in done.complaint


@pytest.mark.parametrize("command", ["verify", "stats", "inspect", "regist", "repair", "ingest"])
@pytest.mark.parametrize("path", [LONG, "file", "file/below", ".", "", "none"])
def test_a_path_that_is_no_memory_is_refused(
    megacontext, tmp_path, model, monkeypatch, command, path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    if command == "ingest" and path == "none":
        return  # it makes one
    extra = ["file"] if command == "ingest" else []
    option = ["--set", f"model={model}"] if command in ("regist", "repair", "ingest") else []
    done = megacontext(command, path, *extra, *option)
    assert done.complaint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    "setting",
    [
        'model="a\\0b"',
        'model="\\ud800"',
        "model=" + LONG,
        "model=a/b/" + LONG,
        'gistnet="a\\0b"',
        "gistnet=" + LONG,
        "lens=" + LONG,
        "telemetry=" + LONG,
        "telemetry=.",
        'telemetry="a\\0b"',
        "engine.chunk_tokens=1e99",
        "engine.chunk_tokens=" + "9" * 5000,
    ],
)
def test_a_setting_that_names_nothing_is_one_line(megacontext, tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    assert megacontext("ingest", "m.mctx", "t.txt", "--set", setting).complaint
    assert not (tmp_path / "m.mctx").exists()


def test_half_characters_from_the_shell_are_refused(megacontext, tmp_path, model):
    (tmp_path / "t.txt").write_text("text")
    option = ["--set", f"model={model}"]
    memory = tmp_path / "m.mctx"
    for odd in (["--author", "\udcff"], ["--tag", "\udcff"]):
        assert megacontext("ingest", memory, tmp_path / "t.txt", *odd, *option).complaint
    odd_file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    odd_file.write_text("text")
    assert megacontext("ingest", memory, odd_file, *option).status == 0
    (source,) = megacontext("inspect", memory, "--json=-").result["sources"]
    assert source["uri"].endswith("%FF.txt")
    ask = ["ask", "--memory", memory, "W\udcffho?", *option, SHORT]
    assert megacontext(*ask).status == 0
    assert megacontext("inspect", memory, "--search=\udcff", *option).status == 0


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder of another user's, seen as that user: the superuser may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    superuser = os.geteuid() == 0
    try:
        yield folder
    finally:
        if superuser:
            os.setresuid(0, 0, 0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)
        shutil.rmtree(folder)


def drop() -> None:
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 0)


def protect(memory: Path, mode: int) -> None:
    for file in memory.iterdir():
        file.chmod(0o444)
    memory.chmod(mode)


def test_a_memory_whose_writer_died_is_refused_where_its_log_cannot_be_folded_in(tmp_path):
    with without_privileges() as folder:
        if not (child := os.fork()):
            small = Memory.create(folder / "m.mctx", IDENTITY)
            append(small, 50)
            os._exit(0)
        os.waitpid(child, 0)
        (folder / "m.mctx" / "catalog.sqlite-shm").unlink()
        protect(folder / "m.mctx", 0o555)
        drop()
        with pytest.raises(MemoryStoreError, match="log") as caught:
            Memory.open(folder / "m.mctx")
        assert "\n" not in str(caught.value)


class Trap:
    """Unpickling one leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickled_checkpoint_is_never_opened(tmp_path, model):
    folder = tmp_path / "pickled"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    for name in ("pytorch_model.bin", "model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
    torch.save({"x": Trap(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors") as caught:
        BaseModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_never_run(tmp_path, model, file):
    folder, mark = tmp_path / "coded", tmp_path / "mark"
    shutil.copytree(model, folder)
    (folder / "trap.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Trap: pass\n")
    values = json.loads((folder / file).read_text())
    kind = "AutoTokenizer" if "tokenizer" in file else "AutoModelForCausalLM"
    target: object = ["trap.Trap", None] if "tokenizer" in file else "trap.Trap"
    values["auto_map"] = {kind: target, "AutoConfig": "trap.Trap"}
    values["model_type" if file == "config.json" else "tokenizer_class"] = "trap"
    (folder / file).write_text(json.dumps(values))
    said = ""
    try:
        BaseModel.from_pretrained(folder)
    except ModelError as error:
        said = str(error)
    assert "\n" not in said
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"null", b"[]", b"[" * 100_000, b'{"model_type": [], "tokenizer_class": 5}'],
    ids=["empty", "binary", "null", "list", "deep", "odd"],
)
def test_a_model_folder_with_a_damaged_file_is_refused(tmp_path, model, file, content):
    folder = shutil.copytree(model, tmp_path / "damaged")
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        BaseModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_dim", 0),
        ("num_attention_heads", 0),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**9),
        ("vocab_size", -1),
        ("dtype", "x"),
        ("hidden_act", "none"),
        ("layer_types", []),
    ],
)
def test_a_model_that_claims_absurd_sizes_is_refused(tmp_path, model, key, value):
    folder = shutil.copytree(model, tmp_path / "absurd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError) as caught:
        BaseModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
