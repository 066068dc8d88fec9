"""Trained weights as float16 safetensors, in files small enough to travel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

_SHARD = 14 * 2**20  # bytes


def save(model: nn.Module, folder: Path, name: str) -> list[Path]:
    """Writes ``NAME-0.safetensors`` and so on; raises ``ValueError`` for a weight that float16 cannot hold."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, value in model.state_dict().items():
        half = value.detach().to("cpu", torch.float16).contiguous()
        if not half.isfinite().all():
            raise ValueError(f"{name}: {key} does not fit into float16")
        if filled and filled + half.nbytes > _SHARD:
            shards.append({})
            filled = 0
        shards[-1][key] = half
        filled += half.nbytes
    paths = [folder / f"{name}-{index}.safetensors" for index in range(len(shards))]
    for old in folder.glob(f"{name}-*.safetensors"):
        old.unlink()
    for shard, path in zip(shards, paths, strict=True):
        save_file(shard, path)
    return paths


def load(model: nn.Module, folder: Path, name: str) -> None:
    """Fills ``model`` with all of its weights; raises ``FileNotFoundError`` without files, ``RuntimeError`` where they
    are another model's.
    """
    from safetensors.torch import load_file

    paths = sorted(folder.glob(f"{name}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no {name}-*.safetensors")
    state: dict[str, Tensor] = {}
    for path in paths:
        state |= load_file(path)
    model.load_state_dict(state)
