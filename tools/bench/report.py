"""A result as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PEERS = ("cudnn", "flash", "flex", "flex-tiled", "flex-tiled+permute", "natten")


def table(result: dict[str, Any]) -> str:
    """Markdown; peers that no case has are left out. ``met`` says which of the wanted ratios were reached."""
    peers = [p for p in PEERS if any(p in case["ms"] for case in result["cases"])]
    lines = [
        f"{result['gpu']}, torch {result['torch']}, {result['when']}: fp16 product {result['gemm_tflops']:.0f} TFLOP/s"
        f", copy {result['copy_tbs']:.2f} TB/s; medians of {result['rounds']} alternating rounds, L2 flushed, ms",
        "",
        "| case | ours | TFLOP/s | limit | " + " | ".join(peers) + " | wanted | reached |",
        "|---|---|---|---|" + "---|" * len(peers) + "---|---|",
    ]
    for case in result["cases"]:
        ms = case["ms"]
        wanted = [f"{n} / ours >= {w:g}" for n, w in case["wanted"].items()]
        reached = [f"{case['ratios'][n]:.2f}" for n in case["wanted"] if n in case["ratios"]]
        if "at_dense_rate" in case:
            wanted.append(f"<= {case.get('bound', 1.15):.2f} of touched keys at the dense rate")
            reached.append(f"{case['at_dense_rate']:.2f}")
        # Tactics that were faster than the one which would be taken.
        also = [f"{n} {t:.3f}" for n, t in ms.items() if n.startswith(("triton-", "hopper-")) and t < ms["ours"]]
        ours = f"{ms['ours']:.3f}" + (f" ({'; '.join(also)})" if also else "")
        cells = [f"{ms[p]:.3f}" if p in ms else "" for p in peers]
        lines.append(
            f"| {case['name']} | {ours} | {case['ours_tflops']:.0f} | {case['limit_ms']:.3f} | "
            + " | ".join(cells) + f" | {'; '.join(wanted)} | {'; '.join(reached)}{_mark(case)} |"
        )  # fmt: skip
    return "\n".join(lines)


def _mark(case: dict[str, Any]) -> str:
    if not case["met"]:
        return ""
    return "" if all(case["met"].values()) else " (missed)"


OF_LINEAR = ("fla", "lightning", "einsum")


def linear_table(result: dict[str, Any]) -> str:
    """Markdown of ``tools/bench linear``, and of what ``--tactics`` timed in a row."""
    lines = ["| case | ours | fla | lightning | einsum | wanted | reached |", "|---|---|---|---|---|---|---|"]
    in_a_row = [t for t in result.get("tactics", []) if "ratios" in t]
    for case in [c for c in (*result["cases"], *in_a_row) if "wrong" not in c]:
        ms, wanted = case["ms"], dict(case.get("wanted", {}))
        ours = min(t for name, t in ms.items() if name not in OF_LINEAR)
        peers = " | ".join(f"{ms[n]:.3f}" if n in ms else "" for n in OF_LINEAR)
        reached = "; ".join(f"{n} {x:.2f}" for n, x in case["ratios"].items())
        asked = "; ".join(f"{n} >= {x:g}" for n, x in wanted.items())
        shown = "; ".join(filter(None, (reached, f"{case['share_of_copy']:.2f} of the copy rate")))
        lines.append(f"| {case['name']} | {ours:.3f} | {peers} | {asked} | {shown} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Times over ours, a bar each; the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = result["cases"]
    figure, axes = plt.subplots(figsize=(10, 0.62 * len(cases) + 1.2))
    names = [p for p in ("ours", *PEERS) if any(p in c["ms"] for c in cases)]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [n + i * height for n, c in enumerate(cases) if name in c["ms"]]
        axes.barh(at, [c["ms"][name] / c["ms"]["ours"] for c in cases if name in c["ms"]], height, label=name)
    for n, case in enumerate(cases):
        limit = case["limit_ms"] / case["ms"]["ours"]
        axes.plot([limit, limit], [n - height / 2, n + 0.8 - height / 2], color="black", linewidth=1)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(cases))], [c["name"] for c in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"time over ours (log), black: limit of the GPU; {result['gpu']}")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(out)
