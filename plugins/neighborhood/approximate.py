"""Windows that approximate full attention: which sizes are offered for a site, and the parameters of the body."""

from __future__ import annotations

from typing import Any

from attncompile.core.site import AttentionSite

BLOCK = 64
"""Queries per tile. 128 is 5% faster at N = 4096 in ONNX Runtime and twice slower below N = 128."""

SINKS = 4
"""First tokens that approximations of causal sites keep (StreamingLLM, arXiv:2309.17453)."""


def body_parameters(site: AttentionSite, window: int) -> dict[str, int]:
    """``dense_below``: up to this length the dense form costs less than blocks (measured: window + 2 blocks)."""
    static = isinstance(site.query_length, int) and isinstance(site.key_length, int)
    return {"block": BLOCK, "dense_below": 0 if static else window + 2 * BLOCK}


def sequence_windows(site: AttentionSite) -> list[tuple[dict[str, Any], str]]:
    """Windows of N/16 to N/2 (or fixed sizes for a dynamic N); causal sites keep their first tokens."""
    length = site.key_length
    sizes = [length // x for x in (16, 8, 4, 2)] if isinstance(length, int) else [128, 256, 512, 1024]
    causal = site.mask.part("causal") is not None
    grid = site.grid
    out: list[tuple[dict[str, Any], str]] = []
    for size in sizes:
        if size < 16:
            continue
        prefix = SINKS if causal else (grid.prefix if grid is not None else 0)
        suffix = 0 if causal or grid is None else grid.suffix
        left = size - 1 if causal else size // 2
        parameters = {
            "kernel_size": [size], "left": [left], "causal": [int(causal)], "border": "truncate", "grid": [-1],
            "prefix": prefix, "suffix": suffix, "masked_rows": "nan" if site.mask.masked_rows == "nan" else "zero",
            **body_parameters(site, size + prefix + suffix),
        }  # fmt: skip
        first = f"the first {prefix} tokens and " if prefix else ""
        out.append((parameters, f"{first}a window of {size} of {length} tokens"))
    return out


def grid_windows(site: AttentionSite) -> list[tuple[dict[str, Any], str]]:
    """Clamped neighborhoods of a quarter to three quarters of each side of the site's grid."""
    grid = site.grid
    if grid is None or len(grid.shape) < 2 or site.mask.part("causal") is not None:
        return []
    out: list[tuple[dict[str, Any], str]] = []
    seen: set[tuple[int, ...]] = set()
    for share in (0.25, 0.375, 0.5, 0.625, 0.75):
        kernel = tuple(min(side, 2 * int(side * share / 2) + 1) for side in grid.shape)  # odd where it fits
        if kernel in seen or kernel == grid.shape or min(kernel) < 3:
            continue
        seen.add(kernel)
        parameters: dict[str, Any] = {
            "kernel_size": list(kernel), "border": "clamp", "grid": list(grid.shape), "prefix": grid.prefix,
            "suffix": grid.suffix, "masked_rows": "nan" if site.mask.masked_rows == "nan" else "zero",
            "block": BLOCK, "dense_below": 0,
        }  # fmt: skip
        size, side = ("x".join(map(str, x)) for x in (kernel, grid.shape))
        out.append((parameters, f"a neighborhood of {size} on the grid of {side} tokens"))
    return out
