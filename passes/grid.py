"""Token grids, read from the patch embedding."""

from __future__ import annotations

import re
from math import prod

from onnx import NodeProto

from attncompile.core.errors import BadArguments
from attncompile.core.grid import TokenGrid
from attncompile.core.site import AttentionSite
from attncompile.passes.evaluate import GraphIndex, World

_THROUGH = frozenset({"Reshape", "Transpose", "Flatten", "Add", "Identity", "Cast", "LayerNormalization", "Unsqueeze"})


def parse_grid(text: str) -> TokenGrid:
    """``HxW``, ``N`` or ``TxHxW``, then ``+PREFIX`` and ``+SUFFIX``: ``14x14+1`` is a class token before a 14x14 grid.

    Raises:
        BadArguments: any other text.
    """
    match = re.fullmatch(r"(\d+(?:x\d+){0,2})(?:\+(\d+))?(?:\+(\d+))?", text)
    if match is None or "0" in match[1].split("x"):
        raise BadArguments(f"--grid '{text}' is not a grid", "write HxW[+PREFIX[+SUFFIX]], such as 14x14+1")
    shape = tuple(int(n) for n in match[1].split("x"))
    return TokenGrid(shape, int(match[2] or 0), int(match[3] or 0), "given by --grid")


def infer_grid(
    index: GraphIndex, world: World, site: AttentionSite, given: TokenGrid | None = None
) -> TokenGrid | None:
    """The grid of a self-attention site whose tokens come from a patch embedding, else None.

    A ``given`` grid is taken for every self-attention site that has its number of tokens.
    """
    if site.query_length != site.key_length:
        return None
    if given is not None:
        return given if given.tokens == site.query_length else None
    found = None
    for node in index.order:
        if node.op_type != "Conv" or not _is_patchify(node):
            continue
        shape = world.shapes.get(node.output[0])
        if shape is None or len(shape) not in (4, 5):
            continue
        grid = _follow(index, world, node, shape[2:], int(site.query_length))
        if grid is not None:
            if found is not None and found != grid:
                return None  # two patch embeddings disagree: the user has to say
            found = grid
    return found


def _is_patchify(node: NodeProto) -> bool:
    attributes = {a.name: list(a.ints) for a in node.attribute if a.ints}
    kernel, strides = attributes.get("kernel_shape"), attributes.get("strides")
    return kernel is not None and kernel == strides and max(kernel) > 1


def _follow(
    index: GraphIndex, world: World, conv: NodeProto, spatial: tuple[int, ...], tokens: int
) -> TokenGrid | None:
    """From the convolution to the tokens; a Concat on the way adds prefix or suffix tokens."""
    prefix = suffix = 0
    value = conv.output[0]
    for _ in range(12):
        if prefix + prod(spatial) + suffix == tokens and len(world.shapes.get(value, ())) == 3:
            evidence = f"patch embedding '{conv.name or conv.output[0]}' gives {'x'.join(map(str, spatial))}"
            return TokenGrid(tuple(spatial), prefix, suffix, evidence)
        readers = [n for n in index.consumers.get(value, []) if n.op_type in _THROUGH or n.op_type == "Concat"]
        if not readers:
            return None
        node = readers[0]
        if node.op_type == "Concat":
            axis = next(a.i for a in node.attribute if a.name == "axis")
            sizes = [world.shapes.get(i, (0,) * 3)[axis] for i in node.input]
            at = list(node.input).index(value)
            prefix, suffix = prefix + sum(sizes[:at]), suffix + sum(sizes[at + 1 :])
        value = node.output[0]
    return None
