"""Whole models of the end-to-end benchmark: real architectures from their config classes, seeded weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Model:
    """``build(tiny, layers)`` gives a module in float32 and its inputs; ``tiny`` keeps the structure at sizes for a
    CPU, ``layers`` says how many where not all are wanted. ``of`` names the architecture: models of one share exports.

    ``neighborhood(tiny)``: attributes that every site is given, exact or not; None: what a plan finds. ``wanted``: peer
    -> most that ours may take of its time. ``exact``: whether ours computes what the peers do. ``left_out``: peer ->
    why it is not run.
    """

    name: str
    of: str
    build: Callable[[bool, int | None], tuple[torch.nn.Module, Mapping[str, torch.Tensor]]]
    wanted: Mapping[str, float] = field(default_factory=dict)
    neighborhood: Callable[[bool], dict[str, Any]] | None = None
    flex: bool = False
    """Whether the architecture can run with FlexAttention's window."""
    causal: bool = False
    """Whether torch's own attention may skip the causal half in the dense peer."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    tokens: str = ""
    """A name where the exports for us leave the length open: a mask of 32,768 x 32,768 is not compared as a whole, one
    that is computed from the length is, at the lengths around its window.
    """

    @property
    def exact(self) -> bool:
        return self.neighborhood is None


class Only(torch.nn.Module):
    """One tensor in, one out."""

    def __init__(self, inner: torch.nn.Module, name: str, **fixed: Any) -> None:
        super().__init__()
        self.inner, self._name, self._fixed = inner, name, fixed
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(**{self._name: x}, **self._fixed)[0]


def dinov2(tiny: bool, layers: int | None = None) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
    """ViT-L/14 at 518 pixels: 1,370 tokens, 16 heads of 64."""
    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2} if tiny else {
        "hidden_size": 1024, "num_hidden_layers": layers or 24, "num_attention_heads": 16}  # fmt: skip
    image = 70 if tiny else 518
    config = Dinov2Config(image_size=image, patch_size=14, attn_implementation="sdpa", **size)
    model = seeded(lambda: Dinov2Model(config))
    return Only(model, "pixel_values"), {"x": noise(2 if tiny else 8, 3, image, image)}


def so400m(tiny: bool, layers: int | None = None) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
    """SigLIP's SO400M/14 at 896 pixels: 4,096 tokens, 16 heads of 72."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    size = {"hidden_size": 144, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    if not tiny:
        size = {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": layers or 27,
        }
    image = 14 * 8 if tiny else 896
    config = SiglipVisionConfig(
        image_size=image, patch_size=14, attn_implementation="sdpa", vision_use_head=False, **size
    )
    model = seeded(lambda: SiglipVisionModel(config))
    return Only(model, "pixel_values"), {"x": noise(1 if tiny else 2, 3, image, image)}


def wan(tiny: bool, layers: int | None = None) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
    """8 blocks of Wan 2.1 1.3B: 21 x 30 x 52 tokens, 12 heads of 128; text and time are constants."""
    from diffusers import WanTransformer3DModel

    heads, dim = (2, 32) if tiny else (12, 128)
    model = seeded(lambda: WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=dim, ffn_dim=128 if tiny else 8960,
        num_layers=2 if tiny else layers or 8, text_dim=64 if tiny else 4096,
    ))  # fmt: skip
    frames, high, wide = (4, 6, 8) if tiny else (21, 30, 52)
    text = noise(1, 16 if tiny else 512, 64 if tiny else 4096)
    return Conditioned(model, text), {"x": noise(1, 16, frames, 2 * high, 2 * wide)}


class Conditioned(torch.nn.Module):
    """A video transformer at one step and one prompt."""

    def __init__(self, inner: torch.nn.Module, text: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("text", text)
        self.register_buffer("step", torch.tensor([500]))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states=x, timestep=self.step, encoder_hidden_states=self.text, return_dict=False)[0]


def mistral(tiny: bool, layers: int | None = None) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
    """8 layers of Mistral's shape: 32,768 tokens, window 4,096, 32 heads of 128 on 8."""
    from transformers import MistralConfig, MistralModel

    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "sliding_window": 64} if tiny else {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers or 8, "num_attention_heads": 32,
        "num_key_value_heads": 8, "sliding_window": 4096}  # fmt: skip
    tokens = 300 if tiny else 32768
    config = MistralConfig(vocab_size=1024, max_position_embeddings=tokens, attn_implementation="sdpa",
                           use_cache=False, **size)  # fmt: skip
    model = seeded(lambda: MistralModel(config))
    return Only(model, "input_ids"), {"x": torch.randint(0, 1024, (1, tokens), generator=generator())}


def chosen(names: Sequence[str]) -> list[Model]:
    """The models called so, or all."""
    unknown = set(names) - {m.name for m in MODELS}
    if unknown:
        raise SystemExit(f"error: no model {min(unknown)}\nhint: there are {', '.join(m.name for m in MODELS)}")
    return [m for m in MODELS if not names or m.name in names]


def half(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v.half() if v.is_floating_point() else v for n, v in inputs.items()}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator())


def seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return make().eval()


BEST_ORT = "best onnxruntime"
ORT = ("onnxruntime raw", "onnxruntime opset 23", "onnxruntime optimizer", "onnxruntime onnxscript")
_SAME = dict.fromkeys(ORT, "as of so400m-896-b2, whose model it runs")
_SCORES = "it keeps the scores, 26 GB a layer: no peer to beat"
_MASKED = "it keeps scores and a mask of 32,768 x 32,768 for 32 heads, 64 GB and more: no peer to beat"
MODELS = (
    Model("dinov2-l-518-b8", "dinov2", dinov2, {BEST_ORT: 0.72, "compile": 0.95}),
    Model("so400m-896-b2", "so400m", so400m, {BEST_ORT: 0.72}),
    Model("so400m-896-b2-na16", "so400m", so400m, {"compile": 0.9},
          lambda tiny: _grid([8, 8] if tiny else [64, 64], [4, 4] if tiny else [16, 16], strided=True),
          left_out=_SAME),
    Model("wan-8-na9x15x27", "wan", wan, {"compile": 0.65},
          lambda tiny: _grid([4, 6, 8] if tiny else [21, 30, 52], [3, 3, 3] if tiny else [9, 15, 27]),
          left_out=dict.fromkeys((ORT[0], *ORT[2:]), _SCORES)),
    Model("mistral-8-32k-w4096", "mistral", mistral, {"compile dense": 0.8, "compile flex": 1.05}, flex=True,
          causal=True, left_out=dict.fromkeys(ORT, _MASKED), tokens="tokens"),
)  # fmt: skip


def _grid(grid: list[int], kernel: list[int], strided: bool = False) -> dict[str, Any]:
    ones = [1] * len(grid)
    return {
        "grid": grid, "kernel_size": kernel, "stride": kernel if strided else ones, "dilation": ones,
        "causal": [0] * len(grid), "border": "clamp", "shape": "box", "prefix": 0, "suffix": 0, "masked_rows": "zero",
        "block": 64, "dense_below": 0,
    }  # fmt: skip
