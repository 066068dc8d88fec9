"""The op ``attncompile::NeighborhoodAttention`` (version 1): its schema and its parameters, in one place.

Inputs: ``query`` [B, Nq, H, D], ``key`` [B, Nk, Hkv, D], ``value`` [B, Nk, Hkv, Dv], each in the axis order that its
layout attribute says, and optionally ``key_mask`` bool, broadcastable to [B, 1, 1, Nk], True = visible, and ``bias``,
broadcastable to [B, H, Nq, Nk], which is added to the scores, and ``sinks``, H logits (or one for all heads) that join
the softmax and that no value belongs to, and ``window_bias``, broadcastable to [H, W, W] for windows of W tokens, which
is added to the scores by the places that query and key have in their window. Output: [B, Nq, H, Dv] in ``o_layout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite, prod
from typing import Any

import onnx.defs
from onnx.defs import OpSchema

from attncompile.core.errors import Unsupported
from attncompile.plugins import schemas
from attncompile.plugins.body import DOMAIN, LAYOUTS
from attncompile.plugins.parameters import number, whole, wholes

OP_TYPE = "NeighborhoodAttention"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Neighborhood:
    """Which keys a query sees. One entry per axis in every tuple; ``grid`` is (-1,) for a dynamic 1-D sequence.

    Tokens are ``prefix``, then the grid in row-major order, then ``suffix``; prefix and suffix tokens see all and are
    seen by all, except that in a causal sequence nothing sees what comes after it.
    On an axis, tokens with the same index modulo ``dilation`` form a line of L tokens. Groups of ``stride``
    neighbouring queries share the window of the group's centre c (its last query on a causal axis):
    c - left .. c + right, right = kernel_size - 1 - left, and never beyond the query itself on a causal axis.
    ``border``: ``truncate`` leaves out what lies outside of the grid, ``clamp`` moves c inward so that a window always
    holds kernel_size tokens (causal axes are truncated either way). ``shape``: ``ball`` keeps of the box what lies in
    the ellipsoid with radii ``left``. When Nk > Nq the queries are the last Nq tokens.

    ``border`` ``circular``: every axis is a ring, cut into windows of kernel_size = stride tokens that begin at
    ``shift``; a group's window is the group itself. Position x has the place (x - shift) mod kernel_size in its window,
    and ``window_bias`` counts places row-major over the axes. ``seam`` is added to the scores of query and key that
    meet across the end of a ring, on any axis: floor((x - shift) / kernel_size) differs. -inf hides them from one
    another: Swin's shifted windows (arXiv:2103.14030).
    """

    kernel_size: tuple[int, ...]
    left: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[int, ...]
    border: str
    shape: str
    grid: tuple[int, ...]
    prefix: int
    suffix: int
    masked_rows: str
    shift: tuple[int, ...] = ()
    seam: float = 0.0

    @property
    def circular(self) -> bool:
        """Whole windows on rings, whose body moves no key twice."""
        return self.border == "circular"

    @property
    def right(self) -> tuple[int, ...]:
        return tuple(k - 1 - x for k, x in zip(self.kernel_size, self.left, strict=True))

    @property
    def dynamic(self) -> bool:
        return -1 in self.grid

    @property
    def tokens(self) -> int | None:
        """Number of tokens, or None for a dynamic sequence."""
        return None if self.dynamic else self.prefix + prod(self.grid) + self.suffix

    @property
    def sliding(self) -> bool:
        """A plain truncated 1-D window: what the blocked body for any length covers."""
        return (
            len(self.grid) == 1 and self.border == "truncate" and self.shape == "box"
            and self.stride == (1,) and self.dilation == (1,)
        )  # fmt: skip

    def attributes(self) -> dict[str, Any]:
        """The attributes of the op."""
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if not self.circular:  # they mean nothing elsewhere
            del found["shift"], found["seam"]
        return found

    @staticmethod
    def of(parameters: Mapping[str, Any]) -> Neighborhood:
        """Fill in the defaults and check. Raises ``Unsupported`` for what has no meaning."""
        kernel = wholes(OP_TYPE, parameters, "kernel_size", None)
        rank = len(kernel)
        causal = wholes(OP_TYPE, parameters, "causal", (0,) * rank)
        default_left = tuple(k - 1 if c else k // 2 for k, c in zip(kernel, causal, strict=False))
        out = Neighborhood(
            kernel_size=kernel,
            left=wholes(OP_TYPE, parameters, "left", default_left),
            dilation=wholes(OP_TYPE, parameters, "dilation", (1,) * rank),
            stride=wholes(OP_TYPE, parameters, "stride", (1,) * rank),
            causal=causal,
            border=str(parameters.get("border", "truncate")),
            shape=str(parameters.get("shape", "box")),
            grid=wholes(OP_TYPE, parameters, "grid", (-1,) * rank),
            prefix=whole(OP_TYPE, parameters, "prefix", 0),
            suffix=whole(OP_TYPE, parameters, "suffix", 0),
            masked_rows=str(parameters.get("masked_rows", "zero")),
            shift=wholes(OP_TYPE, parameters, "shift", (0,) * rank),
            # JSON has no infinity: plans and reports have it as a text.
            seam=-inf if parameters.get("seam") == "-inf" else number(OP_TYPE, parameters, "seam", 0.0),
        )
        out._check()
        return out

    def _check(self) -> None:
        rank = len(self.kernel_size)
        if not 1 <= rank <= 3:
            raise _bad(f"kernel_size has {rank} axes", "give one to three")
        for name in ("left", "dilation", "stride", "causal", "grid", "shift"):
            if len(getattr(self, name)) != rank:
                raise _bad(f"{name} has {len(getattr(self, name))} entries for {rank} axes", "one entry per axis")
        if min(self.kernel_size) < 1 or min(self.dilation) < 1 or min(self.stride) < 1:
            raise _bad("kernel_size, dilation and stride must be positive", "")
        if min(self.prefix, self.suffix) < 0 or set(self.causal) - {0, 1}:
            raise _bad("prefix and suffix must not be negative, causal must be 0 or 1", "")
        if self.border not in ("truncate", "clamp", "circular") or self.shape not in ("box", "ball"):
            hint = "border is truncate, clamp or circular, shape box or ball"
            raise _bad(f"border {self.border!r}, shape {self.shape!r}", hint)
        self._check_ring()
        if self.masked_rows not in ("zero", "uniform", "nan"):
            raise _bad(f"masked_rows {self.masked_rows!r}", "masked_rows is zero, uniform or nan")
        for k, left, causal in zip(self.kernel_size, self.left, self.causal, strict=True):
            if not 0 <= left < k or (causal and left != k - 1):
                raise _bad(f"left {left} with kernel_size {k}", "0 <= left < kernel_size; kernel_size - 1 when causal")
        if any(g < 1 and g != -1 for g in self.grid) or (self.dynamic and rank > 1):
            raise _bad(f"grid {list(self.grid)}", "positive sizes; -1 (dynamic) only for a 1-D sequence")
        if self.border == "clamp" and not self.dynamic:
            for k, d, g in zip(self.kernel_size, self.dilation, self.grid, strict=True):
                if k * d > g:
                    raise _bad(
                        f"a clamped window of {k} with dilation {d} does not fit into {g}", "kernel * dilation <= grid"
                    )
        if self.shape == "ball" and (self.border != "truncate" or any(self.causal) or self.left != self.right):
            raise _bad("shape ball", "a ball is truncated, not causal, and has odd kernel sizes")
        if any(self.causal) and (self.suffix or (self.prefix and rank > 1)):
            raise _bad("prefix or suffix with a causal axis", "only a prefix of a 1-D causal sequence has a meaning")

    def _check_ring(self) -> None:
        if not self.circular:
            if any(self.shift) or self.seam:
                raise _bad("shift or seam without border circular", "windows are moved on rings only")
            return
        plain = set(self.dilation) == {1} and not any(self.causal) and self.shape == "box"
        if self.kernel_size != self.stride or not plain or self.prefix or self.suffix or self.dynamic:
            raise _bad(
                "border circular with more than windows side by side",
                "stride = kernel_size, a static grid, no dilation, causal axis, ball, prefix or suffix",
            )
        if any(g % k for g, k in zip(self.grid, self.kernel_size, strict=True)):
            raise _bad(f"windows of {list(self.kernel_size)} on rings of {list(self.grid)}", "they must divide evenly")
        if any(not 0 <= s < k for s, k in zip(self.shift, self.kernel_size, strict=True)):
            raise _bad(f"shift {list(self.shift)}", "0 <= shift < kernel_size")
        if not (isfinite(self.seam) or self.seam == -inf):
            raise _bad(f"seam {self.seam}", "a number, or -inf")


def _bad(reason: str, hint: str) -> Unsupported:
    return Unsupported("parameters", f"NeighborhoodAttention: {reason}", hint)


def schema() -> OpSchema:
    """The op's schema, with output type and shape inference."""
    kind = OpSchema.FormalParameterOption
    attr = OpSchema.AttrType
    default = onnx.helper.make_attribute

    def ints(name: str, doc: str, required: bool = False) -> OpSchema.Attribute:
        return OpSchema.Attribute(name, attr.INTS, doc, required=required)

    def text(name: str, value: str, doc: str) -> OpSchema.Attribute:
        return OpSchema.Attribute(name, default(name, value), doc)

    def number(name: str, value: int, doc: str) -> OpSchema.Attribute:
        return OpSchema.Attribute(name, default(name, value), doc)

    result = OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc=__doc__ + "\n" + (Neighborhood.__doc__ or ""),
        inputs=[
            OpSchema.FormalParameter("query", "T", "[B, Nq, H, D] in q_layout"),
            OpSchema.FormalParameter("key", "T", "[B, Nk, Hkv, D] in k_layout"),
            OpSchema.FormalParameter("value", "T", "[B, Nk, Hkv, Dv] in v_layout"),
            OpSchema.FormalParameter(
                "key_mask", "tensor(bool)", "broadcastable to [B, 1, 1, Nk], True = visible", param_option=kind.Optional
            ),
            OpSchema.FormalParameter(
                "bias", "TB", "broadcastable to [B, H, Nq, Nk], added", param_option=kind.Optional
            ),
            OpSchema.FormalParameter("sinks", "TS", "H logits, or one for all heads", param_option=kind.Optional),
            OpSchema.FormalParameter(
                "window_bias",
                "TW",
                "broadcastable to [H, W, W], added by places in the window",
                param_option=kind.Optional,
            ),
        ],
        outputs=[OpSchema.FormalParameter("output", "T", "[B, Nq, H, Dv] in o_layout")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "element type"),
            ("TB", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "type of the bias"),
            ("TS", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "type of the sinks"),
            ("TW", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "type of window_bias"),
        ],
        attributes=[
            ints("kernel_size", "window size per axis", required=True),
            ints("left", "how far the window reaches to the left of its centre"),
            ints("dilation", "distance between tokens of one window"),
            ints("stride", "queries per group that shares a window"),
            ints("causal", "1: no key after the query on this axis"),
            ints("grid", "tokens per axis; -1: dynamic, one axis only"),
            text("border", "truncate", "truncate | clamp | circular"),
            ints("shift", "where the windows of a ring begin"),
            OpSchema.Attribute("seam", default("seam", 0.0), "added to scores across the end of a ring"),
            text("shape", "box", "box | ball"),
            number("prefix", 0, "tokens before the grid"),
            number("suffix", 0, "tokens after the grid"),
            OpSchema.Attribute("scale", attr.FLOAT, "factor of query x key; default 1 / sqrt(D)", required=False),
            text(
                "masked_rows",
                "zero",
                "what a query without any visible key gives: zero | uniform (the mean of all values) | nan",
            ),
            *(text(f"{x}_layout", "BNHD", LAYOUTS[x == "o"]) for x in "qkvo"),
            # For TensorRT's parser; they mean nothing elsewhere.
            OpSchema.Attribute("plugin_namespace", attr.STRING, "TensorRT plugin namespace", required=False),
            OpSchema.Attribute("plugin_version", attr.STRING, "TensorRT plugin version", required=False),
            OpSchema.Attribute("aot", attr.INT, "1: TensorRT takes the ahead-of-time plugin", required=False),
        ],
    )
    result.set_type_and_shape_inference_function(infer_output)
    return result


def infer_output(context: Any) -> None:
    """Output: query's type and sizes, with the last axis from value."""
    query = context.get_input_type(0)
    out = onnx.TypeProto()
    out.tensor_type.elem_type = query.tensor_type.elem_type
    value = context.get_input_type(2)
    if query.tensor_type.HasField("shape") and value is not None and value.tensor_type.HasField("shape"):
        layout = [context.get_attribute(f"{x}_layout") for x in "qo"]
        q, o = (a.s.decode() if a is not None and a.s else "BNHD" for a in layout)
        dims = dict(zip(q, query.tensor_type.shape.dim, strict=True))
        dims["D"] = value.tensor_type.shape.dim[-1]
        for axis in o:
            out.tensor_type.shape.dim.add().CopyFrom(dims[axis])
    context.set_output_type(0, out)


def register() -> None:
    """Make the schema known to ``onnx.checker`` and shape inference. Idempotent."""
    if not onnx.defs.has(OP_TYPE, domain=DOMAIN):
        schemas.register(schema())
