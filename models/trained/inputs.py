"""``python -m attncompile.models.trained.inputs lm|vit|dit --count 8 --out calibration.json``: for ``attncompile
--inputs``.

One set goes into an ``.npz``, several into Polygraphy's ``.json``. ``--part calibration`` (the default) and ``--part
held-out`` share no image and no window of text, and neither shares one with what ``evaluate`` scores: of the committed
windows that takes the first four, calibration the next two, held-out the last two. ``--part both`` gives ``--count``
of each in turn: of many inputs ``attncompile`` chooses on every other one and holds the rest out.

Six texts of two windows are not six independent ones. ``lm --data FOLDER --split test`` takes windows of what
``corpus`` wrote there, each of a file of its own, of none that a committed window is of; ``--part calibration`` and
``--part held-out`` share no file. The tokens must be those of the committed tokenizer. ``--mixed`` puts records to look
up into every third of them and a repeated segment into every third: plain text hardly asks for either.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attncompile.core.errors import AttncompileError, BadArguments
from attncompile.models.inputs import Sample, check, save
from attncompile.models.trained import corpus, draw, tasks
from attncompile.models.trained.recipe import DitRecipe, LmRecipe, Recipes, load

SEEDS = {"calibration": 30_011, "held-out": 40_013}
_WINDOWS = {"calibration": slice(4, 6), "held-out": slice(6, 8)}
_BOTH = "both"
_CPU = torch.device("cpu")
DATA = Path(__file__).with_name("data")


@dataclass(frozen=True, slots=True)
class Texts:
    """Where more text for ``lm`` is: a split that ``corpus`` wrote to ``folder``."""

    folder: Path
    split: str = "test"
    mixed: bool = False


def samples(
    name: str, count: int, part: str, recipes: Recipes, dtype: torch.dtype = torch.float16, tokens: int | None = None,
    more: Texts | None = None,
) -> list[Sample]:  # fmt: skip
    """``count`` different input sets of batch 1 for a trained model's file; ``dtype`` of its images, ``tokens`` of the
    decoder's, else its context. For ``lm`` there are six at most, or as many as files in ``more`` are long enough.
    Raises ``BadArguments`` for more.
    """
    if part == _BOTH:
        pair = [samples(name, count, p, recipes, dtype, tokens, more) for p in SEEDS]
        return [one for two in zip(*pair, strict=True) for one in two]
    generator = torch.Generator().manual_seed(SEEDS[part])
    if name == "lm" and more is not None:
        rows = _of_files(more, tokens or recipes.lm.context)[list(SEEDS).index(part) :: len(SEEDS)]
        if count > len(rows):
            raise BadArguments(
                f"--count is {count}: {len(rows)} files of {more.folder / more.split}.xz are long enough for {part}",
                "ask for fewer, fewer --tokens, or another --split",
            )
        chosen = np.linspace(0, len(rows) - 1, count).round().astype(int)
        ground = torch.from_numpy(rows[chosen])
        if more.mixed:
            try:
                few = [_texts(window[None], recipes.lm, generator) for window in ground]
            except ValueError as error:
                raise BadArguments(f"--mixed: {error}", "ask for more --tokens") from None
            ground = torch.stack([texts[number % len(texts)] for number, texts in enumerate(few)])
        made = [{"input_ids": row[None]} for row in ground]
    elif name == "lm":
        windows = torch.from_numpy(corpus.held(DATA))[_WINDOWS[part], : (tokens or recipes.lm.context) + 1]
        made = [{"input_ids": row[None, :-1]} for row in _texts(windows, recipes.lm, generator)]
        if count > len(made):
            raise BadArguments(f"--count is {count}: there are {len(made)} sets for lm", "ask for fewer")
    elif name == "vit":
        images, _ = draw.scene(count, recipes.vit.side, generator, _CPU, full=True)
        made = [{"images": image[None].to(dtype)} for image in images]
    else:
        made = _noised(count, recipes.dit, generator, dtype)
    return [{key: value.contiguous().numpy() for key, value in one.items()} for one in made[:count]]


def _texts(windows: Tensor, recipe: LmRecipe, generator: torch.Generator) -> list[Tensor]:
    """Each window as it is, then with records, then with a repeated segment."""
    segment = min(256, windows.shape[1] // 8)
    return [
        *windows,
        *tasks.needle(windows, recipe.vocab, generator).windows,
        *tasks.copy(windows, recipe.vocab, segment, generator).windows,
    ]


def _of_files(texts: Texts, length: int) -> NDArray[np.int64]:
    """The first ``length`` tokens [file, length] of each file of a split, but for those that a committed window is of.
    Raises ``BadArguments`` where the split cannot be read or is not in the model's tokens.
    """
    hint = "write it with `python -m attncompile.models.trained.corpus`, or leave --data out"
    ours = json.loads((DATA / "corpus.json").read_text())
    try:
        tokenizer = json.loads((texts.folder / "corpus.json").read_text())["tokenizer_sha256"]
        tokens = corpus.read(texts.folder, texts.split)
    except (OSError, ValueError, KeyError, lzma.LZMAError) as error:
        raise BadArguments(f"{texts.folder}: no split {texts.split}: {error}", hint) from None
    if tokenizer != ours["tokenizer_sha256"]:
        raise BadArguments(f"{texts.folder}: the tokens are another tokenizer's, not the trained model's", hint)
    ends = np.flatnonzero(tokens == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    data, itemsize = tokens.tobytes(), tokens.dtype.itemsize
    taken = set()
    for row in corpus.held(DATA).astype(tokens.dtype):
        place = data.find(row.tobytes())
        while place % itemsize and place >= 0:
            place = data.find(row.tobytes(), place + 1)
        if place >= 0:
            taken.add(int(np.searchsorted(ends, place // itemsize)))
    fine = [start for n, (start, end) in enumerate(zip(starts, ends, strict=False))  # none ends: there is no file
            if end - start >= length and n not in taken]  # fmt: skip
    return np.array([tokens[start : start + length] for start in fine], np.int64).reshape(len(fine), length)


def _noised(count: int, recipe: DitRecipe, generator: torch.Generator, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Images at times spread from little noise to almost nothing else, as the sampler meets them."""
    images, labels = draw.family(count, recipe.side, generator, _CPU)
    noise = torch.randn(images.shape, generator=generator)
    times = (torch.arange(count) + 0.5) / count
    at = times[:, None, None, None]
    mixed = (images * (1 - at) + noise * at).to(dtype)
    return [
        {"sample": mixed[i : i + 1], "time": times[i : i + 1], "label": labels[i : i + 1].long()} for i in range(count)
    ]


