"""What models of ``attncompile`` make of whole samplings: images from the same noise, blocks and times over all steps.

    python tools/sampling_compare.py dit.onnx OUT [OUT ...] [--count 4] [--json FILE] [--plain MODEL]

MODEL is the trained DiT (``python -m attncompile.models.trained.export dit``), each OUT a folder that ``attncompile``
wrote from it by a search on its inputs, with or without ``--keep-dense``. Images come from the recipe's sampler, one
for each of the first ``--count`` classes, and are set against those of MODEL from the same noise. What a search says of
a step is no word on images: errors of steps add up.

Times are CPU seconds of a call in ONNX Runtime with one thread, the median of --rounds that go through all files in
turn: on a machine that others use too they say more than a clock does. They are taken at the first step that stays
dense and at the first that does not; ``--plain`` is timed beside the first OUT: the same approximations without a rule.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncompile import measure
from attncompile.core.keep_dense import KeepDense
from attncompile.models.trained import scores
from attncompile.models.trained.evaluate import Session
from attncompile.models.trained.recipe import DitRecipe, load

SEED = 7
WARM_UP = 2


def times_of(recipe: DitRecipe) -> list[float]:
    """Times of the sampler's steps, as the model is told them, from noise to image."""
    asked: list[float] = []

    def noted(x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        asked.append(float(time[0]))
        return torch.zeros_like(x)

    scores.sample(recipe, noted, torch.arange(1), SEED)
    return asked


def share_kept(rule: KeepDense | None, times: list[float]) -> float:
    """Of the steps, those that stay dense."""
    if rule is None:
        return 0.0
    return float(np.mean([rule.holds({rule.input: np.array([t], np.float32)}) for t in times]))


def row_of(out: Path, times: list[float]) -> dict[str, Any]:
    """What the search of ``out`` says, for one step and over a sampling."""
    told = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = told["search"]
    if found is None or not found["points"]:
        raise SystemExit(f"{out}: nothing was approximated by a search")
    if found["density"] is None:
        raise SystemExit(f"{out}: a site was undone later, so what the search measured is not of this model: build it "
                         "again on an idle machine, or with --keep-slower")  # fmt: skip
    (point,) = [p for p in found["points"] if p["chosen"]]
    rule = KeepDense.parse(found["keep_dense"]) if found.get("keep_dense") else None  # older reports say nothing
    kept, aside = share_kept(rule, times), found.get("set_aside", 0)
    return {
        "keep_dense": rule.text if rule else "", "metric": found["metric"], "max_error": told["options"]["max_error"],
        "inputs": found["calibration"] + len(found["held"]) + aside, "set_aside": aside,
        "bound": point["bound"], "held": found["held"], "density": found["density"],
        "predicted_gain": 1 / point["time"], "kept": kept, "density_of_steps": kept + (1 - kept) * found["density"],
        "predicted_gain_of_steps": 1 / (kept + (1 - kept) * point["time"]),
    }  # fmt: skip


def cpu_seconds(models: Mapping[str, Path], feed: Mapping[str, np.ndarray], rounds: int) -> dict[str, float]:
    """Of a call of each model, the median."""
    sessions = {name: measure.open_session(path, 1) for name, path in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(WARM_UP + rounds):
        for name, session in sessions.items():
            start = time.process_time()
            measure.run_session(session, feed)
            if number >= WARM_UP:
                taken[name].append(time.process_time() - start)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plain", type=Path, help="of the first OUT: its model.onnx made without the rule")
    parser.add_argument("--json", type=Path, help="rewritten after every row")
    given = parser.parse_args()
    recipe = load(None).dit
    asked = times_of(recipe)
    labels = torch.arange(min(given.count, recipe.classes))

    def images(path: Path) -> Tensor:
        run: Callable[..., Tensor] = Session(path, "cpu").one_by_one
        return scores.sample(recipe, run, labels, SEED)

    reference = images(given.model)
    rows: list[dict[str, Any]] = []
    for number, out in enumerate(given.out):
        row = row_of(out, asked)
        row["psnr"] = [round(value, 2) for value in scores.psnr(images(out / "model.onnx"), reference)]
        rule = KeepDense.parse(row["keep_dense"]) if row["keep_dense"] else None
        noise = torch.randn(1, 3, recipe.side, recipe.side, generator=torch.Generator().manual_seed(SEED)).numpy()
        for side in (True, False):
            at = next((t for t in asked if share_kept(rule, [t]) == side), None)
            if at is None:
                continue
            feed = {"sample": noise, "time": np.array([at], np.float32), "label": np.array([0], np.int64)}
            models = {"file": given.model, "ours": out / "model.onnx"}
            if given.plain and not number:
                models["plain"] = given.plain
            row["dense" if side else "approximated"] = cpu_seconds(models, feed, given.rounds)
        shares = {"dense": row["kept"], "approximated": 1 - row["kept"]}
        before, after = (sum(share * row[side][file] for side, share in shares.items() if share)
                         for file in ("file", "ours"))  # fmt: skip
        row["gain_of_steps"] = before / after
        rows.append(row)
        said = " ".join(f"{value:.1f}" for value in row["psnr"])
        print(f"{row['keep_dense'] or 'no rule'}, {row['max_error']:g}: {row['density_of_steps']:.1%} of the blocks, "
              f"{said} dB, a sampling {row['gain_of_steps']:.2f} times as fast")  # fmt: skip
        if given.json:
            command = " ".join(["python tools/sampling_compare.py", *sys.argv[1:]])
            told = {"command": command, "steps": len(asked), "images": len(labels), "rows": rows}
            given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
