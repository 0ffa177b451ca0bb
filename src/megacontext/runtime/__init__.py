"""The runtime: a frozen language model, the working context it reads, and what changes it."""

from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.engine import (
    DecodedToken,
    Engine,
    EngineConfig,
    EngineState,
    Explanation,
)
from megacontext.runtime.focus_allocator import AllocatorConfig, FocusAllocator
from megacontext.runtime.focus_loop import FocusRecord
from megacontext.runtime.focus_policies import (
    AttentionPolicy,
    FocusPolicy,
    FocusView,
    LexicalPolicy,
    RecencyPolicy,
)
from megacontext.runtime.focus_scores import AllocatorState, Edit, FocusPlan, FocusScores
from megacontext.runtime.lens_policy import LensPolicy
from megacontext.runtime.oracle_policy import OraclePolicy
from megacontext.runtime.regist import regist
from megacontext.runtime.sampling import SamplingConfig, TokenSampler
from megacontext.runtime.session import DecodeConfig, Session, SessionConfig
from megacontext.runtime.session_batch import SessionBatch
from megacontext.runtime.working_context import WorkingContext

__all__ = [
    "AllocatorConfig",
    "AllocatorState",
    "AttentionPolicy",
    "BaseModel",
    "ContextInput",
    "DecodeConfig",
    "DecodedToken",
    "Edit",
    "Engine",
    "EngineConfig",
    "EngineState",
    "Explanation",
    "FocusAllocator",
    "FocusPlan",
    "FocusPolicy",
    "FocusRecord",
    "FocusScores",
    "FocusView",
    "LensPolicy",
    "LexicalPolicy",
    "OraclePolicy",
    "RecencyPolicy",
    "SamplingConfig",
    "Session",
    "SessionBatch",
    "SessionConfig",
    "TokenSampler",
    "WorkingContext",
    "regist",
]
