"""Configuration of suite ``focus``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megacontext.config import FrozenConfig
from megacontext.evaluation.focus_questions import FOCUS_KINDS, FocusKind
from megacontext.runtime.engine import EngineConfig

FocusPolicyName = Literal["recency", "lexical", "likelihood", "attention", "lens", "oracle"]

_LENGTH = re.compile(r"(\d+)([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}


class FocusSuiteConfig(FrozenConfig):
    """What the suite asks, of whom, and how long the histories are.

    Attributes:
        model: base model.
        gistnet: GistNet checkpoint, ``bundled`` or ``mean``, which is the default.
        lens: LensNet checkpoint; the one bundled with the model, if it fits the gists, if none.
        lengths: tokens of the histories; in text ``4k`` is four thousand, ``1m`` a million, and
            several are separated by commas.
        policies: what to compare; in text separated by commas.
        kinds: of questions; in text separated by commas.
        groups: groups of questions; every history holds as many as fit.
        asked: questions of each kind in a group.
        together: most groups in one history.
        babi: folder with the published bAbI v1.1 files; kinds ``babi_…`` are left out without.
        corpus: text files whose held-out documents are the noise, in the order in which the base
            was trained on them; the bundled book if there are none.
        in_window_noise: tokens of noise around the evidence where it alone is in the window.
        max_new_tokens: most tokens of an answer, notes included.
        prose_streams: streams of prose that every policy reads on in; 0 leaves prose out.
        prose_history: tokens that were read before each of them.
        prose_blocks: blocks of each stream.
        cost_samples: refocuses whose time is taken beside a decode step; 0 leaves them out.
        work: folder in which results are kept, so that an interrupted run goes on; none if none.
            Results of another configuration or other weights are not used, but those of other
            code are: empty the folder when the code has changed.
        engine: budget and habits.
        seed: of everything.
    """

    model: str = "bundled:tiny"
    gistnet: str | Path | None = None
    lens: str | Path | None = None
    lengths: tuple[int, ...] = (4_000, 32_000, 256_000, 1_000_000)
    policies: tuple[FocusPolicyName, ...] = (
        "recency",
        "lexical",
        "likelihood",
        "attention",
        "lens",
        "oracle",
    )
    kinds: tuple[FocusKind, ...] = FOCUS_KINDS
    groups: int = Field(default=50, ge=1, le=1_000)
    asked: int = Field(default=4, ge=1, le=16)
    together: int = Field(default=10, ge=1, le=10)
    babi: Path | None = Path("../shared/eval/babi")
    corpus: tuple[Path, ...] = ()
    in_window_noise: int = Field(default=128, ge=0)
    max_new_tokens: int = Field(default=64, ge=1)
    prose_streams: int = Field(default=4, ge=0)
    prose_history: int = Field(default=8_000, ge=1)
    prose_blocks: int = Field(default=50, ge=1)
    cost_samples: int = Field(default=20, ge=0)
    work: Path | None = None
    engine: EngineConfig = EngineConfig()
    seed: int = 0

    @field_validator("lengths", mode="before")
    @classmethod
    def _read_lengths(cls, value: Any) -> Any:
        return tuple(_length(one) for one in _listed(value))

    @field_validator("policies", "kinds", mode="before")
    @classmethod
    def _read_names(cls, value: Any) -> Any:
        return _listed(value)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("lengths", "policies", "kinds"):
            values: tuple[object, ...] = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {list(values)}; name at least one, and each once")
        return self


def _listed(value: Any) -> Any:
    """The parts of a text; a number alone counts as one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int) else value


def _length(value: Any) -> Any:
    """Tokens; ``4k`` is four thousand."""
    if isinstance(value, str):
        found = _LENGTH.fullmatch(value)
        if found is None or not int(found[1]):
            raise ValueError(f"a length is {value!r}; write for example 4k, 256k or 1m")
        return int(found[1]) * _UNITS[found[2].lower()]
    return value
