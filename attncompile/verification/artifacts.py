"""The files that let a person repeat the whole-model comparison with `polygraphy run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LOADER = '''"""Inputs of the verification, for `polygraphy run --data-loader-script data_loader.py`."""

from pathlib import Path

from polygraphy.json import load_json


def load_data():
    yield from load_json(str(Path(__file__).resolve().parent / "inputs.json"))
'''

_README = """Inputs and results of the verification, in Polygraphy's formats.

- inputs.json      what was fed; data_loader.py yields the same
- original.json    results of the original model (ONNX Runtime, all optimisations)
- rewritten.json   results of the rewritten model

Repeat the comparison from this folder ({why}):

    polygraphy run ../model.onnx --onnxrt --data-loader-script data_loader.py --load-outputs original.json {compare}
"""


def save_results(
    folder: Path, feeds: Sequence[dict[str, np.ndarray]], results: Any, sides: tuple[str, str], budget: float | None
) -> tuple[Path, ...]:
    """Write inputs, the results of both ``sides`` (runner names in ``results``, original first), a data loader and a
    readme into ``folder``. ``budget`` is a relative L2, or None if something else was judged.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / n for n in ("inputs.json", "original.json", "rewritten.json", "data_loader.py", "README.txt")]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # it logs to stdout, which carries data only
        save_json(list(feeds), str(paths[0]))
        for path, name in zip(paths[1:3], sides, strict=True):
            side = RunResults()
            side.append((name, results[name]))
            side.save(str(path))
    paths[3].write_text(_LOADER, encoding="utf-8")
    compare, why = "--compare snr", "the signal-to-noise ratio in dB must reach 20"
    if budget:
        snr = -20 * math.log10(budget)
        compare = f"--compare snr --snr-threshold {snr:.6g}"
        why = f"a relative L2 of {budget:g} is a signal-to-noise ratio of {snr:.6g} dB"
    paths[4].write_text(_README.format(compare=compare, why=why), encoding="utf-8")
    return tuple(paths)
