"""Kernels inside ONNX Runtime's CUDA provider, against float64 and against ONNX Runtime's own operators.

Written on a machine without a GPU. They need onnxruntime-gpu, torch for CUDA and Triton (or kernels in the cache).
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attncompile import kernel_kit, pipeline
from attncompile.console import SilentProgress
from attncompile.core.errors import AttncompileError
from attncompile.runtime import InferenceSession, layout
from attncompile.runtime.locate import library
from attncompile.targets import onnxruntime_cuda
from attncompile.targets.kernels import by_name
from tests.runtime.conftest import TYPES, node_model
from tests.runtime.two_sides import BELOW, EDGE, planned

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
    ),
]

ATTENTION = ("query", "key", "value", "key_mask", "bias", "sinks", "mask", "key_lengths")
HALF = {"float16": (torch.float16, 2e-3), "bfloat16": (torch.bfloat16, 1.6e-2)}
FORMS = {
    "dense": {}, "causal": {"right": 0}, "window": {"left": 100, "right": 0}, "softcap": {"right": 0, "softcap": 20.0},
}  # fmt: skip


def out_folder(folder: Path, model: Any, architectures: Sequence[int] = ()) -> Path:
    """A folder as the target writes it; ``model.onnx`` is left out."""
    import shutil

    kit = kernel_kit.Kit(architectures or kernel_kit.default_architectures(), SilentProgress())
    kernels = kit.compile(model)
    assert not [k.reason for k in kernels if k.reason]
    folder.mkdir(parents=True, exist_ok=True)
    lowered = onnxruntime_cuda._launching(model, by_name(kernels))
    (folder / layout.MODEL).write_bytes(lowered.SerializeToString())
    kit.write(folder / layout.BUNDLE)
    shutil.copy(library(), folder / layout.LIBRARY)
    return folder


def shapes(heads: int = 8, kv: int = 2, dim: int = 64, words: str = "BNHD BNHD BNHD") -> dict[str, list[Any]]:
    sizes = ({"B": "b", "N": "n", "H": heads, "D": dim}, *({"B": "b", "N": "m", "H": kv, "D": dim},) * 2)
    named = zip(("query", "key", "value"), sizes, words.split(), strict=True)
    return {name: [size[a] for a in word] for name, size, word in named}


def model_of(given: Mapping[str, list[Any]], kind: str, **attributes: Any) -> Any:
    types = {**dict.fromkeys(given, kind), "key_mask": "bool"}
    return node_model("Attention", given, types, ("output",), ATTENTION, **{"scale": 0.125, **attributes})


def tensors(given: Mapping[str, list[Any]], kind: str, seed: int = 0, **run: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    found = {}
    for name, shape in given.items():
        size = [run[s] if isinstance(s, str) else s for s in shape]
        data = torch.randn(size, device="cuda")
        found[name] = data > -0.5 if name == "key_mask" else data.to(HALF[kind][0])
    return found


def reference(t: Mapping[str, Any], words: str = "BNHD BNHD BNHD", **attributes: Any) -> Any:
    """[B, H, Nq, D] in float64."""
    q, k, v = (
        t[n].double().permute([word.index(a) for a in "BHND"])
        for n, word in zip(("query", "key", "value"), words.split(), strict=True)
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * attributes.get("scale", 0.125)
    if attributes.get("softcap"):
        scores = attributes["softcap"] * torch.tanh(scores / attributes["softcap"])
    place = torch.arange(q.shape[2], device="cuda")[:, None] + k.shape[2] - q.shape[2]
    other = torch.arange(k.shape[2], device="cuda")[None, :]
    left, right = attributes.get("left", -1), attributes.get("right", -1)
    if left >= 0:
        scores = scores.masked_fill(other < place - left, float("-inf"))
    if right >= 0:
        scores = scores.masked_fill(other > place + right, float("-inf"))
    if "key_mask" in t:
        scores = scores.masked_fill(~t["key_mask"], float("-inf"))
    return scores.softmax(-1) @ v


def error(ours: Any, theirs: Any) -> float:
    assert torch.isfinite(ours.double()).all()
    return float((ours.double() - theirs).norm() / theirs.norm())


class Bound:
    """A session whose inputs and output are tensors of torch, bound where they lie."""

    def __init__(self, session: Any, inputs: Mapping[str, Any], output: Any) -> None:
        self._session, self.inputs, self.output = session, dict(inputs), output
        self._binding = session.io_binding()
        for name, tensor in inputs.items():
            self._binding.bind_input(name, "cuda", 0, onnx_type(tensor), tuple(tensor.shape), tensor.data_ptr())
        self._binding.bind_output("output", "cuda", 0, onnx_type(output), tuple(output.shape), output.data_ptr())

    def run(self, options: Any = None) -> Any:
        self.output.fill_(float("nan"))
        torch.cuda.synchronize()
        self.again(options)
        torch.cuda.synchronize()
        return self.output

    def again(self, options: Any = None) -> None:
        self._session.run_with_iobinding(self._binding, options)


def onnx_type(tensor: Any) -> Any:
    """As ``bind_input`` takes it: a type of NumPy's, or ONNX's number where NumPy has none."""
    kinds = {torch.float16: np.float16, torch.bool: np.bool_, torch.float32: np.float32}
    return kinds.get(tensor.dtype, TYPES["bfloat16"])


@pytest.mark.parametrize("words", ["BNHD BNHD BNHD", "BHND BHND BHND"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HALF)
def test_right_at_every_shape(tmp_path: Path, kind: str, form: str, words: str) -> None:
    """One session, several shapes, dynamic batch and lengths."""
    given = shapes(words=words)
    layouts = dict(zip(("q_layout", "k_layout", "v_layout", "o_layout"), (*words.split(), "BHND"), strict=True))
    session = InferenceSession(out_folder(tmp_path / "out", model_of(given, kind, **layouts, **FORMS[form])))
    for b, n, m in ((1, 1, 1), (2, 333, 401), (3, 64, 64), (1, 1370, 1370)):
        t = tensors(given, kind, b=b, n=n, m=m)
        ours = Bound(session, t, torch.empty(b, 8, n, 64, device="cuda", dtype=HALF[kind][0])).run()
        assert error(ours, reference(t, words, **FORMS[form])) < HALF[kind][1], (b, n, m)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [64, 72])
def test_parts_of_one_tensor(tmp_path: Path, form: str, dim: int) -> None:
    """Three inputs that are one tensor [B, N, 3, H, D], against torch's views of it."""
    given = {name: ["b", "n", 3, 8, dim] for name in ("query", "key", "value")}
    said = {"q_layout": "BN0HD", "k_layout": "BN1HD", "v_layout": "BN2HD"}
    session = InferenceSession(out_folder(tmp_path / "out", model_of(given, "float16", **said, **FORMS[form])))
    for b, n in ((1, 1), (2, 333), (3, 1370)):
        packed = torch.randn(b, n, 3, 8, dim, device="cuda", dtype=torch.float16)
        out = torch.empty(b, n, 8, dim, device="cuda", dtype=torch.float16)
        ours = Bound(session, dict.fromkeys(given, packed), out).run()
        views = dict(zip(given, packed.unbind(2), strict=True))
        assert error(ours.transpose(1, 2), reference(views, **FORMS[form])) < 2e-3, (b, n)


