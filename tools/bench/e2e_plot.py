"""Times of whole models as a picture that is read on light and on dark: nothing is behind it, and no colour is near
either end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS = {
    "ours": "ours", "ours graph": "ours, CUDA graph", "ours norms": "ours, half norms",
    "ours norms graph": "ours, half norms, CUDA graph",
}  # fmt: skip
"""Variants that are drawn, and what they are called; without fusions and in strict mode ours stands in the table."""
BEST = "best onnxruntime"
"""The least of others: no bar of its own."""
GREY, BLUE, ORANGE = "#767676", "#2b7fd0", "#c4681c"


def bars(case: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Name, milliseconds a call, whether it is ours: ours first, then the peers, fastest first."""
    ms = case["ms"]
    peers = sorted((t, n) for n, t in ms.items() if not n.startswith("ours") and n != BEST)
    return [(said, ms[n], True) for n, said in OURS.items() if n in ms] + [(_peer(n), t, False) for t, n in peers]


def _peer(name: str) -> str:
    return f"torch.{name}" if name.startswith("compile") else name.replace("onnxruntime", "ONNX Runtime")


def plot(result: dict[str, Any], out: Path) -> None:
    """A panel for each model that was timed, each with an axis of its own, a bar for each run, its time beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [c for c in result["cases"] if "ms" in c and "failed" not in c]
    rows = [len(bars(c)) + 1.5 for c in cases]
    said = {"svg.fonttype": "none", "svg.hashsalt": "e2e", "font.size": 9, "text.color": GREY, "axes.edgecolor": GREY}
    with matplotlib.rc_context({**said, "xtick.color": GREY, "ytick.color": GREY, "axes.labelcolor": GREY}):
        figure, panels = plt.subplots(
            len(cases), figsize=(7.5, 0.19 * sum(rows) + 0.4), height_ratios=rows, squeeze=False, layout="constrained"
        )
        for case, axes in zip(cases, panels[:, 0], strict=True):
            found = bars(case)
            drawn = axes.barh(
                [n for n, _, _ in found],
                [t for _, t, _ in found],
                0.75,
                color=[BLUE if o else ORANGE for *_, o in found],
            )
            axes.bar_label(drawn, [f"{t:.1f}" for _, t, _ in found], padding=3)
            axes.set_xlim(0, 1.12 * max(t for _, t, _ in found))
            axes.set_title(case["name"], loc="left", fontsize=9, fontweight="bold")
            axes.invert_yaxis()
            axes.set_xticks([])
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            axes.tick_params(left=False)
        panels[-1, 0].set_xlabel(f"ms a call, shorter is better; fp16, {result['gpu']}, {result['when']}")
        figure.savefig(out, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
