"""The checkpoints that belong to a base model: GistNet and LensNet, as bundled or as named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from megacontext.errors import CheckpointError
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.gist_features import features_misfit
from megacontext.runtime.model_loading import BUNDLED_PREFIX

BUNDLED = "bundled"
MEAN = "mean"
NO_LENS = "none"


def load_gistnet(name: str | Path | None, base: BaseModel, model: str) -> GistNet:
    """The GistNet to use with a base model.

    Args:
        name: folder of a checkpoint; ``bundled``: the one shipped with the model; ``mean``, as
            ``None``: a gist is the mean of its span's embeddings.
        base: the model.
        model: the name it was loaded by.

    Raises:
        CheckpointError: the folder holds no GistNet, or one for a model of another shape; or none
            is shipped with the model.
    """
    if name == BUNDLED:
        name = bundled_gistnet(model)
        if name is None:
            raise CheckpointError(
                f"no GistNet is shipped with {model}; name the folder of one, or `mean`"
            )
    if name is None or name == MEAN:
        return GistNet.untrained(base.d_model).to(base.device)
    gistnet = GistNet.from_pretrained(Path(name), dtype=torch.float32, device=base.device)
    require_fit(gistnet, base)
    return gistnet


def load_lens(
    name: str | Path | None, base: BaseModel, gistnet: GistNet, model: str
) -> LensNet | None:
    """The LensNet to use with a base model and its GistNet.

    Args:
        name: folder of a checkpoint, or ``none``. ``None``: the one bundled with the model, where
            there is one and it was trained on these gists.
        base: the model.
        gistnet: makes the gists.
        model: the name the base was loaded by.

    Raises:
        CheckpointError: the folder holds no LensNet, or one for another base or other gists.
    """
    if name == NO_LENS:
        return None
    folder = _bundled(model, "lensnet") if name is None else str(name)
    if folder is None:
        return None
    lens = LensNet.from_pretrained(Path(folder), dtype=torch.float32)
    config = lens.config
    made_for, needed = (
        (config.d_model, config.gist_width),
        (base.d_model, gistnet.config.gist_width),
    )
    trained_on = config.gist_version or gistnet.version
    if made_for == needed and trained_on == gistnet.version:
        return lens
    if name is None:
        return None
    raise CheckpointError(
        f"{folder}: the LensNet was made for (d_model, gist_width) = {made_for} and GistNet "
        f"{trained_on}, here they are {needed} and {gistnet.version}; train one for these gists"
    )


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
    problem = features_misfit(config, base)
    if problem is not None:
        raise CheckpointError(f"the GistNet's {problem}; train one for {base.name}")


def bundled_gistnet(model: str) -> str | None:
    """Folder of the GistNet shipped with a bundled model; ``None`` where there is none."""
    return _bundled(model, "gistnet")


def _bundled(model: str, kind: str) -> str | None:
    if not model.startswith(BUNDLED_PREFIX):
        return None
    name = model.removeprefix(BUNDLED_PREFIX)
    folder = Path(str(resources.files("megacontext") / "assets" / name / kind))
    return str(folder) if (folder / "config.json").is_file() else None
