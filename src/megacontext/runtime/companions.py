"""The checkpoints that belong to a base model: its GistNet, as bundled or as named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from megacontext.errors import CheckpointError
from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.model_loading import BUNDLED_PREFIX

MEAN = "mean"


def load_gistnet(name: str | Path | None, base: BaseModel, model: str) -> GistNet:
    """The GistNet to use with a base model.

    Args:
        name: folder of a checkpoint, or ``mean``: a gist is the mean of its span's embeddings.
            ``None``: the one bundled with the model, or ``mean`` where there is none.
        base: the model.
        model: the name it was loaded by.

    Raises:
        CheckpointError: the folder holds no GistNet, or one for a model of another shape.
    """
    if name is None:
        name = bundled_gistnet(model) or MEAN
    if name == MEAN:
        return GistNet.untrained(base.d_model).to(base.device)
    gistnet = GistNet.from_pretrained(Path(name), dtype=torch.float32, device=base.device)
    require_fit(gistnet, base)
    return gistnet


def require_fit(gistnet: GistNet, base: BaseModel) -> None:
    """Refuses a GistNet that was made for a base of another shape.

    Raises:
        CheckpointError: says which shape it was made for.
    """
    config = gistnet.config
    made_for, needed = [config.d_model], [base.d_model]
    if config.reader == "kv":
        made_for += [config.kv_layers, config.kv_heads, config.kv_head_dim, config.kv_value_dim]
        needed += [base.n_layers, base.n_kv_heads, base.head_dim, base.value_dim]
    if made_for != needed:
        raise CheckpointError(
            f"the GistNet was made for a base with (d_model, layers, kv_heads, head_dim, "
            f"value_dim) = {made_for}, {base.name} has {needed}; train one for {base.name}"
        )


def bundled_gistnet(model: str) -> str | None:
    """Folder of the GistNet shipped with a bundled model; ``None`` where there is none."""
    if not model.startswith(BUNDLED_PREFIX):
        return None
    name = model.removeprefix(BUNDLED_PREFIX)
    folder = Path(str(resources.files("megacontext") / "assets" / name / "gistnet"))
    return str(folder) if (folder / "config.json").is_file() else None
