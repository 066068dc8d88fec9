"""Inputs that a recipe's model is meant for: sentences, structured images, noised latents, text tokens.

They are what ``attncompile --inputs`` wants: evidence for an approximation has to come from data with structure.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attncompile.core.errors import BadArguments
from attncompile.models.export import build, quiet, resolve
from attncompile.models.images import structured_images
from attncompile.models.recipe import Options, Recipe
from attncompile.models.registry import recipe
from attncompile.models.sentences import SENTENCES

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sample = dict[str, "NDArray[Any]"]


def samples(name: str, count: int = 1, **options: Any) -> list[Sample]:
    """``count`` different input sets for the model that ``export(name, ..., **options)`` writes.

    Names, dtypes and shapes are those of the exported graph's inputs. Raises ``BadArguments`` as ``export`` does.
    """
    if count < 1:
        raise BadArguments(f"--count is {count}", "ask for at least one input set")
    chosen = resolve(name, Options(**options))
    with quiet():
        shapes = {key: value.numpy() for key, value in build(name, _one_layer(name, chosen)).inputs.items()}
        return [_sample(recipe(name), chosen, shapes, index) for index in range(count)]


def write(name: str, out: str | Path, count: int = 1, **options: Any) -> Path:
    """Writes input sets to a file that ``attncompile --inputs`` and ``polygraphy run --load-inputs`` take: one set as
    ``.npz`` keyed by input name, any number as Polygraphy's ``.json``.
    """
    out = Path(out)
    check(out, count)
    return save(samples(name, count, **options), out)


def check(out: Path, count: int) -> None:
    """Raises ``BadArguments`` where ``count`` input sets cannot be written to ``out``."""
    if count < 1:
        raise BadArguments(f"--count is {count}", "ask for at least one input set")
    if out.suffix not in (".npz", ".json"):
        raise BadArguments(f"{out} ends in neither .npz nor .json", "give a file name such as inputs.json")
    if out.suffix == ".npz" and count != 1:
        raise BadArguments(f"an .npz holds one input set, not {count}", "give a name that ends in .json")
    if not out.parent.is_dir():
        raise BadArguments(f"{out.parent} is not a folder", "create it first, or choose another name")


def save(sets: list[Sample], out: Path) -> Path:
    """Writes input sets that ``check`` has let pass."""
    if out.suffix == ".npz":
        np.savez(out, **sets[0])  # type: ignore[arg-type]
    else:
        from polygraphy.json import save_json

        save_json(sets, str(out), description=None)
    return out


def _one_layer(name: str, options: Options) -> Options:
    # Only the inputs are wanted, so that a large model is not built for their shapes.
    return replace(options, layers=1) if "layers" in recipe(name).uses else options


def _sample(found: Recipe, options: Options, example: Sample, index: int) -> Sample:
    """A copy of ``example`` whose contents are the ``index``-th real ones; masks and position ids stay as they are."""
    seed = options.seed + 1000 + index
    if found.kind == "text":
        from attncompile.models.minilm import tokenize

        batch, tokens = example["input_ids"].shape
        chosen = [SENTENCES[(index * batch + row) % len(SENTENCES)] for row in range(batch)]
        return dict(tokenize(chosen, tokens))
    sample = dict(example)
    for name, value in example.items():
        if name == "pixel_values" or name == "latent":
            sample[name] = _pixels(value, seed, noise=0.5 if name == "latent" else 0.0)
        elif name == "image":
            batch, tokens, channels = value.shape
            side = round(tokens**0.5)
            latent = _pixels(np.empty((batch, channels, side, side), value.dtype), seed, noise=0.5)
            sample[name] = np.ascontiguousarray(latent.reshape(batch, channels, tokens).transpose(0, 2, 1))
        elif name == "input_ids":
            sample[name] = _text_bytes(value.shape, index) % (int(example["input_ids"].max()) + 1)
        elif name == "inputs_embeds":
            sample[name] = _embedded(value, seed, index)
        elif name == "attention_mask":
            sample[name] = np.ones_like(value)
    return sample


def _pixels(like: NDArray[Any], seed: int, noise: float) -> NDArray[Any]:
    """Structured images in the shape and dtype of ``like``; ``noise`` is the share of it in the variance."""
    batch, channels, side, _ = like.shape
    clean = structured_images(batch, channels, side, seed)
    white = np.random.default_rng(seed).normal(size=clean.shape)
    mixed: NDArray[Any] = np.sqrt(1 - noise) * clean + np.sqrt(noise) * white
    return mixed.astype(like.dtype)


def _text_bytes(shape: tuple[int, ...], index: int) -> NDArray[np.int64]:
    """The bytes of the project's sentences, repeated and shifted, as int64 of ``shape`` [batch, sequence]."""
    text = np.frombuffer(" ".join(SENTENCES).encode(), dtype=np.uint8)
    batch, tokens = shape
    rows = [np.resize(np.roll(text, -97 * (index * batch + row)), tokens) for row in range(batch)]
    return np.stack(rows).astype(np.int64)


def _embedded(like: NDArray[Any], seed: int, index: int) -> NDArray[Any]:
    """Text bytes looked up in a seeded embedding table: tokens recur, as they do in language."""
    batch, tokens, hidden = like.shape
    table = np.random.default_rng(seed - index).normal(size=(256, hidden)).astype(np.float32)
    embedded: NDArray[Any] = table[_text_bytes((batch, tokens), index)]
    return embedded.astype(like.dtype)
