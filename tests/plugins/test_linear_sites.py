"""``LinearAttention`` on sites as detection finds them: every form is replaced by something that gives the same; what
the ops cannot say is refused with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto

from attncompile import pipeline, verify
from attncompile.core.errors import Unsupported
from attncompile.core.linear import LinearFacts
from attncompile.core.mask import Certificate, MaskFacts, MaskPart
from attncompile.core.mechanism import kernel_parameters
from attncompile.core.site import AttentionSite, Operand
from attncompile.passes.evaluate import GraphIndex, World
from attncompile.passes.extract import extract_site
from attncompile.pipeline import Options
from attncompile.plugins import mechanism
from attncompile.plugins.linear_attention import kernel
from attncompile.plugins.linear_attention import mechanism as module
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, OUTPUT, SOLVE, STATE, STATES
from attncompile.report import Report
from attncompile.verification.linear_reference import linear_output
from tests.passes.linear_graphs import Spec, build, detected

pytestmark = pytest.mark.usefixtures("brief")

LINEAR = mechanism("LinearAttention")


def replaced(spec: Spec, folder: Path, chunk: int | None = None) -> tuple[AttentionSite, list[str]]:
    """The site, replaced and run beside the original and the facts; the types of its nodes."""
    model, detection = detected(build(spec), folder)
    (site,) = detection.sites
    (candidate,) = LINEAR.exact_candidates(site)
    assert not hasattr(candidate, "ok"), candidate
    parameters = candidate.parameters if chunk is None else {"chunk": chunk}  # type: ignore[union-attr]
    lowering = LINEAR.lower(site, parameters, model.opset)
    made = extract_site(World(GraphIndex(model), {}), site, lowering)
    feed = verify.cases(made.inputs, made.fixed, made.roles)[0].feed
    names = [site.output.value]
    ours, theirs = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(names, dict(feed))[0]
        for m in (made.replaced, made.original)
    )
    want = linear_output(site, feed)
    assert ours.shape == theirs.shape == want.shape
    for got in (ours, theirs):
        assert np.linalg.norm(got - want) <= 3e-6 * np.linalg.norm(want)
    return site, [n.op_type for n in lowering.nodes]


@pytest.mark.parametrize("order", ["kv", "einsum", "vk"])
@pytest.mark.parametrize("normaliser", ["none", "pad", "sum", "ones"])
def test_orders_and_normalisers(order: str, normaliser: str, tmp_path: Path) -> None:
    if normaliser == "ones" and order != "kv":
        normaliser = "split"
    spec = Spec(order=order, normaliser=normaliser, epsilon=1e-3 if normaliser != "none" else 0.0)
    _, ops = replaced(spec, tmp_path)
    assert ops == [STATE, APPLY]
    _, ops = replaced(spec, tmp_path, chunk=4)
    assert ops == [STATE, COMBINE, APPLY]


@pytest.mark.parametrize("kind", ["relu", "elu+1", "elu+1 where", "exp", "softmax"])
def test_maps(kind: str, tmp_path: Path) -> None:
    spec = Spec(query_map=kind, key_map=kind, normaliser="none" if kind == "softmax" else "sum",
                epsilon=0.01, scale=0.4)  # fmt: skip
    for chunk in (0, 3):
        site, _ = replaced(spec, tmp_path, chunk)
    assert site.linear is not None and site.linear.key_map == kind.partition(" ")[0]


@pytest.mark.parametrize("changed", [{"kv_heads": 1}, {"keys": 17}, {"floor": 2.0, "normaliser": "sum"}], ids=str)
def test_sizes(changed: dict[str, Any], tmp_path: Path) -> None:
    replaced(Spec(**changed), tmp_path)


def causal(**changed: Any) -> AttentionSite:
    facts = LinearFacts("identity", "identity", "none", 0.0, True, "parallel")
    shown = Certificate("compared", "every element", general=True)
    site = AttentionSite(
        id="site0", form="f", query=Operand("q", "BHND"), key=Operand("k", "BHND"), value=Operand("v", "BHND"),
        output=Operand("o", "BHND"), batch=1, heads=4, kv_heads=2, head_dim=8, value_dim=8, query_length=40,
        key_length=40, scale=1.0, mask=MaskFacts((MaskPart("causal", shown, -1, 0),), "zero"), dtype="float32",
        softmax_dtype="float32", nodes=(), interior=(), kind="linear", linear=facts,
    )  # fmt: skip
    given = {k: changed.pop(k) for k in list(changed) if k in LinearFacts.__dataclass_fields__}
    return replace(site, linear=replace(facts, **given), **changed)


def ops_of(site: AttentionSite) -> list[NodeProto]:
    (found,) = LINEAR.exact_candidates(site)
    return list(LINEAR.lower(site, found.parameters, 18).nodes)  # type: ignore[union-attr]


def test_causal_sites_are_two_ops() -> None:
    assert [n.op_type for n in ops_of(causal())] == [STATES, OUTPUT]
    decays = causal(decay="head", decay_rates=(0.9, 0.9, 0.5, 0.5))
    assert [n.op_type for n in ops_of(decays)] == [STATES, OUTPUT]
    gates = ops_of(causal(decay="channel", decay_source="g", form="operator"))
    assert [n.op_type for n in gates] == ["Reshape", STATES, OUTPUT]
    delta = ops_of(causal(update="delta", update_source="b", decay="token", decay_source="g", form="operator"))
    assert [n.op_type for n in delta] == [SOLVE, DELTA, OUTPUT]
    assert delta[-1].input[2] == delta[1].output[0] != "v"


def test_kernels_like_longer_chunks() -> None:
    """As long as enough blocks are left; parameters of a plan are those of bodies."""

    def chunk(tokens: Any, heads: int, **more: Any) -> Any:
        site = causal(query_length=tokens, key_length=tokens, heads=heads, kv_heads=heads, value_dim=128, **more)
        (found,) = LINEAR.exact_candidates(site)
        longer = kernel_parameters(LINEAR, site, found.parameters)  # type: ignore[union-attr]
        LINEAR.lower(site, longer, 18)
        return found.parameters["chunk"], longer["chunk"]  # type: ignore[union-attr]

    assert chunk(8192, 32) == (64, 1024) and chunk(2048, 32) == (64, 256)
    assert chunk(8192, 1) == (64, 64) and chunk(100, 200) == (64, 128) and chunk("n", 32) == (64, 64)
    assert chunk(8192, 32, decay="channel", decay_source="g", form="operator") == (16, 64)
    plain = causal(causal=False, mask=MaskFacts(), query_length=4096, key_length=4096)
    assert kernel_parameters(LINEAR, plain, {"chunk": 7}) == {"chunk": 7}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"decay": "head", "decay_rates": (0.9, 0.8, 0.5, 0.5)}, "decay"),
    ({"decay": "head", "decay_rates": (0.9, 0.9)}, "decay"),
    ({"decay": "head", "decay_rates": (1.1, 1.1, 0.5, 0.5)}, "decay"),
    ({"update": "delta", "update_source": "b", "decay": "channel", "decay_source": "g"}, "update-rule"),
    ({"present_state": "s"}, "state-used"),
    ({"query_length": 20}, "lengths"), ({"kv_heads": 3}, "heads"), ({"dtype": "int8"}, "dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "code"), REFUSED, ids=str)
def test_what_is_refused(changed: dict[str, Any], code: str) -> None:
    (said,) = LINEAR.exact_candidates(causal(**changed))
    assert not said.ok and said.code == code  # type: ignore[union-attr]
    with pytest.raises(Unsupported):
        LINEAR.lower(causal(**changed), {"chunk": 16}, 18)


def test_certificates_and_other_sites_are_refused() -> None:
    some = Certificate("compared", "one length", general=False)
    mask = MaskFacts((MaskPart("causal", some, -1, 0),), "zero")
    dynamic = causal(mask=mask, query_length="n", key_length="n")
    (said,) = LINEAR.exact_candidates(dynamic)
    assert said.code == "certificate"  # type: ignore[union-attr]
    softmax = replace(causal(), kind="softmax", linear=None)
    assert LINEAR.exact_candidates(softmax) == () and LINEAR.supports(softmax, {"chunk": 16}).code == "kind"
    for bad in ({"chunk": -1}, {"chunk": 0}, {"chunk": "8"}, {"block": 8}):
        assert LINEAR.supports(causal(), bad).code == "parameters"


def test_chunks_fill_a_gpu_and_divide_the_length() -> None:
    long = replace(causal(), batch=1, heads=16, kv_heads=16, query_length=16384, key_length=16384, head_dim=32,
                   value_dim=32, mask=MaskFacts())  # fmt: skip
    assert long.linear is not None
    long = replace(long, linear=replace(long.linear, causal=False))
    assert module.chunk_of(long) == 1024
    for length, chunk in ((1024, 0), (4096, 1024), (4097, 0)):
        assert module.chunk_of(replace(long, key_length=length)) == chunk
    assert module.chunk_of(replace(long, key_length="n")) == module.chunk_of(replace(long, batch=32)) == 0


def test_a_wrong_lowering_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate compares with the original subgraph in float64: another epsilon is rolled back."""
    spec = Spec(length=64, dim=16, value_dim=16, normaliser="sum", epsilon=1.0)
    build_path = tmp_path / "model.onnx"
    model, _ = detected(build(spec), tmp_path)
    build_path.write_bytes(model.proto.SerializeToString())
    right = module.form_of
    monkeypatch.setattr(module, "form_of", lambda s, c: replace(right(s, c), epsilon=1.001))
    options = Options(policy="linear", target="onnx", out=tmp_path / "out", keep_slower=True)
    result = pipeline.compile(build_path, options)
    (site,) = result.sites
    assert "not exact" in site.rolled_back and result.outcome != "replaced"


