"""bAbI files, lenses and results for tests of suite ``focus``."""

from __future__ import annotations

from pathlib import Path

from megacontext.lensnet import LensNet, LensNetConfig

BABI_QA2 = """\
1 Mary got the milk there.
2 John moved to the bedroom.
3 Mary travelled to the hallway.
4 Where is the milk? \thallway\t1 3
5 John got the apple.
6 John moved to the kitchen.
7 Where is the apple? \tkitchen\t5 6
"""
BABI_QA3 = """\
1 Mary went to the garden.
2 Mary got the milk there.
3 John moved to the bedroom.
4 Mary travelled to the hallway.
5 Where was the milk before the hallway? \tgarden\t2 4 1
"""


def write_babi(folder: Path) -> Path:
    """The files that suite ``focus`` reads, with a few made-up stories."""
    folder.mkdir(exist_ok=True)
    (folder / "qa2_two-supporting-facts_test.txt").write_text(BABI_QA2)
    (folder / "qa3_three-supporting-facts_test.txt").write_text(BABI_QA3)
    return folder


def lexical_lens(folder: Path, width: int) -> Path:
    """An untrained lens that follows the lexical index, for a base and gists of one width."""
    config = LensNetConfig(
        d_model=width, gist_width=width, key_width=16, d_hidden=32, d_ff=48, lexical_prior=1.0
    )
    LensNet(config).save_pretrained(folder)
    return folder
