"""What the rivals of a comparison have in common, and their own few habits."""

from __future__ import annotations

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.policy_names import PolicyName


class RivalsConfig(FrozenConfig):
    """Budget and habits of all rivals.

    Attributes:
        engine: of MegaContext and its variants; its ``budget`` is everybody's.
        policy: focus policy of ``megacontext`` and ``focus_only``; ``auto``: ``lens`` where there
            is a LensNet, else ``lexical``.
        look_again: text behind which MegaContext's focus looks again while it answers.
        sink_tokens: first tokens of the history that ``sink_window`` keeps.
        recent_share: of the room for history, what retrieving rivals keep for the newest tokens
            at least; they get all that the blocks found leave over, too.
        few_hits: how many hits ``bm25_few`` and ``dense_few`` read, of all that would fit.
        few_recent_tokens: how many of the newest tokens these read.
        neighbours: how many blocks before and behind a block found are read with it.
        key_layers: layers whose keys ``own_keys`` and ``infllm`` compare; all if empty. Of a long
            history ``own_keys`` keeps much: see there.
        key_tokens: tokens that represent a block in ``infllm``.
        chunk_tokens: how many tokens ``kvpress`` reads between two compressions, where a history
            is too long to be read at once.
    """

    engine: EngineConfig = EngineConfig()
    policy: PolicyName = "auto"
    look_again: str = "."
    sink_tokens: int = Field(default=4, ge=1)
    recent_share: float = Field(default=0.25, gt=0.0, le=1.0)
    neighbours: int = Field(default=1, ge=0)
    few_hits: int = Field(default=8, ge=1)
    few_recent_tokens: int = Field(default=64, ge=1)
    key_layers: tuple[int, ...] = ()
    key_tokens: int = Field(default=4, ge=1)
    chunk_tokens: int = Field(default=256, ge=1)