@pytest.mark.parametrize("dim", [72, 128])
def test_head_dims(tmp_path: Path, dim: int) -> None:
    given = shapes(dim=dim)
    session = InferenceSession(out_folder(tmp_path / "out", model_of(given, "float16", right=0)))
    t = tensors(given, "float16", b=2, n=500, m=500)
    ours = Bound(session, t, torch.empty(2, 500, 8, dim, device="cuda", dtype=torch.float16)).run()
    assert error(ours.transpose(1, 2), reference(t, right=0)) < 2e-3


def test_a_mask_of_keys(tmp_path: Path) -> None:
    given = {**shapes(), "key_mask": ["b", 1, 1, "m"]}
    session = InferenceSession(out_folder(tmp_path / "out", model_of(given, "float16", masked_rows="zero")))
    t = tensors(given, "float16", b=2, n=100, m=130)
    ours = Bound(session, t, torch.empty(2, 100, 8, 64, device="cuda", dtype=torch.float16)).run()
    assert error(ours.transpose(1, 2), reference(t)) < 2e-3


def test_ptx_of_an_older_architecture(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("sm_80 code runs as it is")
    given = shapes()
    session = InferenceSession(out_folder(tmp_path / "out", model_of(given, "float16"), (80,)))
    t = tensors(given, "float16", b=1, n=200, m=200)
    ours = Bound(session, t, torch.empty(1, 200, 8, 64, device="cuda", dtype=torch.float16)).run()
    assert error(ours.transpose(1, 2), reference(t)) < 2e-3


def test_cuda_graph(tmp_path: Path) -> None:
    """Captured, then replayed with other data at the same addresses: equal to a session without a graph, bit by bit."""
    given = shapes()
    folder = out_folder(tmp_path / "out", model_of(given, "float16", right=0))
    plain, graph = (InferenceSession(folder, provider_options=o) for o in ({}, {"enable_cuda_graph": "1"}))
    t = tensors(given, "float16", b=2, n=300, m=300)
    bound = [Bound(s, t, torch.empty(2, 300, 8, 64, device="cuda", dtype=torch.float16)) for s in (plain, graph)]
    for seed in range(4):
        for name, fresh in tensors(given, "float16", seed, b=2, n=300, m=300).items():
            t[name].copy_(fresh)
        expected, ours = bound[0].run(), bound[1].run()
        assert torch.equal(expected, ours)
        assert error(ours.transpose(1, 2), reference(t, right=0)) < 2e-3


def test_a_stream_of_the_users(tmp_path: Path) -> None:
    """Work that the user queued before is done before, without a synchronisation in between."""
    given = shapes()
    stream = torch.cuda.Stream()
    session = InferenceSession(
        out_folder(tmp_path / "out", model_of(given, "float16")),
        provider_options={"user_compute_stream": str(stream.cuda_stream)},
    )
    t = tensors(given, "float16", b=1, n=700, m=700)
    wanted = reference({**t, "query": t["query"] * 2})
    bound = Bound(session, t, torch.empty(1, 700, 8, 64, device="cuda", dtype=torch.float16))
    bound.run()
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        t["query"].mul_(2)
        bound.again(options)
        result = bound.output.clone()
    stream.synchronize()
    assert error(result.transpose(1, 2), wanted) < 2e-3


def test_threads_share_a_session_and_sessions_share_modules(tmp_path: Path) -> None:
    given = shapes()
    folder = out_folder(tmp_path / "out", model_of(given, "float16", right=0))
    sessions = [InferenceSession(folder) for _ in range(3)]
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            b, n = 1 + number % 2, 100 + 37 * number
            with torch.cuda.stream(torch.cuda.Stream()):
                t = tensors(given, "float16", number, b=b, n=n, m=n)
                out = torch.empty(b, n, 8, 64, device="cuda", dtype=torch.float16)
                bound = Bound(sessions[number % 3], t, out)
                for _ in range(20):
                    found = error(bound.run().transpose(1, 2), reference(t, right=0))
                    if found >= 2e-3:
                        wrong.append(found)
        except Exception as caught:  # a thread's would be lost
            wrong.append(caught)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_devices(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = shapes()
    folder = out_folder(tmp_path / "out", model_of(given, "float16"))
    for device in (1, 0):
        session = InferenceSession(folder, device=device)
        with torch.cuda.device(device):
            t = {n: x.to(f"cuda:{device}") for n, x in tensors(given, "float16", b=1, n=100, m=100).items()}
            feeds = {n: x.cpu().numpy() for n, x in t.items()}
            (ours,) = session.run(None, feeds)
        wanted = reference({n: x.to("cuda:0") for n, x in t.items()})
        assert error(torch.from_numpy(ours).to("cuda:0").transpose(1, 2), wanted) < 2e-3


def test_steady_state_takes_no_device_memory(tmp_path: Path) -> None:
    given = shapes()
    session = InferenceSession(out_folder(tmp_path / "out", model_of(given, "float16")))
    t = tensors(given, "float16", b=2, n=500, m=500)
    bound = Bound(session, t, torch.empty(2, 500, 8, 64, device="cuda", dtype=torch.float16))
    bound.run()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(100):
        bound.again()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == before


def test_sessions_come_and_go(tmp_path: Path) -> None:
    """Modules are unloaded with the last session that uses them: memory does not grow."""
    given = shapes()
    folder = out_folder(tmp_path / "out", model_of(given, "float16"))
    free = []
    for _ in range(12):
        session = InferenceSession(folder)
        t = tensors(given, "float16", b=1, n=50, m=50)
        Bound(session, t, torch.empty(1, 50, 8, 64, device="cuda", dtype=torch.float16)).run()
        del session
        gc.collect()
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[3]


def test_errors_are_clear_on_a_gpu(tmp_path: Path) -> None:
    given = shapes()
    folder = out_folder(tmp_path / "out", model_of(given, "float16"))
    session = InferenceSession(folder)
    t = tensors(given, "float16", b=1, n=33, m=33)
    space = torch.empty(33 * 8 * 64 + 8, device="cuda", dtype=torch.float16)
    moved = space[1 : 1 + 33 * 8 * 64].view(1, 33, 8, 64)
    with pytest.raises(Exception, match=r"site: query at 0x[0-9a-f]+ is not a multiple of 16 bytes"):
        Bound(session, {**t, "query": moved}, torch.empty(1, 33, 8, 64, device="cuda", dtype=torch.float16)).run()
    for path in (folder / layout.BUNDLE / "kernels").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    del session
    gc.collect()
    with pytest.raises(AttncompileError, match=r"site: .*its contents are not those of the index"):
        InferenceSession(folder)


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("batched", [False, True])
def test_both_sides_of_a_rule(tmp_path: Path, brief: None, kind: str, batched: bool) -> None:
    """``--keep-dense``: one session takes both branches in turn, each against a file of the CPU that was verified: the
    original where the rule holds, else model.onnx, which approximates.
    """
    given, out = planned(tmp_path, batched), tmp_path / "out"
    made = pipeline.compile(given.model, given.options(out, {"float16": "fp16", "bfloat16": "bf16"}[kind]))
    assert made.exit_code == 0, made.failures
    assert any("launched as kernels: 4 nodes" in note for note in made.targets[1].notes)
    cpu = {"providers": ["CPUExecutionProvider"]}
    original, portable = (onnxruntime.InferenceSession(str(p), **cpu) for p in (given.model, out / "model.onnx"))
    session = InferenceSession(out)
    limit = 4 * HALF[kind][1]  # three layers, and everything around their attention in this type too
    for seed, (t, kept) in enumerate([(EDGE, True), (BELOW, False), (np.float32(1), True), (np.float32(0), False)] * 3):
        feed = given.feed(t, seed=seed)
        wanted, approximated = (s.run(None, feed)[0] for s in (original, portable))
        (ours,) = session.run(None, feed)
        there, other = (
            torch.from_numpy(x).double() for x in ((wanted, approximated) if kept else (approximated, wanted))
        )
        assert error(torch.from_numpy(ours), there) < limit, (t, seed)
        if not kept:
            assert error(torch.from_numpy(ours), other) > max(2 * limit, 0.1), (t, "the dense branch was run")


def test_no_cuda_graph_of_a_rule(tmp_path: Path, brief: None) -> None:
    """Refused with a reason, before ONNX Runtime refuses it too."""
    given, out = planned(tmp_path), tmp_path / "out"
    assert pipeline.compile(given.model, given.options(out)).exit_code == 0
    with pytest.raises(AttncompileError, match=r"is control flow \(If\), of which no CUDA graph is captured"):
        InferenceSession(out, provider_options={"enable_cuda_graph": "1"})
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(layout.STRICT_KEY, "1")
    options.register_custom_ops_library(str(out / layout.LIBRARY))
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    with pytest.raises(Exception, match="control flow"):
        onnxruntime.InferenceSession(str(out / layout.MODEL), options, providers=[provider])