def _more(arguments: argparse.Namespace) -> Texts | None:
    """What ``--data`` and the options beside it say."""
    if arguments.data is None:
        if arguments.mixed or arguments.split is not None:
            raise BadArguments("--mixed and --split are of texts of --data", "give --data FOLDER, or leave them out")
        return None
    if arguments.model != "lm":
        raise BadArguments(f"--data holds texts, and {arguments.model} takes images", "leave it out")
    return Texts(arguments.data, arguments.split or "test", arguments.mixed)


def main() -> int:
    """The command line; returns the exit code (0 done, 2 could not run)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("lm", "vit", "dit"))
    parser.add_argument("--out", type=Path, required=True, help=".npz for one set, .json for several")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--part", choices=(*SEEDS, _BOTH), default="calibration")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of images: the model's")
    parser.add_argument("--tokens", type=int, help="of the decoder; its context where not given")
    parser.add_argument("--data", type=Path, help="folder of `corpus`: more windows for lm, each of a file of its own")
    parser.add_argument("--split", choices=corpus.SPLITS, help="of --data; test where not given")
    parser.add_argument("--mixed", action="store_true", help="records and repeated segments in two thirds of --data")
    parser.add_argument("--recipe", type=Path)
    arguments = parser.parse_args()
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[arguments.dtype]
    try:
        check(arguments.out, arguments.count * (1 + (arguments.part == _BOTH)))
        more = _more(arguments)
        sets = samples(arguments.model, arguments.count, arguments.part, load(arguments.recipe), dtype,
                       arguments.tokens, more)  # fmt: skip
        save(sets, arguments.out)
    except AttncompileError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
