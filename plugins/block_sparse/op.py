"""The op ``attncompile::BlockSparseAttention`` (version 1): its schema and the lists that say what a query sees.

Inputs: ``query`` [B, Nq, H, D], ``key`` [B, Nk, Hkv, D], ``value`` [B, Nk, Hkv, Dv], each in the axis order that its
layout attribute says, and the lists, all int32, which a file holds or other ops make on the GPU. Scores are cut into
squares of ``block`` queries and keys (a multiple of 32), R = ceil(Nq / block) rows of them:

- ``rows`` [b, h, R, 3], b 1 or B, h 1 or H: (p, f, e) of each row of blocks. Its entries are p .. f - 1, partial
  blocks, and f .. e - 1, full ones; rows need not follow one another, and there may be entries that no row has;
- ``columns`` [E]: the block of keys of an entry;
- ``kinds`` [E]: which of ``masks`` says what is visible in a partial block; not read for full ones;
- ``masks`` [U, block, block / 32]: bit j % 32 of word j // 32 says whether the row's query sees key j of the block.

All pairs of a full block are visible, and all its keys exist: a block that reaches beyond the last key is a partial
one, in which keys that do not exist are hidden whatever its bits. A block that is listed twice counts twice. There are
at least one entry and one mask.

Optional: ``key_mask`` bool, broadcastable to [B, 1, 1, Nk], True = visible; ``bias``, broadcastable to [B, H, Nq, Nk],
added to the scores; ``sinks``, [H] logits or [1], finite, that join the softmax and that no value belongs to; ``order``
int32 [b * h * R], a permutation in which rows of blocks, counted n = (b * h + h) * R + r, are best begun: it changes
how long a launch takes, not what it gives; ``counts`` int32 [E]: the weights of an entry's keys are multiplied by it.

Outputs: ``output`` [B, Nq, H, Dv] in ``o_layout``; ``log_sum_exp`` (optional) [B, H, Nq] float32, the natural logarithm
of what a query's weights were divided by, its sink included, -inf where there is nothing. ``masked_rows`` is what a
query without any visible key gives; with a sink it gives zero, since the sink takes all the weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, defs, helper, numpy_helper
from onnx.defs import OpSchema

from attncompile.plugins import schemas
from attncompile.plugins.attention.op import infer_outputs
from attncompile.plugins.body import DOMAIN, LAYOUTS, overload_of
from attncompile.plugins.neighborhood.call import Call

OP_TYPE = "BlockSparseAttention"
VERSION = 1
LISTS = ("rows", "columns", "kinds", "masks")
"""Formal inputs after query, key and value."""

OPTIONAL = ("key_mask", "bias", "sinks", "order", "counts")
"""Formal inputs after the lists, in order."""

BLOCKS = (64, 128)
"""Edges of blocks that kernels take."""

SMALLER = 1.25
"""Blocks of 64 are taken for a mask where those of 128 would hold more than this times the scores: what one of them
costs beyond its scores, estimated, not measured.
"""

_WORD = 32


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The inputs of the op that say a mask, as the schema has them. ``counts`` is None where all keys count once."""

    block: int
    rows: np.ndarray
    columns: np.ndarray
    kinds: np.ndarray
    masks: np.ndarray
    order: np.ndarray
    counts: np.ndarray | None = None

    def arrays(self) -> Mapping[str, np.ndarray]:
        """By the formal names of the inputs, in their order."""
        found = {"rows": self.rows, "columns": self.columns, "kinds": self.kinds, "masks": self.masks}
        return {**found, "order": self.order, **({} if self.counts is None else {"counts": self.counts})}

    @property
    def scores(self) -> int:
        """Score elements of the listed blocks."""
        return int((self.rows[..., 2] - self.rows[..., 0]).sum()) * self.block**2

    @property
    def digest(self) -> str:
        """Of all that the lists say; equal lists have the same."""
        parts = [f"{name}{x.shape}".encode() + x.tobytes() for name, x in self.arrays().items()]
        return hashlib.sha256(str(self.block).encode() + b"".join(parts)).hexdigest()[:16]

    def initializers(self) -> list[TensorProto]:
        """Named by their contents, so that nodes with equal masks can share them."""
        return [numpy_helper.from_array(x, f"{OP_TYPE}/{self.digest}/{n}") for n, x in self.arrays().items()]


