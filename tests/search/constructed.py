"""A model whose heads have patterns that are known: they are made by positions, contents only blur them.

x [1, N, C] -> y [1, N, C]: ``layers`` times x + attention(x) W. Heads in order: near tokens, the first tokens, one
stripe of tokens, all tokens alike. On a grid also: ``column``, tokens that are as far along its last axis, ``place``,
those that are at the same place of its last two axes, ``round``, those near by on all axes, with a weight that falls
like exp(-distance ** 2 / (2 * NEAR ** 2)). ``far``: near tokens, and a little of all others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS = ("local", "sink", "stripe", "dense")
NEAR = 3.0


def positions(
    kind: str, tokens: int, dim: int, stripe: int, grid: tuple[int, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Constants [N, dim] that are added to queries and keys."""
    query, key = np.zeros((tokens, dim)), np.zeros((tokens, dim))
    place = np.arange(tokens)
    if kind == "round":
        # -|a - b|^2 / 2 is a . b - |b|^2 / 2 and what all keys of a query have in common.
        where = np.stack(np.unravel_index(place, grid), axis=1) - np.array(grid) / 2
        axes, root = slice(0, len(grid)), dim**0.25
        query[:, axes] = key[:, axes] = root * where / NEAR
        query[:, len(grid)] = root**2
        key[:, len(grid)] = -np.square(where / NEAR).sum(axis=1) / 2
        return query, key
    if kind in ("column", "place"):
        place = place % (grid[-1] if kind == "column" else grid[-1] * grid[-2])
        waves = np.geomspace(0.02, 2.5, dim // 2)
        turned = np.concatenate([np.cos(place[:, None] * waves), np.sin(place[:, None] * waves)], axis=1)
        return 3.6 * turned, 3.6 * turned
    if kind in ("local", "far"):
        # sum of cosines of the distance: a peak about 20 tokens wide
        size = 3.2 if kind == "local" else 1.9
        waves = np.geomspace(0.01, 0.12, dim // 2)
        turned = np.concatenate([np.cos(place[:, None] * waves), np.sin(place[:, None] * waves)], axis=1)
        return size * turned, size * turned
    if kind in ("sink", "stripe"):
        query[:, 0] = 4.0
        there = place < 20 if kind == "sink" else (place >= stripe) & (place < stripe + 20)
        key[there, 0] = 10.0
    return query, key


def build(
    tokens: int = 512, layers: int = 2, dim: int = 16, causal: bool = True, seed: int = 0,
    kinds: tuple[str, ...] = HEADS, dynamic: bool = False, grid: tuple[int, ...] = (), timed: str | None = None,
) -> onnx.ModelProto:  # fmt: skip
    rng = np.random.default_rng(seed)
    heads, width = len(kinds), len(kinds) * dim
    stored: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def const(value: np.ndarray, name: str) -> str:
        stored.append(numpy_helper.from_array(value.astype(np.int64 if value.dtype.kind == "i" else np.float32), name))
        return name

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"t{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    shape = const(np.array([0, 0 if dynamic else tokens, heads, dim]), "shape")
    back = const(np.array([0, 0 if dynamic else tokens, width]), "back")
    root = const(np.array(dim**-0.5), "root")
    x = "x"
    if timed is not None:  # t, a float32 scalar, or [timed], scales x a little
        size = op("Add", op("Mul", "t", const(np.array(0.1), "tenth")), const(np.array(1.0), "one"))
        x = op("Mul", x, op("Reshape", size, const(np.array([-1, 1, 1]), "over_tokens")))
    for layer in range(layers):
        parts = []
        offsets = [positions(kind, tokens, dim, tokens // 2 + 40, grid) for kind in kinds]
        for i, what in enumerate(("q", "k", "v")):
            spread = (0.35, 0.35, 1.0)[i] / np.sqrt(width)
            part = op("MatMul", x, const(rng.standard_normal((width, width)) * spread, f"{what}{layer}"))
            if what != "v" and not dynamic:
                added = np.concatenate([o[i] for o in offsets], axis=1)
                part = op("Add", part, const(added[None], f"{what}{layer}_at"))
            parts.append(op("Transpose", op("Reshape", part, shape), perm=[0, 2, 1, 3]))
        query, key, value = parts
        scores = op("Mul", op("MatMul", query, op("Transpose", key, perm=[0, 1, 3, 2])), root)
        if causal:
            if layer == 0:
                const(np.where(np.tri(tokens, dtype=bool), 0, -np.inf)[None, None], "mask")
            scores = op("Add", scores, "mask")
        out = op("MatMul", op("Softmax", scores, axis=-1), value)
        out = op("Reshape", op("Transpose", out, perm=[0, 2, 1, 3]), back)
        out = op("MatMul", out, const(rng.standard_normal((width, width)) / np.sqrt(width), f"o{layer}"))
        x = op("Add", x, out)
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    length: int | str = "n" if dynamic else tokens
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, length, width]) for n in ("x", "y")]
    if timed is not None:
        values.insert(1, helper.make_tensor_value_info("t", TensorProto.FLOAT, [timed] if timed else []))
    graph = helper.make_graph(nodes, "constructed", values[:-1], values[-1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def feeds(count: int, tokens: int = 512, width: int = 64, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, tokens, width)).astype(np.float32)} for _ in range(count)]


def write(folder: Path, model: onnx.ModelProto, given: list[dict[str, np.ndarray]]) -> tuple[Path, Path]:
    """Paths of the model and of Polygraphy's JSON of the inputs."""
    from polygraphy.json import save_json

    path, inputs = folder / "model.onnx", folder / "inputs.json"
    onnx.save(model, path)
    save_json(given, str(inputs))
    return path, inputs
