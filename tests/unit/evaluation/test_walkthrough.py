"""The page of one session: its log, and the picture's numbers."""

from __future__ import annotations

import pytest
import torch

from megacontext.evaluation.poc_loop import PocLoopConfig
from megacontext.evaluation.walkthrough import (
    WalkthroughConfig,
    levels_over_time,
    write_walkthrough,
)
from megacontext.runtime.focus_loop import FocusRecord

pytest.importorskip("matplotlib")


def record(number, cursor, *spans):
    return FocusRecord(number, cursor, "lens", torch.tensor(spans), (), (), 0)


def test_a_row_is_the_window_after_one_refocus():
    records = [
        record(1, 64, (0, 0, 32), (0, 32, 64)),
        record(2, 128, (1, 0, 32), (1, 32, 64), (0, 64, 96), (0, 96, 128)),
        record(3, 128, (2, 0, 64), (1, 64, 96), (0, 96, 128)),
    ]
    assert levels_over_time(records, 4).tolist() == [
        [0, 0, -1, -1],
        [1, 1, 0, 0],
        [2, 2, 1, 0],
    ]


def test_page_and_picture_of_a_short_session(tmp_path):
    loop = PocLoopConfig(characters=6000, facts=1, max_new_tokens=6)
    page, picture = write_walkthrough(
        WalkthroughConfig(loop=loop, output=tmp_path / "deep" / "page.md", columns=40)
    )
    text = page.read_text(encoding="utf-8")
    assert f"]({picture.name})" in text
    assert picture.parent == page.parent
    shown = picture.read_text(encoding="utf-8")
    assert "raw tokens" in shown
    assert "L1 gists" in shown
    log = text.split("```text\n")[1].split("```")[0].splitlines()
    (asked,) = (number for number, line in enumerate(log) if line.startswith("asked "))
    assert any(line.startswith("  expand ") for line in log[:asked]), "it looked for the fact"
    assert any(line.startswith("  collapse ") for line in log), "and what streamed by got old"
    again, _ = write_walkthrough(
        WalkthroughConfig(loop=loop, output=tmp_path / "again" / "page.md", columns=40)
    )
    assert again.read_text(encoding="utf-8") == text
