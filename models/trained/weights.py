"""Trained weights as float16 safetensors, in files small enough to travel; and read back from an exported file."""

from __future__ import annotations

import ast
from pathlib import Path

import onnx
import torch
from onnx.numpy_helper import to_array
from torch import Tensor, nn

SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules that a node stands in
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


def load(model: nn.Module, path: Path, name: str) -> None:
    """Fills ``model`` with all of its weights, from a folder of safetensors or from the ONNX file that ``export`` made.

    Raises ``FileNotFoundError`` without files, ``RuntimeError`` where they are another model's.
    """
    model.load_state_dict(_of_onnx(path, set(model.state_dict())) if path.suffix == ".onnx" else _of_folder(path, name))


def _of_folder(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    paths = sorted(folder.glob(f"{name}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no {name}-*.safetensors")
    state: dict[str, Tensor] = {}
    for path in paths:
        state |= load_file(path)
    return state


def _of_onnx(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The exporter keeps the names of all but the matrices that it transposed; those are named by their node's scope,
    ``layers.0.attention.q_proj`` before the node itself.
    """
    graph = onnx.load(path).graph
    stored = {item.name: item for item in graph.initializer}
    state = {name: torch.from_numpy(to_array(stored[name]).copy()) for name in wanted & stored.keys()}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in stored:
            continue
        scopes = next(entry.value for entry in node.metadata_props if entry.key == SCOPES)
        key = f"{ast.literal_eval(scopes)[-2]}.weight"
        if key in wanted - state.keys():
            state[key] = torch.from_numpy(to_array(stored[node.input[1]]).T.copy())
    return state
