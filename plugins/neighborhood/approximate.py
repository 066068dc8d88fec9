"""Windows that approximate full attention: which sizes are offered for a site, and the parameters of the body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attncompile.core.site import AttentionSite

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Sides of boxes and diameters of balls, as shares of the grid's (``TokenGrid.ball``)."""

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
    out: list[tuple[dict[str, Any], str]] = []
    for share in SHARES if _has_neighborhoods(site) else ():
        assert site.grid is not None
        sides = site.grid.shape
        kernel = [min(side, 2 * int(side * share / 2) + 1) for side in sides]  # odd where it fits
        if tuple(kernel) == sides or min(kernel) < 3 or any(kernel == known["kernel_size"] for known, _ in out):
            continue
        given = {"kernel_size": kernel, "border": "clamp", **_on_grid(site)}
        out.append((given, _said(site, "a neighborhood", kernel)))
    return out


def balls(site: AttentionSite) -> list[tuple[dict[str, Any], str, dict[str, Any] | None]]:
    """CLEAR's balls (arXiv:2412.16112) of a quarter of each side of the site's grid to all of it: each with the box
    that holds it, which costs as much where a kernel meets whole boxes; None where that is the whole grid.
    """
    out: list[tuple[dict[str, Any], str, dict[str, Any] | None]] = []
    for share in (*SHARES, 1.0) if _has_neighborhoods(site) else ():
        assert site.grid is not None
        sides = site.grid.shape
        kernel = list(site.grid.ball(share))
        if min(kernel) < 3 or any(kernel == known["kernel_size"] for known, _, _ in out):
            continue
        given = {"kernel_size": kernel, "border": "truncate", "shape": "ball", **_on_grid(site)}
        held = [min(side, size) for side, size in zip(sides, kernel, strict=True)]
        box = {"kernel_size": held, "border": "clamp", **_on_grid(site)} if tuple(held) != sides else None
        out.append((given, _said(site, "a ball", kernel), box))
    return out


def _has_neighborhoods(site: AttentionSite) -> bool:
    return site.grid is not None and len(site.grid.shape) > 1 and site.mask.part("causal") is None


def _on_grid(site: AttentionSite) -> dict[str, Any]:
    """What all neighborhoods of the site have in common."""
    assert site.grid is not None
    return {
        "grid": list(site.grid.shape), "prefix": site.grid.prefix, "suffix": site.grid.suffix,
        "masked_rows": "nan" if site.mask.masked_rows == "nan" else "zero", "block": BLOCK, "dense_below": 0,
    }  # fmt: skip


def _said(site: AttentionSite, what: str, kernel: Sequence[int]) -> str:
    assert site.grid is not None
    size, side = ("x".join(map(str, x)) for x in (kernel, site.grid.shape))
    return f"{what} of {size} on the grid of {side} tokens"