def lists(counts: np.ndarray, block: int = 0) -> Lists:
    """The lists for ``counts`` ([Nq, Nk], or [h, Nq, Nk]): how often each key counts, 0 or False where it is hidden;
    ``order`` begins with the rows that have the most blocks. ``block`` 0: 64 or 128, whichever is likely faster.
    """
    if not block:
        small, large = (lists(counts, edge) for edge in BLOCKS)
        return small if large.scores > SMALLER * small.scores else large
    sets = counts.reshape((-1, *counts.shape[-2:]))
    height, width = sets.shape[1:]
    rows, columns = -(-height // block), -(-width // block)
    padded = np.zeros((len(sets), rows * block, columns * block), np.uint8)
    padded[:, :height, :width] = sets
    blocks = padded.reshape(len(sets), rows, block, columns, block).swapaxes(2, 3)  # [h, rows, columns, ., .]
    # Queries that do not exist do not make a block partial; keys that do not exist do.
    high = np.minimum(block, height - np.arange(0, height, block))
    whole = np.repeat(high[:, None] * block, columns, axis=1)
    if width % block:
        whole[:, -1] = -1
    where: list[np.ndarray] = [np.zeros((0, 5), np.int64)]
    bits: list[np.ndarray] = [np.zeros((0, block, block // 8), np.uint8)]
    for times in np.unique(padded[padded > 0]):
        same = blocks == times
        count = same.sum(axis=(3, 4), dtype=np.int64)
        at = np.argwhere(count > 0)
        full = (count == whole[None])[tuple(at.T)]
        where.append(np.concatenate([at, np.full((len(at), 1), times), full[:, None]], axis=1))
        bits.append(np.packbits(same[tuple(at[~full].T)], axis=2, bitorder="little"))
    entries, partial = np.concatenate(where), np.concatenate(bits)
    masks, kind = np.unique(partial.reshape(len(partial), block * block // 8), axis=0, return_inverse=True)
    kinds = np.zeros(len(entries), np.int64)
    kinds[entries[:, 4] == 0] = kind.reshape(-1)
    # Set, row, partial ones first, column, how often.
    order = np.lexsort((entries[:, 3], entries[:, 2], entries[:, 4], entries[:, 1], entries[:, 0]))
    number = entries[:, 0] * rows + entries[:, 1]
    met, met_full = (
        np.bincount(number, weights, len(sets) * rows).astype(np.int64) for weights in (None, entries[:, 4])
    )
    end = np.cumsum(met)
    spans = np.stack([end - met, end - met_full, end], axis=1).reshape(1, len(sets), rows, 3)
    words = masks.view("<u4").astype(np.uint32).view(np.int32).reshape(len(masks), block, block // _WORD)
    more = (entries[:, 3] > 1).any()
    return Lists(
        block, _int32(spans), _some(entries[order, 2]), _some(kinds[order]), _some(words), longest_first(spans),
        _int32(entries[order, 3]) if more else None,
    )  # fmt: skip


def longest_first(rows: np.ndarray) -> np.ndarray:
    """``order`` int32 [b * h * R] for ``rows`` [b, h, R, 3]: sets of lists by all that they hold, most first, and in
    each its rows, longest first. A set stays together, because its rows read the same keys.
    """
    b, h, count, _ = rows.shape
    length = (rows[..., 2] - rows[..., 0]).astype(np.int64).reshape(b * h, count)
    sets = np.argsort(-length.sum(axis=1), kind="stable")
    within = np.argsort(-length, axis=1, kind="stable")
    return _int32((sets[:, None] * count + within[sets]).reshape(-1))


def _some(x: np.ndarray) -> np.ndarray:
    """At least one, since runtimes do not like empty tensors."""
    return _int32(x) if len(x) else np.zeros((1, *x.shape[1:]), np.int32)


def _int32(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype(np.int32))


@dataclass(frozen=True, slots=True)
class Form:
    """What a node says beside its call: ``inputs`` those of ``OPTIONAL`` that it has, in order."""

    block: int
    masked_rows: str = "nan"
    inputs: tuple[str, ...] = ()
    log_sum_exp: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """Names of all formal inputs up to the last one that is there, empty where one is left out."""
        last = max((OPTIONAL.index(name) + 1 for name in self.inputs), default=0)
        return ("query", "key", "value", *LISTS, *(name * (name in self.inputs) for name in OPTIONAL[:last]))

    @property
    def formal(self) -> tuple[str, ...]:
        """As ``given``, with the names of those that are left out: the inputs of a body."""
        return ("query", "key", "value", *LISTS, *OPTIONAL[: len(self.given) - 3 - len(LISTS)])

    def place(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """``values`` by formal names, as a node lists them."""
        return tuple(values[name] if name else "" for name in self.given)


def node(
    form: Form, call: Call, inputs: Sequence[str], outputs: Sequence[str], name: str, lists_of: str = ""
) -> NodeProto:
    """The op; its attributes and inputs say all that a kernel needs. ``inputs`` and ``outputs`` as the schema orders
    them. ``lists_of``: the digest of the lists that its body was made for; without it the body reads them.
    """
    layouts = dict(zip(("q_layout", "k_layout", "v_layout", "o_layout"), call.layouts, strict=True))
    said: dict[str, Any] = {"block": form.block, "masked_rows": form.masked_rows}
    made = helper.make_node(
        OP_TYPE, list(inputs), list(outputs), name=name, domain=DOMAIN, scale=call.scale, **said, **layouts
    )
    given = {"inputs": list(form.inputs), "log_sum_exp": form.log_sum_exp, "lists": lists_of}
    made.overload = overload_of({"op": OP_TYPE, **given, **said, **call.configuration()})
    return made


def register() -> None:
    """Make the op known to onnx (checker and shape inference); later calls do nothing."""
    if defs.has(OP_TYPE, VERSION, DOMAIN):
        return
    operand, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    optional = OpSchema.FormalParameterOption.Optional
    texts = (
        ("masked_rows", "nan", "what a query without any visible key gives: zero | uniform | nan"),
        *((f"{x}_layout", "BNHD", LAYOUTS[x == "o"]) for x in "qkvo"),
    )
    floats = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")]
    types = {"key_mask": "tensor(bool)", "bias": "TB", "sinks": "TS"}
    schema = OpSchema(
        OP_TYPE, DOMAIN, VERSION, __doc__ or "",
        inputs=[
            *(operand(n, "T") for n in ("query", "key", "value")),
            *(operand(n, "tensor(int32)") for n in LISTS),
            *(operand(n, types.get(n, "tensor(int32)"), param_option=optional) for n in OPTIONAL),
        ],
        outputs=[operand("output", "T"), operand("log_sum_exp", "tensor(float)", param_option=optional)],
        type_constraints=[("T", floats, ""), ("TB", floats, ""), ("TS", floats, "")],
        attributes=[
            OpSchema.Attribute("scale", kinds.FLOAT, "of the products", required=True),
            OpSchema.Attribute("block", kinds.INT, "edge of a block", required=True),
            *(OpSchema.Attribute(name, helper.make_attribute(name, value), doc) for name, value, doc in texts),
        ],
    )  # fmt: skip
    schema.set_type_and_shape_inference_function(infer_outputs)
    schemas.register(schema)
