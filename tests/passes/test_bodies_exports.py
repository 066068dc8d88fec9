"""Control flow as torch exports it: found in its bodies, replaced there, and equal to torch in every branch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attncompile.core.profile import Range
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.normalise import normalise
from attncompile.passes.replace import apply
from attncompile.passes.symbols import profile_for, symbols
from tests.passes.test_replace import run, standard_attention


class Attention(nn.Module):
    """4 heads of 6; each query sees the ``width`` keys up to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out, self.width = nn.Linear(24, 72), nn.Linear(24, 24), width

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4)
        i = torch.arange(n)
        mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - self.width)
        y = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, n, 24))


class Conditional(nn.Module):
    """torch.cond over two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = Attention(5), Attention(9)

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        return torch.cond(flag, lambda x: self.near(x), lambda x: self.far(x), (x,))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_cond(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Conditional().eval(), torch.randn(2, 13, 24)
    sizes = ({1: torch.export.Dim("n", min=2, max=64)}, None) if dynamic else None
    path = tmp_path / "cond.onnx"
    program = torch.onnx.export(module, (x, torch.tensor(True)), dynamo=True, opset_version=18, dynamic_shapes=sizes)
    assert program is not None
    program.save(str(path))
    model = normalise(load(path))
    found = detect(model, profile_for(model, {s: Range(2, 13, 64) for s in symbols(model)}))
    assert not found.near_misses
    facts = {
        s.scope.rpartition("/")[2]: (s.heads, s.head_dim, s.mask.kind, s.mask.to_json()["left"]) for s in found.sites
    }
    assert facts == {"then_branch": (4, 6, "window", 4), "else_branch": (4, 6, "window", 8)}
    assert {s.query_length for s in found.sites} == {"n" if dynamic else 13}
    if dynamic:
        return  # the lowering of this test is for one length
    result = apply(model, [(s, standard_attention(s)) for s in found.sites])
    for flag in (True, False):
        feed = {"x": x.numpy(), "flag": np.array(flag)}
        expected = module(x, torch.tensor(flag)).detach().numpy()
        np.testing.assert_allclose(run(result, feed)[0], expected, rtol=1e-4, atol=1e-5)


class Scanned(nn.Module):
    """torch's scan operator: the state attends to itself and the next slice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(5)

    def forward(self, x: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
        from torch._higher_order_ops.scan import scan

        def step(state: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
            made = torch.tanh(state + self.inner(state + part))
            return made, made.clone()

        return scan(step, x, many)  # type: ignore[no-any-return]


def test_torch_scan(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, x, many = Scanned().eval(), torch.randn(2, 13, 24), torch.randn(4, 2, 13, 24)
    path = tmp_path / "scan.onnx"
    program = torch.onnx.export(module, (x, many), dynamo=True, opset_version=18)
    assert program is not None
    program.save(str(path))
    model = normalise(load(path))
    (site,) = detect(model, profile_for(model, {})).sites
    assert site.scope.startswith("Scan ") and (site.mask.kind, site.mask.to_json()["left"]) == ("window", 4)
    result = apply(model, [(site, standard_attention(site))])
    names = [i.name for i in model.proto.graph.input]
    made = run(result, dict(zip(names, (x.numpy(), many.numpy()), strict=True)))
    for ours, expected in zip(made, module(x, many), strict=True):
        np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


class Scripted(nn.Module):
    """Layers in a loop whose length is an input, the attention chosen by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = Attention(5), Attention(9)

    def forward(self, x: Tensor, flag: Tensor, rounds: int) -> Tensor:
        for _ in range(rounds):
            if bool(flag):  # noqa: SIM108 - as TorchScript has it
                x = torch.tanh(self.near(x))
            else:
                x = torch.tanh(self.far(x))
        return x


@pytest.mark.filterwarnings("ignore")
def test_torchscript_loop_and_if(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module, x = Scripted().eval(), torch.randn(2, 13, 24)
    path, names = tmp_path / "scripted.onnx", ["x", "flag", "rounds"]
    inputs = (x, torch.tensor(True), torch.tensor(3))
    torch.onnx.export(torch.jit.script(module), inputs, str(path), opset_version=17, dynamo=False, input_names=names)
    model = normalise(load(path))
    assert model.opset == 18
    found = detect(model, profile_for(model, {}))
    facts = {s.scope.rpartition("/")[2]: (s.mask.kind, s.mask.to_json()["left"]) for s in found.sites}
    assert facts == {"then_branch": ("window", 4), "else_branch": ("window", 8)} and not found.near_misses
    assert all(s.scope.startswith("Loop ") for s in found.sites)
    result = apply(model, [(s, standard_attention(s)) for s in found.sites])
    for flag, rounds in ((True, 3), (False, 2), (True, 0)):
        feed = {"x": x.numpy(), "flag": np.array(flag), "rounds": np.array(rounds)}
        expected = module(x, torch.tensor(flag), rounds).detach().numpy()
        np.testing.assert_allclose(run(result, feed)[0], expected, rtol=1e-4, atol=1e-5)
