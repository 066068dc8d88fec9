"""What the three models share: attention by torch's SDPA, feed-forward nets, norms, fixed positions, first weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class RmsNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over [batch, tokens, hidden]; with ``rope``, on rotated queries and keys and causal."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        batch, tokens, hidden = x.shape
        shape = (batch, tokens, self.heads, hidden // self.heads)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # [batch, heads, tokens, head dim]
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=rope is not None)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, hidden))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of [batch, heads, tokens, D] in the half-split form."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Mlp(nn.Module):
    """GELU between two matrices."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, ffn)
        self.down_proj = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.gelu(self.up_proj(x), approximate="tanh"))


def with_positions(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x`` [batch, rows * columns, hidden] plus fixed sine and cosine positions, in units of patches: an image of
    another size gives its patches the same ones.

    One half of the channels tells the row, the other the column. Each half is a table of its own, [rows, 1, hidden] and
    [1, columns, hidden] with zeros in the other half, so that an exported file holds no [rows * columns, hidden].
    """
    batch, tokens, hidden = x.shape
    quarter = hidden // 4
    rates = torch.exp(-math.log(100.0) * torch.arange(quarter, device=x.device) / quarter)
    tables = []
    for count in (rows, columns):
        angles = torch.arange(count, device=x.device).float()[:, None] * rates
        tables.append(torch.cat((angles.sin(), angles.cos()), dim=1).to(x.dtype))
    of_rows = functional.pad(tables[0], (0, 2 * quarter))[:, None]
    of_columns = functional.pad(tables[1], (2 * quarter, 0))[None]
    return (x.view(batch, rows, columns, hidden) + of_rows + of_columns).view(batch, tokens, hidden)


def patches_of(images: Tensor, patch: int) -> Tensor:
    """[batch, channels, side, side] as [batch, patches, channels * patch * patch], row by row."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    cut = images.reshape(batch, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


def first_weights(module: nn.Module, seed: int, layers: int) -> None:
    """Normal weights of deviation 0.02, smaller where they write into the residual stream; biases 0.

    Drawn on the CPU, so that every machine starts from the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                continue
            deviation = 0.02 / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            if "zero" in name:
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                layer.bias.zero_()
