"""Models and habits of a run of the suite ``proof``, and digests that tell two set-ups apart."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from megacontext.evaluation.proof_config import ProofSuiteConfig
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.session import Session, SessionConfig

# Those whose answers depend on gists, keys and the focus.
_ENGINES = ("megacontext", "gists_only", "focus_only", "oracle")
_VALUES_PER_WEIGHT = 1024


class ProofSetup:
    """What all rivals share.

    Args:
        config: the suite's.

    Raises:
        ModelError: the base model or a checkpoint cannot be loaded.
        ConfigError: the dtype or device does not exist here.
    """

    def __init__(self, config: ProofSuiteConfig) -> None:
        session = Session(
            SessionConfig(
                model=config.model,
                dtype=config.dtype,
                device=config.device,
                gistnet=config.gistnet,
                lens=config.lens,
            )
        )
        self.config = config
        self.base = session.base
        self.gistnet = session.gistnet
        self.lens = session.lens
        self.habits = config.habits
        if self.habits.policy == "auto":
            policy = "lexical" if self.lens is None else "lens"
            self.habits = self.habits.model_copy(update={"policy": policy})
        self._base_digest = weights_digest(self.base)
        self._versions = {
            "gistnet": self.gistnet.version,
            "lens": "none" if self.lens is None else self.lens.version,
        }

    def digest(self, rival: str, questions: Mapping[str, Any]) -> str:
        """Changes with everything that a rival's answers depend on, the code left out.

        Args:
            rival: name of the rival.
            questions: settings of the questions.
        """
        habits = self.habits.model_dump(mode="json")
        facts: dict[str, Any] = {"base": self._base_digest, "questions": dict(questions)}
        if rival.split(".", maxsplit=1)[0] in _ENGINES:
            facts |= {"habits": habits, **self._versions}
        else:
            engine = habits.pop("engine")
            for name in ("policy", "look_again"):
                del habits[name]
            facts |= {
                "habits": habits,
                "budget": engine["budget"],
                "query_tokens": engine["query_tokens"],
                "block_size": self.gistnet.config.block_size,
            }
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def described(self) -> dict[str, Any]:
        """What a reader of the results has to know."""
        config, engine = self.config, self.habits.engine
        return {
            "base_digest": self._base_digest,
            "device": config.device,
            "dtype": config.dtype,
            "budget": engine.budget,
            "tail_tokens": engine.tail_tokens,
            "asked_tail_tokens": engine.asked_tail_tokens,
            "positions": engine.positions,
            "policy": self.habits.policy,
            **self._versions,
            "noise": [path.name for path in config.corpus] or ["the bundled book"],
            "questions": config.questions,
            "questions_at": dict(config.questions_at),
            "facts": config.facts,
            "asked": config.asked,
            "wording": config.wording,
            "depth_questions": config.depth_questions,
            "slow_rivals": [name for name in config.names if name in config.slow_rivals],
            "slow_questions": config.slow_questions,
            "readers": [name for name in config.names if name in config.readers],
            "readers_up_to": config.readers_up_to,
            "readers_recall_up_to": config.readers_recall_up_to,
            "readers_by_question": [
                name for name in config.names if name in config.readers_by_question
            ],
            "readers_skip": list(config.readers_skip),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "machine": f"{platform.system()} {platform.machine()}",
        }


def weights_digest(base: BaseModel) -> str:
    """Hash of a model's name, tokenizer, and the first values of every weight; 16 digits."""
    digest = hashlib.sha256(f"{base.name} {base.tokenizer_hash}".encode())
    for name, weight in base.model.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        first = weight.detach().flatten()[:_VALUES_PER_WEIGHT].float().cpu().contiguous()
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]
