"""An auxiliary task for the base model: keep track of a story's world, sentence by sentence.

A question asks for one fact of a whole story; this head asks for several after every sentence, from
the hidden state of the sentence's last token. So answers that need two or three sentences have
dense supervision on the way. The head serves training alone and is thrown away.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from megacontext.config import FrozenConfig
from megacontext.tasks.documents import RELATIONS


class StateHeadConfig(FrozenConfig):
    """Where the head reads and how much it counts.

    Attributes:
        layer: layer after which it reads, counted from 1; 0 leaves the head out. Later layers are
            free to read what earlier tokens kept.
        weight: of its loss.
        d_hidden: inner width.
    """

    layer: int = Field(default=0, ge=0)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    d_hidden: int = Field(default=512, ge=8)


class StateHead(nn.Module):
    """Names the value of a relation of an entity, given a hidden state.

    Args:
        d_model: width of hidden states and embeddings.
        config: its inner width.
    """

    def __init__(self, d_model: int, config: StateHeadConfig) -> None:
        super().__init__()
        self.relation_embed = nn.Embedding(len(RELATIONS), d_model)
        self.norm = nn.RMSNorm(d_model)
        self.up = nn.Linear(2 * d_model, config.d_hidden)
        self.down = nn.Linear(config.d_hidden, d_model)

    def forward(self, hidden: Tensor, states: Tensor, table: Tensor) -> Tensor:
        """Mean NLL of the values' first tokens, in nats.

        Args:
            hidden: ``[batch, length, d_model]``.
            states: int64 ``[n, 5]``, see :class:`~megacontext.training.lm_batches.LMBatch`; those
                at positions that ``hidden`` does not reach do not count.
            table: ``[vocab, d_model]`` token embeddings.
        """
        states = states[states[:, 1] < hidden.shape[1]]
        if not len(states):
            return hidden.new_zeros((), dtype=torch.float32)
        row, position, relation, entity, value = states.unbind(1)
        asked = F.rms_norm(table[entity], table.shape[1:]) + self.relation_embed(relation)
        x = torch.cat((self.norm(hidden[row, position]), asked), dim=-1)
        named = F.rms_norm(self.down(F.silu(self.up(x))), table.shape[1:])
        return F.cross_entropy((named @ table.T).float(), value)
