"""Detection in every committed graph, against the committed truth; without torch and without weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from attncompile.models.zoo import graphs
from attncompile.models.zoo.check import Outcome, attempt_graph
from attncompile.models.zoo.docs import PAGE, page
from attncompile.models.zoo.table import ENTRIES
from attncompile.models.zoo.table_open import OPEN

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def outcomes() -> dict[int, Outcome | str]:
    return {i: attempt_graph(i) for i in range(len(ENTRIES))}  # type: ignore[misc]


def test_every_graph(outcomes: dict[int, Outcome | str]) -> None:
    """All true sites with kind, heads, dims, lengths, mask and sinks, and no others; what is open is said in OPEN."""
    problems = []
    for position, outcome in outcomes.items():
        title = ENTRIES[position].title
        if isinstance(outcome, str):
            said = [outcome]
        else:
            said = [*outcome.missed, *(f"false: {f}" for f in outcome.false), *outcome.wrong]
        if bool(said) != (title in OPEN):
            problems.append(f"{title}: " + ("; ".join(said) or "is in OPEN and is right now: take it out"))
    assert not problems, "\n".join(problems)


def test_negatives_have_no_sites(outcomes: dict[int, Outcome | str]) -> None:
    negatives = [o for o in outcomes.values() if isinstance(o, Outcome) and o.entry.family == "negative"]
    assert len(negatives) >= 12
    assert all((o.true, o.found, o.false) == ((), 0, ()) for o in negatives)


def test_the_page_is_written_from_these(outcomes: dict[int, Outcome | str]) -> None:
    assert PAGE.read_text() == page(outcomes), "run python -m attncompile.models.zoo --docs"


def test_files() -> None:
    """Every entry has both files and nothing else lies there; together they are small."""
    for folder, path in (("graphs", graphs.graph_path), ("truth", graphs.truth_path)):
        wanted = {path(e).name for e in ENTRIES}
        assert {p.name for p in (graphs.HERE / folder).iterdir()} == wanted
    size = sum(f(e).stat().st_size for e in ENTRIES for f in (graphs.graph_path, graphs.truth_path))
    assert size < 8 << 20


def test_no_torch_is_needed() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'diffusers', 'timm', 'onnxscript'): sys.modules[name] = None\n"
        "from attncompile.models.zoo.__main__ import main\n"
        "sys.exit(main(['--check-graphs', '--match', 'vit/dynamo/18/sdpa']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missed" in done.stdout


def _model(weight: np.ndarray) -> ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], doc_string="words")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])
    proto = helper.make_model(
        helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")]),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    proto.metadata_props.add(key="where", value="/somewhere")
    return proto


@pytest.mark.parametrize(
    ("weight", "kept"),
    [
        (np.random.default_rng(0).standard_normal((40, 40), np.float32), False),
        (np.random.default_rng(0).standard_normal((30, 30), np.float32), True),
        (np.where(np.tri(64, dtype=bool), 0, -np.inf).astype(np.float32), True),
    ],
    ids=["weights", "small", "mask"],
)
def test_what_is_left_out(weight: np.ndarray, kept: bool) -> None:
    proto = _model(weight)
    before = proto.SerializeToString()
    small = graphs.without_weights(proto)
    assert proto.SerializeToString() == before
    (tensor,) = small.graph.initializer
    assert (tensor.name, list(tensor.dims), tensor.data_type) == ("w", list(weight.shape), TensorProto.FLOAT)
    assert (tensor.data_location != TensorProto.EXTERNAL) == kept
    assert not small.metadata_props and not small.graph.node[0].doc_string
    if kept:
        assert np.array_equal(numpy_helper.to_array(tensor), weight)
    else:
        assert len(small.SerializeToString()) < 400


def test_a_weight_that_is_left_out_cannot_be_read() -> None:
    """Detection that loads weights would fail here, not go on with zeros."""
    from attncompile.passes.load import tensor_value

    small = graphs.without_weights(_model(np.random.default_rng(0).standard_normal((40, 40), np.float32)))
    with pytest.raises(Exception, match=graphs.ABSENT):
        tensor_value(small.graph.initializer[0], graphs.HERE)


def test_a_graph_of_another_truth_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(e for e in ENTRIES if e.name == "no-codebook")
    path = tmp_path / "changed.onnx.gz"
    path.write_bytes(graphs.graph_path(entry).read_bytes() + b"0")
    monkeypatch.setattr(graphs, "graph_path", lambda e: path)
    with pytest.raises(ValueError, match="is not the file"):
        graphs.read_graph(entry)
