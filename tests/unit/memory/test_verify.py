from __future__ import annotations

import pytest

from megacontext.errors import CorruptMemoryError
from megacontext.memory import Memory
from megacontext.memory.catalog import Catalog
from megacontext.memory.verify import Damage, verify_catalog


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_every_changed_byte_is_found_in_its_file(make, dtype):
    feeder = make(gist_dtype=dtype)
    for n in (7, 1, 13, 2):
        feeder.append(n)
    path = feeder.memory.path
    feeder.memory.close()
    catalog = Catalog.open(path, writable=False)
    checked = 0
    for file in sorted(path.glob("*.ctx")):
        raw = file.read_bytes()
        for place in range(len(raw)):
            changed = bytearray(raw)
            changed[place] ^= 1 << (place % 8)
            file.write_bytes(changed)
            report = verify_catalog(catalog, path)
            assert [problem.path.name for problem in report.problems] == [file.name], place
            assert not report.ok
            checked += 1
        file.write_bytes(raw)
    assert checked == sum(file.stat().st_size for file in path.glob("*.ctx"))
    report = verify_catalog(catalog, path)
    assert report.ok
    assert report.checked_bytes == checked
    catalog.close()


def test_all_damage_is_listed_and_located(make, monkeypatch):
    monkeypatch.setattr("megacontext.memory.file_set.CHUNK_BYTES", 16)
    feeder = make()
    feeder.append(40)
    path = feeder.memory.path
    raw = bytearray((path / "L0.ctx").read_bytes())
    raw[64 + 5 * 4] ^= 1
    raw[64 + 17 * 4] ^= 1
    (path / "L0.ctx").write_bytes(raw)
    (path / "keys.L2.ctx").unlink()
    report = feeder.memory.verify()
    assert [(p.path.name, p.level, p.index, p.offset) for p in report.problems] == [
        ("L0.ctx", 0, 4, 80),
        ("L0.ctx", 0, 16, 128),
        ("keys.L2.ctx", 2, None, None),
    ]
    assert str(report.problems[0]).startswith("L0.ctx (level 0, index 4, byte 80): 4 records")
    assert str(Damage(path / "L0.ctx", "gone")) == "L0.ctx: gone"
    feeder.memory.close()
    assert Memory.verify_path(path).problems == report.problems


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM chunks WHERE start = 0 AND file_id = 1", "no checksum"),
        ("UPDATE chunks SET crc32 = crc32 + 1", "checksum"),
        ("UPDATE commits SET n_tokens = 50 WHERE generation = 1", "tokens make"),
        ("UPDATE chunks SET count = 1000000000000 WHERE start = 0 AND file_id = 1", "more"),
        ("DELETE FROM files WHERE kind = 'keys'", "keys of level 1"),
    ],
)
def test_a_catalog_that_is_wrong_is_reported(make, monkeypatch, statement, expected):
    monkeypatch.setattr("megacontext.memory.file_set.CHUNK_BYTES", 16)
    feeder = make()
    feeder.append(40)
    path = feeder.memory.path
    feeder.memory.close()
    catalog = Catalog.open(path, writable=True)
    catalog._connection.execute(statement)
    catalog.close()
    report = Memory.verify_path(path)
    assert expected in " ".join(str(problem) for problem in report.problems)


def test_a_catalog_that_cannot_be_read_is_the_whole_report_or_an_error(make):
    feeder = make()
    feeder.append(8)
    path = feeder.memory.path
    feeder.memory.close()
    catalog = Catalog.open(path, writable=True)
    catalog._connection.execute("DELETE FROM meta WHERE key = 'gist_width'")
    catalog.close()
    assert "identity" in str(Memory.verify_path(path).problems[-1])
    (path / "catalog.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(CorruptMemoryError):
        Memory.verify_path(path)
