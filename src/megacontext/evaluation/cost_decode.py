"""What decoding costs with a memory beside the base alone, by turns in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.runtime.answer import DecodedToken
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.plain_decode import decode_plain, raw_context
from megacontext.runtime.sampling import TokenSampler

PLAIN: Final = "plain"

# Greedy, and no token ends the text: every sample shall be equally long.
_SAMPLING: Final[dict[str, Any]] = {"do_sample": False, "eos_token_id": ()}

Arm = Callable[[str], float]
"""Decodes behind a prompt; seconds per token after the first."""


Clock = Callable[[], float]
"""Seconds since any moment."""


@dataclass(frozen=True)
class DecodeTimes:
    """Seconds per token of every arm, the same samples in the same order."""

    seconds: Mapping[str, Sequence[float]]


def time_arms(arms: Mapping[str, Arm], prompts: Sequence[str]) -> DecodeTimes:
    """Times all arms on each prompt by turns, beginning with another one every time.

    Args:
        arms: what to time, by name.
        prompts: one sample each; the first warms up and does not count.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(arms[name](prompt))
    return DecodeTimes({name: values[1:] for name, values in seconds.items()})


def engine_arm(engine: Engine, n_tokens: int, clock: Clock, *, remember: bool = False) -> Arm:
    """Decoding from a memory: a refocus after every block.

    Args:
        engine: its focus returns to where it stands unless the answer is remembered.
        n_tokens: tokens after the first.
        clock: times them.
        remember: whether prompt and answer join the memory.
    """

    def run(prompt: str) -> float:
        tokens = engine.generate(
            prompt, max_new_tokens=n_tokens + 1, remember=remember, **_SAMPLING
        )
        return seconds_per_token(tokens, clock)

    return run


def plain_arm(base: BaseModel, history: Tensor, n_tokens: int, clock: Clock) -> Arm:
    """The base alone behind a window of raw tokens: no memory, no refocus.

    Args:
        base: the same base model.
        history: ``[n]`` int64, what the window shows with the prompt behind it; its oldest tokens
            make room for prompt and answer, so that the window has never more than ``n`` rows.
        n_tokens: tokens after the first.
        clock: times them.

    Raises:
        InputError: prompt and answer leave no room for history.
    """

    @torch.inference_mode()
    def run(prompt: str) -> float:
        ids = base.encode(prompt)
        room = len(history) - len(ids) - n_tokens
        if room < 1:
            raise InputError(
                f"a window of {len(history)} tokens has no room for a prompt of {len(ids)} and "
                f"{n_tokens} tokens; lower decode_blocks"
            )
        shown = torch.cat((history[len(history) - room :], ids))
        tokens = decode_plain(
            base,
            base.prefill(raw_context(base, shown), keep=1),
            ids,
            TokenSampler(base.generation_config, **_SAMPLING),
            max_new_tokens=n_tokens + 1,
        )
        return seconds_per_token(tokens, clock)

    return run


def seconds_per_token(tokens: Iterator[DecodedToken], clock: Clock) -> float:
    """Seconds per token after the first: what came before it is reading, not decoding.

    Raises:
        InputError: there are fewer than two tokens.
    """
    first = last = next(tokens, None)
    started = clock()
    for token in tokens:
        last = token
    seconds = clock() - started
    if first is None or last is None or last.index == first.index:
        raise InputError("fewer than two tokens were decoded; nothing can be timed")
    return seconds / (last.index - first.index)