ZOO = ["linear-retention", "linear-summed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_exports_end_to_end(name: str, tmp_path: Path) -> None:
    """Through the whole pipeline, by a policy that takes every site whatever is predicted."""
    end_to_end(f"{name}-dynamo-18-sdpa", tmp_path)


def end_to_end(slug: str, folder: Path, **options: Any) -> None:
    from attncompile.models.zoo import check
    from attncompile.models.zoo.table import ENTRIES

    entry = next(e for e in ENTRIES if e.slug == slug)
    entry = replace(entry, options={**entry.options, **options})
    check.exported(entry, folder / "model.onnx")
    compiled(folder / "model.onnx")


def compiled(path: Path) -> Report:
    """All linear sites of a file replaced and proved, by a policy that takes every one whatever is predicted."""
    policy = path.parent / "always.toml"
    policy.write_text('[exact]\nmechanisms = ["LinearAttention"]\nmin_gain = 0.0\n')
    with_engine = find_spec("tensorrt_rtx") is not None
    target, precision = ("tensorrt-rtx", "fp16") if with_engine else ("onnx", None)
    result = pipeline.compile(
        path, Options(policy=str(policy), target=target, precision=precision, out=path.parent / "out", keep_slower=True)
    )
    linear = [s for s in result.sites if s.site.kind == "linear"]
    assert linear and all(s.decision.mechanism == "LinearAttention" and not s.rolled_back for s in linear)
    assert all(s.exactness is not None and s.exactness.passed for s in linear)
    assert result.outcome == "replaced" and result.exit_code == 0
    assert result.parity is not None and result.parity.passed
    for compared in result.parity.comparisons:
        assert compared.metrics is not None and compared.metrics.relative_l2 <= 1e-5
    if with_engine:
        is_an_engine(path.parent / "out", result)
    return result


def is_an_engine(out: Path, result: Report) -> None:
    """Of standard ops alone, near the original in halves. It is built here and not run."""
    lowered = onnx.load(out / "model.tensorrt-rtx.onnx")
    assert {n.domain for n in lowered.graph.node} == {""} and not lowered.functions
    (built,) = [t for t in result.targets if t.name == "tensorrt-rtx"]
    assert built.engine_size == (out / "model.engine").stat().st_size > 100_000
    (said,) = [n for n in built.notes if n.startswith("fp16 against the original")]
    assert 0 < float(said.split()[-1]) < 2e-3


SANA = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 1,
        "num_cross_attention_heads": 4, "cross_attention_head_dim": 32, "cross_attention_dim": 128,
        "caption_channels": 12, "sample_size": 16, "patch_size": 1}  # fmt: skip


