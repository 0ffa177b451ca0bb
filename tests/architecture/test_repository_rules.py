"""What must not be under version control: paths and addresses of one machine, and large files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from architecture.repository import ROOT, text_lines, tracked_files

MOST_BYTES = 32 * 1024 * 1024
MACHINE_PATH = re.compile(r"(?:^|[^\w.])/(?:root|home|Users|work)/[A-Za-z0-9.]")
INDEX_ADDRESS = re.compile(
    r'--(?:extra-)?index-url[ =]+(?:http|file)|https?://[^ "]*/simple(?:/|"|$)|"resolved": *"http'
)


def found(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number}"
        for path in tracked_files()
        for number, line in enumerate(text_lines(path), start=1)
        if pattern.search(line)
    ]


def test_no_path_of_one_machine():
    assert not found(MACHINE_PATH)


def test_no_address_of_a_package_index():
    assert not found(INDEX_ADDRESS)


def test_no_lock_file_that_carries_addresses():
    names = {path.name for path in tracked_files()}
    assert not names & {"uv.lock", "poetry.lock", "Pipfile.lock", "package-lock.json", "yarn.lock"}


def test_no_large_files():
    large = [str(path) for path in tracked_files() if (ROOT / path).stat().st_size > MOST_BYTES]
    assert not large


@pytest.mark.parametrize("name", ["root", "home", "Users", "work"])
def test_a_machine_path_is_seen(name):
    assert MACHINE_PATH.search(f"cd /{name}/someone")
    assert not MACHINE_PATH.search(f"https://example.org/{name}/page")


def test_an_index_address_is_seen():
    assert INDEX_ADDRESS.search("--index-url " + "https://example.org")
    assert INDEX_ADDRESS.search("https://example.org" + "/simple/torch")


def test_the_constraints_fit_every_build_of_torch():
    pins = [line for line in text_lines(Path("constraints.txt")) if not line.startswith("#")]
    assert any(pin.split(" ;")[0] == "torch==2.13.0" for pin in pins)
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9._-]+==[0-9][a-z0-9.]*( ; .+)?", pin), pin
        assert not pin.startswith(("nvidia-", "cuda-", "triton==")), pin


def test_the_scripts_can_be_run():
    for name in ("bootstrap", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} has lost its executable bit"
