"""Keys that were gathered into windows first: one site over all tokens, rebuilt from its facts, or a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.passes import windowed_graphs as graphs
from tests.passes.rebuild import found_in, only_site
from tests.passes.windowed_graphs import DIM, HEADS, Windowed

FORMS = {
    "index-gather": lambda: graphs.indexed(graphs.clamped(5, 7, 3)),
    "index-gathernd": lambda: graphs.indexed(graphs.clamped(6, 5, 5), how="nd"),
    "index-random": lambda: graphs.indexed(np.argsort(np.random.default_rng(0).random((19, 19)), axis=1)[:, :4]),
    "unfold-zero-padding": lambda: graphs.unfolded(5, 7, 3, border="truncate"),
    "unfold-clamped": lambda: graphs.unfolded(7, 6, 5, border="clamp"),
    "unfold-dynamic-batch": lambda: graphs.unfolded(5, 6, 3, border="clamp", batch="batch"),
    "chunks": lambda: graphs.chunked(5, 3),
    "chunks-tail": lambda: graphs.chunked(4, 5, tail=2),
    "chunks-circular": lambda: graphs.chunked(5, 3, circular=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_site_over_all_tokens(form: str, tmp_path: Path) -> None:
    made = FORMS[form]()
    if form == "unfold-dynamic-batch":
        _, found = found_in(onnx.shape_inference.infer_shapes(made.proto), tmp_path)
        (site,) = found.sites
        assert site.batch == "batch"
    else:
        _, site = only_site(made.proto, tmp_path)
    tokens = len(made.visible)
    assert (site.query_length, site.key_length, site.heads, site.head_dim) == (tokens, tokens, HEADS, DIM)
    assert (site.query.value, site.key.value, site.value.value) == ("q", "k", "v")
    assert site.scale == pytest.approx(0.4)
    parts = site.mask.parts
    both = np.ones_like(made.visible)
    for part in parts:
        assert part.certificate.lengths == ((tokens, tokens),)
        assert not part.certificate.general
        if part.pattern is not None:
            both &= part.pattern.visible(tokens, tokens)
        else:
            distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]
            both &= (distance >= -part.left if part.left >= 0 else True) & (
                distance <= part.right if part.right >= 0 else True
            )
    np.testing.assert_array_equal(both, made.visible)


def test_a_clamped_window_is_a_neighborhood(tmp_path: Path) -> None:
    _, site = only_site(graphs.unfolded(7, 6, 5, border="clamp").proto, tmp_path)
    shown = site.mask.to_json()
    assert shown["kind"] == "neighborhood"
    assert shown["kernel_size"] == [5, 5]
    assert shown["border"] == "clamp"


def _refused(made: Windowed, folder: Path) -> str:
    _, found = found_in(made.proto, folder)
    assert found.sites == ()
    assert found.near_misses
    return " ".join(m.reason for m in found.near_misses)


def test_zero_padding_that_takes_part_is_refused(tmp_path: Path) -> None:
    assert "padding" in _refused(graphs.unfolded(5, 7, 3, border="truncate", mask=False), tmp_path)


def test_values_of_other_tokens_are_refused(tmp_path: Path) -> None:
    table = graphs.clamped(5, 5, 3)
    other = table.copy()
    other[7, 2] = (other[7, 2] + 1) % 25
    assert "different tokens" in _refused(graphs.indexed(table, values=other), tmp_path)


def test_a_key_that_counts_twice_is_refused(tmp_path: Path) -> None:
    table = graphs.clamped(5, 5, 3)
    table[3, 1] = table[3, 0]
    assert "several times" in _refused(graphs.indexed(table), tmp_path)


def test_a_query_in_two_rows_is_refused(tmp_path: Path) -> None:
    made = graphs.chunked(4, 3)
    for node in made.proto.graph.node:
        if node.op_type == "Reshape" and node.input[0] == "q":
            node.input[0] = "q2"
    twice = np.arange(12)
    twice[5] = 4
    made.proto.graph.initializer.append(onnx.numpy_helper.from_array(twice, "twice"))
    made.proto.graph.node.insert(0, helper.make_node("Gather", ["q", "twice"], ["q2"], axis=2))
    assert _refused(made, tmp_path)


def test_a_biased_window_is_refused_with_its_reason(tmp_path: Path) -> None:
    made = graphs.unfolded(5, 7, 3, border="truncate")
    (added,) = (t for t in made.proto.graph.initializer if list(t.dims) == [1, 1, 35, 1, 9])
    values = onnx.numpy_helper.to_array(added).copy()
    values[0, 0, 4, 0, 4] = 0.25
    added.CopyFrom(onnx.numpy_helper.from_array(values, added.name))
    assert "more than a mask" in _refused(made, tmp_path)


def test_scores_read_elsewhere_are_refused(tmp_path: Path) -> None:
    made = graphs.indexed(graphs.clamped(5, 5, 3))
    (softmax,) = (n for n in made.proto.graph.node if n.op_type == "Softmax")
    made.proto.graph.output.append(onnx.ValueInfoProto(name=softmax.input[0]))
    assert "output of the model" in _refused(made, tmp_path)
