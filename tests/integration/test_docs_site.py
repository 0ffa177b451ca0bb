"""The documentation as a site: built without a warning, whole without a network."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from command_line import ROOT, Done, run_module

for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package, reason="the site needs the extra `docs`")

PACKAGES = (
    *("memory", "runtime", "gistnet", "lensnet"),
    *("telemetry", "tasks", "training", "evaluation"),
)
# What a page makes a browser fetch, and what a style sheet does.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed|link)\b[^>]*?"
    r"""\b(?:src|href|data)=["']?((?:https?:)?//[^"'\s>]*)"""
)
STYLE_FETCHED = re.compile(r"""(?:@import\s*|url\(\s*)["']?((?:https?:)?//[^"')\s]*)""")


def build(source: Path, target: Path) -> Done:
    options = ["-W", "--keep-going", "-q", "-d", target.with_name("doctrees")]
    return run_module("sphinx", *options, source, target)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT / "docs", target)
    assert done.status == 0, done.err
    return target


def fetched(folder: Path) -> dict[str, list[str]]:
    """Addresses of other hosts that reading the site would ask, by file."""
    found: dict[str, list[str]] = {}
    for path in folder.rglob("*"):
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            rules = (STYLE_FETCHED,) if path.suffix == ".css" else (FETCHED, STYLE_FETCHED)
            if addresses := [address for rule in rules for address in rule.findall(text)]:
                found[str(path.relative_to(folder))] = addresses
    return found


def test_every_page_can_be_reached_from_the_first_one(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    navigation = text[text.index('class="sidebar-tree"') : text.index("</aside>")]
    linked = {unquote(link.split("#")[0]) for link in re.findall(r'href="([^"]+)"', navigation)}
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 15
    for page in pages - {Path("index.md")}:
        assert (site / page.with_suffix(".html")).is_file(), page
        assert page.with_suffix(".html").as_posix() in linked, f"{page} is not in the navigation"


def test_every_exported_name_is_documented(site):
    for package in PACKAGES:
        module = importlib.import_module(f"megacontext.{package}")
        page = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
        for name in module.__all__:
            # Constants and aliases have no docstring of their own.
            if isinstance(getattr(module, name), type):
                assert f'id="megacontext.{package}.{name}"' in page, f"{package}.{name}"
    assert 'id="megacontext.runtime.Engine.generate"' in (site / "api/runtime.html").read_text()
    assert 'id="megacontext.memory.Memory.search_blocks"' in (site / "api/memory.html").read_text()
    assert 'id="megacontext.errors.CorruptMemoryError"' in (site / "api/config.html").read_text()


def test_no_other_host_is_asked_for_anything(site):
    assert fetched(site) == {}
    assert not [path for path in site.rglob("*") if path.suffix in (".woff", ".woff2", ".ttf")]


def test_an_address_that_would_be_fetched_is_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://x/1"></a><link rel="stylesheet" href="https://x/2">'
        "<script defer src='//x/3'></script><style>@import 'https://x/4';</style>"
    )
    (tmp_path / "b.css").write_text("@font-face { src: url(https://x/5) } a { b: url(c.png) }")
    assert fetched(tmp_path) == {
        "a.html": ["https://x/2", "//x/3", "https://x/4"],
        "b.css": ["https://x/5"],
    }


def test_a_warning_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/conf.py", tmp_path / "docs")
    (tmp_path / "docs/index.md").write_text(
        "# Home\n\n[gone](gone-page.md)\n\n```{toctree}\nlost\n```\n\n"
        "```{eval-rst}\n.. automodule:: megacontext.nothing\n```\n"
    )
    (tmp_path / "docs/alone.md").write_text("# Alone\n")
    done = build(tmp_path / "docs", tmp_path / "site")
    assert done.status == 1
    for complaint in ("gone-page.md", "'lost'", "megacontext.nothing", "alone.md"):
        assert complaint in done.err, done.err
