"""Counting: what the torch model does, seen without any detector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attncompile.models.recipe import Built
from attncompile.models.zoo.linear import LinearCore
from attncompile.models.zoo.plain import PlainAttention
from attncompile.models.zoo.seen import from_words, mask_words, structure, window
from attncompile.models.zoo.truth import calls_of, distinct_heads

attend = nn.functional.scaled_dot_product_attention


class _Calls(nn.Module):
    """Calls torch's attention with each kind of mask."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-2]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        padding = torch.ones(2, 1, 1, n, dtype=torch.bool)
        padding[1, ..., -2:] = False
        bias = torch.zeros(n, n).masked_fill(j > i, float("-inf"))
        attend = nn.functional.scaled_dot_product_attention
        results = [
            attend(x, x, x),
            attend(x, x, x, is_causal=True),
            attend(x, x, x, bias),
            attend(x, x, x, bias + 0.5),
            attend(x, x, x, attn_mask=(j <= i) & (j > i - 4)),
            attend(x, x[:, :2], x[:, :2], padding, enable_gqa=True),
            attend(x, x, x, padding & (j <= i)),
            attend(x[:, :, -1:], x, x[..., :5], is_causal=False),
        ]
        return sum(r.sum() for r in results)  # type: ignore[return-value]


def test_counting_knows_the_masks() -> None:
    calls = calls_of(Built(_Calls(), {"x": torch.randn(2, 4, 9, 8)}, ("y",), {}))
    assert [(c.mask, c.heads, c.kv_heads, c.head_dim, c.value_dim, c.query_length, c.key_length) for c in calls] == [
        ("none", 4, 4, 8, 8, 9, 9), ("causal", 4, 4, 8, 8, 9, 9), ("causal", 4, 4, 8, 8, 9, 9),
        ("causal+bias", 4, 4, 8, 8, 9, 9), ("window 3 0", 4, 4, 8, 8, 9, 9), ("none+padding", 4, 2, 8, 8, 9, 9),
        ("causal+padding", 4, 4, 8, 8, 9, 9), ("none", 4, 4, 8, 5, 1, 9),
    ]  # fmt: skip
    assert nn.functional.scaled_dot_product_attention is attend  # restored


def test_heads_that_repeat_are_one() -> None:
    key = torch.randn(2, 3, 5, 4)
    assert distinct_heads(key) == 3
    assert distinct_heads(key.repeat_interleave(2, 1)) == 3
    assert distinct_heads(key.repeat(1, 2, 1, 1)) == 6  # another order: no groups of neighbours
    assert distinct_heads(key[:, :1].expand(2, 6, 5, 4)) == 1


def test_words_of_masks() -> None:
    seen = window(2, 0, 5, 7)
    assert structure(seen) == "window 2 0"
    flipped = seen.copy()
    flipped[3, 0] ^= True
    assert structure(flipped).startswith("pattern ")
    for array in (seen, flipped, np.ones((5, 7), bool), np.zeros((5, 7), bool)):
        assert np.array_equal(from_words(structure(array), 5, 7), array)
    both = np.stack([seen, seen])[:, None]
    assert mask_words(both, False) == "window 2 0"
    both[1, ..., :3] = False
    assert mask_words(both, True) == "window 2 0+padding+bias"
    both[1, 0, 4, 5] = False  # which another row still sees: no whole key
    assert mask_words(both, False) == "window 2 0+data"


@pytest.mark.parametrize("how", ["einsum", "flat", "exp", "softcap", "float", "fill", "plain", "sinks"])
def test_watching_sees_what_is_written_out(how: str) -> None:
    torch.manual_seed(0)
    built = Built(PlainAttention(how).eval(), {"x": torch.randn(2, 11, 32)}, ("y",), {})
    (call,) = calls_of(built, ("PlainAttention",))
    assert (call.heads, call.kv_heads, call.head_dim, call.value_dim, call.query_length, call.key_length) == (
        4, 4, 8, 8, 11, 11,
    )  # fmt: skip
    assert call.mask == ("causal" if how == "fill" else "none")
    assert call.sinks == (how == "sinks")
    assert calls_of(built) == []  # only where it is told to


class _Biased(nn.Module):
    num_heads = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(-1, -2) * 0.3 + torch.linspace(0, 1, x.shape[-2])
        router = torch.softmax(x[..., :3], -1)
        wrong_axis = torch.softmax(scores, -2) @ x
        return torch.softmax(scores, -1) @ x + wrong_axis + router.sum()


def test_watching_sees_a_bias_and_no_softmax_over_another_axis() -> None:
    calls = calls_of(Built(_Biased(), {"x": torch.randn(2, 2, 7, 5)}, ("y",), {}), ("_Biased",))
    assert [(c.mask, c.heads) for c in calls] == [("none+bias", 2)]


def test_a_call_inside_another_counts_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, x, x)[0] + self.layer(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 7, 16, requires_grad=True)
    with torch.enable_grad():
        calls = calls_of(Built(Both(), {"x": x}, ("y",), {}))
    assert [(c.heads, c.head_dim, c.query_length, c.how) for c in calls] == [(4, 4, 7, "nn.MultiheadAttention")] * 2


class _Linear(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.core = LinearCore(how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core.attend(x, x + 1, x[..., :8])


@pytest.mark.parametrize(("how", "mask"), [("relu", "none"), ("triangle", "causal")])
def test_linear_attention_is_recorded(how: str, mask: str) -> None:
    (call,) = calls_of(Built(_Linear(how), {"x": torch.randn(2, 3, 14, 8)}, ("y",), {}), linear=("LinearCore",))
    assert (call.kind, call.heads, call.head_dim, call.value_dim, call.query_length, call.mask) == (
        "linear", 3, 8, 8, 14, mask,
    )  # fmt: skip


class LiteMLA(nn.Module):
    """The products of EfficientViT's layer, without a method that could be recorded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = nn.functional.pad(x[..., :5], (0, 1), value=1)
        y = x.relu() @ (x.relu().transpose(-1, -2) @ value)
        return y[..., :-1] / (y[..., -1:] + 1e-5)


def test_chained_products_are_linear_attention() -> None:
    (call,) = calls_of(Built(LiteMLA(), {"x": torch.randn(2, 3, 13, 8)}, ("y",), {}), linear=("LiteMLA",))
    assert (call.kind, call.heads, call.head_dim, call.value_dim, call.query_length, call.key_length) == (
        "linear", 3, 8, 5, 13, 13,
    )  # fmt: skip


class _Banded(nn.Module):
    num_heads = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[:, None]


def test_changed_tokens_show_who_sees_whom() -> None:
    (call,) = calls_of(Built(_Banded(), {"x": torch.randn(2, 9, 6)}, ("y",), {}), sparse=("_Banded",))
    assert (call.mask, call.heads, call.head_dim, call.query_length) == ("window 1 0", 2, 3, 9)


class _Dependent(nn.Module):
    """A mask made of the input, and attention over constants, which an exporter folds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        constant = torch.ones(2, 2, 6, 4)
        seen = (x.sum(-1)[:, :, None] > 0) | torch.eye(6, dtype=torch.bool)
        first = nn.functional.scaled_dot_product_attention(x, x, x, seen)
        return first + nn.functional.scaled_dot_product_attention(constant, constant, constant)


def test_a_second_run_shows_what_depends_on_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 4)
    built = Built(_Dependent(), {"x": x}, ("y",), {})
    assert [c.mask for c in calls_of(built, varied=("x",))] == ["none+data"]
    assert len(calls_of(built)) == 2
