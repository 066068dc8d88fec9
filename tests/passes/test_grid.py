"""Token grids, from how patches of an image or a video become the tokens of a site."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from attncompile.core.errors import BadArguments
from attncompile.core.grid import TokenGrid
from attncompile.core.profile import Range
from attncompile.core.site import Detection
from attncompile.passes.detect import detect
from attncompile.passes.grid import parse_grid
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for
from tests.passes.attention_graphs import Builder, save

DIM = 8


def weight(b: Builder, *shape: int) -> str:
    return b.const(np.random.default_rng(len(b.stored)).standard_normal(shape).astype(np.float32) / 3)


def heads(b: Builder, x: str) -> str:
    """[B, N, DIM] -> [B, 2, N, DIM / 2] through a projection."""
    x = b.op("Reshape", b.op("MatMul", x, weight(b, DIM, DIM)), b.const([0, -1, 2, DIM // 2]))
    return b.op("Transpose", x, perm=[0, 2, 1, 3])


def attend(b: Builder, query: str, key: str, value: str) -> str:
    """[B, 2, N, DIM / 2] each -> [B, N, DIM]."""
    scores = b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2]))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), value)
    return b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), b.const([0, -1, DIM]))


def layer(b: Builder, x: str) -> str:
    """A transformer layer over [B, N, DIM]."""
    one = b.const(np.ones(DIM, np.float32))
    y = b.op("LayerNormalization", x, one, one, axis=-1)
    x = b.op("Add", x, b.op("MatMul", attend(b, heads(b, y), heads(b, y), heads(b, y)), weight(b, DIM, DIM)))
    return b.op("Add", x, b.op("Gelu", b.op("MatMul", x, weight(b, DIM, DIM))))


def embed(b: Builder, image: str = "x", patch: int = 4, channels: int = 3) -> str:
    """Patch embedding by a convolution: [B, N, DIM]."""
    x = b.op("Conv", image, weight(b, DIM, channels, patch, patch), kernel_shape=[patch] * 2, strides=[patch] * 2)
    return b.op("Transpose", b.op("Reshape", x, b.const([0, DIM, -1])), perm=[0, 2, 1])


def found(
    make: Callable[[Builder], str], shape: list[int | str], grid: TokenGrid | None = None,
    others: tuple[tuple[str, list[int | str]], ...] = (), **sizes: Range,
) -> Detection:  # fmt: skip
    b = Builder()
    out = make(b)
    inputs = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", shape), *others)]
    graph = helper.make_graph(b.nodes, "g", inputs, [helper.make_tensor_value_info(out, 1, None)], b.stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # a graph that can run
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(save(model, Path(folder)))
        return detect(loaded, profile_for(loaded, sizes), grid=grid)


def grids(detection: Detection) -> list[tuple[tuple[int, ...], int, int] | None]:
    assert not [m for m in detection.near_misses if m.code != "grid"]
    return [(s.grid.shape, s.grid.prefix, s.grid.suffix) if s.grid else None for s in detection.sites]


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_class_and_register_tokens_before_patches(extra: int) -> None:
    def make(b: Builder) -> str:
        x = embed(b)
        if extra:
            tokens = b.op("Expand", weight(b, 1, extra, DIM), b.const([2, extra, DIM]))
            x = b.op("Concat", tokens, x, axis=1)
        x = b.op("Add", x, weight(b, 1, 35 + extra, DIM))
        return layer(b, layer(b, x))

    detection = found(make, [2, 3, 20, 28])
    assert grids(detection) == [((5, 7), extra, 0)] * 2
    assert detection.sites[0].grid is not None and "patch embedding" in detection.sites[0].grid.evidence


@pytest.mark.parametrize("channels_last", [False, True])
def test_patchify_by_reshape(channels_last: bool) -> None:
    def make(b: Builder) -> str:
        if channels_last:
            x = b.op("Reshape", "x", b.const([2, 5, 2, 7, 2, 2]))
            x = b.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        else:
            x = b.op("Reshape", "x", b.const([2, 2, 5, 2, 7, 2]))
            x = b.op("Transpose", x, perm=[0, 2, 4, 3, 5, 1])
        return layer(b, b.op("Reshape", x, b.const([2, 35, DIM])))

    assert grids(found(make, [2, 10, 14, 2] if channels_last else [2, 2, 10, 14])) == [((5, 7), 0, 0)]


def test_patchify_that_keeps_the_wrong_half_is_no_grid() -> None:
    """Tokens that are places inside of the patches."""

    def make(b: Builder) -> str:
        x = b.op("Transpose", b.op("Reshape", "x", b.const([2, 2, 2, 5, 2, 7])), perm=[0, 3, 5, 1, 2, 4])
        return layer(b, b.op("Reshape", x, b.const([2, 35, DIM])))

    assert grids(found(make, [2, 2, 10, 14])) == [None]


@pytest.mark.parametrize("form", ["conv", "reshape"])
def test_video(form: str) -> None:
    def make(b: Builder) -> str:
        if form == "conv":
            w = weight(b, DIM, 2, 2, 2, 2)
            x = b.op("Conv", "x", w, kernel_shape=[2, 2, 2], strides=[2, 2, 2])
            return layer(b, b.op("Transpose", b.op("Reshape", x, b.const([0, DIM, -1])), perm=[0, 2, 1]))
        x = b.op("Transpose", b.op("Reshape", "x", b.const([1, 2, 6, 5, 2, 7, 2])), perm=[0, 2, 3, 5, 1, 4, 6])
        return layer(b, b.op("Reshape", x, b.const([1, 210, DIM])))

    assert grids(found(make, [1, 2, 6, 10, 14])) == [((3, 5, 7) if form == "conv" else (6, 5, 7), 0, 0)]


@pytest.mark.parametrize("first", [False, True])
def test_joint_attention_over_text_and_image(first: bool) -> None:
    """Q, K and V of both are joined, and what comes out is cut again, in two layers."""

    def make(b: Builder) -> str:
        image, text = embed(b), "text"
        for _ in range(2):
            order = slice(None, None, -1 if first else 1)
            both = [b.op("Concat", *(heads(b, image), heads(b, text))[order], axis=2) for _ in range(3)]
            out = attend(b, *both)
            ends = b.const([6 if first else 35]), b.const([6 if first else 0])
            stop = b.const([41 if first else 35])
            part = b.op("Slice", out, ends[1], stop, b.const([1]))
            rest = b.op("Slice", out, b.const([0 if first else 35]), b.const([6 if first else 41]), b.const([1]))
            image, text = b.op("Add", image, part), b.op("Add", text, rest)
        return b.op("Concat", image, text, axis=1)

    detection = found(make, [2, 3, 20, 28], others=(("text", [2, 6, DIM]),))
    assert grids(detection) == [((5, 7), 6, 0) if first else ((5, 7), 0, 6)] * 2


def test_a_class_token_and_text_around_the_grid() -> None:
    def make(b: Builder) -> str:
        x = b.op("Concat", b.op("Expand", weight(b, 1, 1, DIM), b.const([2, 1, DIM])), embed(b), axis=1)
        return layer(b, b.op("Concat", x, "text", axis=1))

    assert grids(found(make, [2, 3, 20, 28], others=(("text", [2, 6, DIM]),))) == [((5, 7), 1, 6)]


def test_patch_merging_halves_the_grid() -> None:
    """Swin and PVT: every other row and column, and a convolution with stride 2 over tokens put back into a grid."""

    def make(b: Builder) -> str:
        x = layer(b, embed(b))
        x = b.op("Reshape", x, b.const([2, 8, 12, DIM]))
        parts = []
        for row in (0, 1):
            for column in (0, 1):
                starts, steps = b.const([row, column]), b.const([2, 2])
                parts.append(b.op("Slice", x, starts, b.const([8, 12]), b.const([1, 2]), steps))
        x = b.op("MatMul", b.op("Concat", *parts, axis=3), weight(b, 4 * DIM, DIM))
        x = layer(b, b.op("Reshape", x, b.const([2, 24, DIM])))
        x = b.op("Transpose", b.op("Reshape", x, b.const([2, 4, 6, DIM])), perm=[0, 3, 1, 2])
        w = weight(b, DIM, DIM, 3, 3)
        x = b.op("Conv", x, w, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        return layer(b, b.op("Transpose", b.op("Reshape", x, b.const([2, DIM, 6])), perm=[0, 2, 1]))

    assert grids(found(make, [2, 3, 32, 48])) == [((8, 12), 0, 0), ((4, 6), 0, 0), ((2, 3), 0, 0)]


def test_a_convolution_over_the_tokens_keeps_their_grid() -> None:
    def make(b: Builder) -> str:
        x = embed(b)
        y = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1]), b.const([2, DIM, 5, 7]))
        y = b.op("Conv", y, weight(b, DIM, 1, 3, 3), kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=DIM)
        y = b.op("Transpose", b.op("Reshape", y, b.const([2, DIM, 35])), perm=[0, 2, 1])
        return layer(b, b.op("Add", x, y))

    assert grids(found(make, [2, 3, 20, 28])) == [((5, 7), 0, 0)]


def test_windows_and_pooled_tokens_have_none() -> None:
    def make(b: Builder) -> str:
        x = b.op("Reshape", embed(b), b.const([2, 2, 4, 3, 4, DIM]))
        x = b.op("Reshape", b.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5]), b.const([12, 16, DIM]))
        return layer(b, x)

    assert grids(found(make, [2, 3, 32, 48])) == [None]


def test_two_orders_of_the_tokens_contradict() -> None:
    """Rows first, and columns first, added to one another."""

    def make(b: Builder) -> str:
        x = embed(b)
        turned = b.op("Transpose", b.op("Reshape", x, b.const([2, 6, 6, DIM])), perm=[0, 2, 1, 3])
        return layer(b, b.op("Add", x, b.op("Reshape", turned, b.const([2, 36, DIM]))))

    detection = found(make, [2, 3, 24, 24])
    assert grids(detection) == [None]
    (note,) = detection.near_misses
    assert note.code == "grid" and "two layouts" in note.reason and "0+6x6+0" in note.reason


def test_the_tokens_of_two_images_are_no_grid() -> None:
    def make(b: Builder) -> str:
        return layer(b, b.op("Concat", embed(b), embed(b, "other"), axis=1))

    detection = found(make, [2, 3, 20, 28], others=(("other", [2, 3, 12, 28]),))
    assert grids(detection) == [None] and "joins the tokens of 2 grids" in detection.near_misses[0].reason


def test_a_grid_that_changes_with_the_input_is_refused_with_both() -> None:
    def make(b: Builder) -> str:
        return layer(b, embed(b))

    detection = found(make, ["b", 3, "h", 28], b=Range(1, 2, 3), h=Range(20, 20, 40))
    assert grids(detection) == [None]
    (note,) = detection.near_misses
    assert "0+5x7+0" in note.reason and "0+10x7+0" in note.reason
    batched = found(make, ["b", 3, 20, 28], b=Range(1, 2, 3))
    assert grids(batched) == [((5, 7), 0, 0)]


def test_the_users_grid_is_taken() -> None:
    def make(b: Builder) -> str:
        return layer(b, embed(b))

    given = parse_grid("7x5")
    assert grids(found(make, [2, 3, 20, 28], grid=given)) == [((7, 5), 0, 0)]
    assert grids(found(make, [2, 3, 20, 28], grid=parse_grid("3x11+1+1"))) == [((3, 11), 1, 1)]
    with pytest.raises(BadArguments, match="36 tokens"):
        found(make, [2, 3, 20, 28], grid=parse_grid("6x6"))
    for text in ("14by14", "0x3", "2x2x2x2", ""):
        with pytest.raises(BadArguments, match="is not a grid"):
            parse_grid(text)


def test_tokens_of_text_have_none() -> None:
    assert grids(found(lambda b: layer(b, "x"), [2, 36, DIM])) == [None]


def test_a_mask_is_read_on_the_grid_of_the_patches() -> None:
    """5x12 tokens: 6x10 and others would be tried first without the patch embedding."""
    seen = np.array([[abs(i // 12 - j // 12) <= 1 and abs(i % 12 - j % 12) <= 1 for j in range(60)] for i in range(60)])

    def make(b: Builder) -> str:
        x = embed(b)
        q, k, v = heads(b, x), heads(b, x), heads(b, x)
        scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = b.op("Where", b.const(seen[None, None]), scores, b.const(np.array(-np.inf, np.float32)))
        return b.op("MatMul", b.op("Softmax", scores, axis=-1), v)

    (site,) = found(make, [2, 3, 20, 48]).sites
    assert site.mask.kind == "neighborhood"
    shown = site.mask.to_json()
    assert shown["grid"]["shape"] == [5, 12] and shown["kernel_size"] == [3, 3] and shown["border"] == "truncate"
    assert "patch embedding" in site.mask.parts[0].certificate.detail


@pytest.mark.parametrize("first", ["passes.grid", "passes.masks", "passes.token_layout", "passes.detect"])
def test_every_pass_can_be_imported_first(first: str) -> None:
    """Masks and grids are read by detection, and follow axes with its means."""
    code = f"import attncompile.{first}; from attncompile.passes.masks import MaskAnalyser; MaskAnalyser"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