@pytest.mark.slow
def test_efficientvit_end_to_end(tmp_path: Path) -> None:
    if find_spec("timm") is None:
        pytest.skip("needs timm")
    end_to_end("timm-efficientvit_b0-dynamo-18-sdpa", tmp_path, side=64)


@pytest.mark.slow
def test_sana_end_to_end(tmp_path: Path) -> None:
    """Heads of 32, as SANA has them: of eight channels all may be negative, and the original divides 0 by 0."""
    pytest.importorskip("diffusers")
    sizes = {"hidden_states": (1, 4, 16, 16), "encoder_hidden_states": (1, 7, 12), "timestep": (1,)}
    end_to_end("sana-dynamo-18-sdpa", tmp_path, settings=SANA, inputs=sizes)


@pytest.mark.slow
def test_lit_end_to_end(tmp_path: Path) -> None:
    """Relu features of two heads, and a depthwise convolution of the values beside."""
    pytest.importorskip("diffusers")
    from attncompile.models import export

    result = compiled(export("lit", tmp_path / "model.onnx", opset=18).path)
    assert [(s.site.heads, s.site.linear.normaliser) for s in result.sites if s.site.linear] == [(2, "sum")] * 2


@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
def test_the_delta_rule_of_the_operator(rule: str, tmp_path: Path) -> None:
    """Beside ONNX Runtime's own way, which is a Scan over the tokens; gates for every channel are refused."""
    from attncompile.passes.replace import apply
    from tests.passes.test_linear_operator import _operator

    shapes = {"q": [2, 70, 64], "k": [2, 70, 32], "v": [2, 70, 40], "b": [2, 70, 2]}
    shapes |= {"g": [2, 70, 2]} if rule == "gated_delta" else {}
    model, detection = detected(_operator(shapes, update_rule=rule, q_num_heads=4, kv_num_heads=2), tmp_path)
    (site,) = detection.sites
    (candidate,) = LINEAR.exact_candidates(site)
    assert not hasattr(candidate, "ok"), candidate
    lowering = LINEAR.lower(site, candidate.parameters, model.opset)  # type: ignore[union-attr]
    assert [n.op_type for n in lowering.nodes if n.domain] == [SOLVE, DELTA, OUTPUT]
    rng = np.random.default_rng(3)
    feed = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    feed["k"] /= np.linalg.norm(feed["k"].reshape(2, 70, 2, 16), axis=-1).repeat(16, axis=-1).reshape(2, 70, 32)
    feed["b"] = 1 / (1 + np.exp(-feed["b"]))
    feed |= {"g": -np.abs(feed["g"])} if "g" in feed else {}
    made = apply(model, [(site, lowering)], {})
    ours, theirs = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(["y"], feed)[0]
        for m in (made, model.proto)
    )
    assert ours.shape == theirs.shape and np.linalg.norm(ours - theirs) <= 3e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [
        ((1, 70, 16384, 32, 32), 2048), ((1, 16, 16384, 128, 128), 1024), ((1, 16, 65536, 128, 128), 4096),
        ((4, 16, 8192, 72, 72), 2048), ((1, 1, 4096, 64, 64), 1024), ((1, 1, 4100, 64, 64), 0),
        ((64, 16, 65536, 64, 64), 0), ((1, 8, 1000, 32, 32), 0),
    ],
)  # fmt: skip
def test_chunks_are_as_many_as_fill_a_gpu(sizes: tuple[int, ...], chunk: int) -> None:
    """Two short heads share a block; all chunks are alike and whole tiles, and none is short."""
    assert kernel.whole_chunk(*sizes) == chunk
