"""What the elements of a mask say, and the key with which equal masks are compared. NumPy alone."""

from __future__ import annotations

import base64
import zlib

import numpy as np

HIDDEN = -9000.0
"""A number below this, added to a score, hides the key in every softmax of 16 bits or more."""


def mask_words(seen: np.ndarray, bias: bool) -> str:
    """``seen`` bool [batch, heads, queries, keys], True where the key is visible.

    The structure is that of the first batch entry and head. ``+padding`` says that other entries hide whole keys
    beside (``+padding+zeroed``: and that hidden tokens see nothing as queries), ``+data`` that they differ otherwise,
    ``+heads`` that other heads do, ``+bias`` that visible keys have numbers added (see also ``counts_words``).
    """
    words = [structure(seen[0, 0])]
    if not bool(np.all(seen == seen[:1])):
        others = [other[0] for other in seen[1:]]
        padding = all(_hides_keys(seen[0, 0], other) for other in others)
        if not padding and all(_hides_tokens(seen[0, 0], other) for other in others):
            return "+".join([*words, "padding", "zeroed"])
        if not padding and words[0].startswith("pattern"):
            return "none+data"  # what one entry sees says nothing about the mask
        words.append("padding" if padding else "data")
    words += [] if bool(np.all(seen == seen[:, :1])) else ["heads"]
    return "+".join([*words, "bias"] if bias else words)


def _hides_keys(first: np.ndarray, other: np.ndarray) -> bool:
    """Whether ``other`` is ``first`` without some keys, rows that see nothing then aside: libraries fill those."""
    hidden = (first & ~other).any(0)
    expected = first & ~hidden
    rows = expected.any(1)
    return bool(np.array_equal(other[rows], expected[rows]))


def _hides_tokens(first: np.ndarray, other: np.ndarray) -> bool:
    """Whether ``other`` is ``first`` without some tokens, as keys and as queries, which see nothing then."""
    if first.shape[0] != first.shape[1]:
        return False
    hidden = (first & ~other).all(0) | ~other.any(0)
    return bool(np.array_equal(other, first & ~hidden & ~hidden[:, None]))


def structure(seen: np.ndarray) -> str:
    """``none``, ``causal``, ``window LEFT RIGHT`` or ``pattern BITS`` of a bool array [queries, keys]."""
    queries, keys = seen.shape
    if bool(seen.all()):
        return "none"
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    if bool(seen.any()):
        left, right = -int(distance[seen].min()), int(distance[seen].max())
        if np.array_equal(seen, (distance >= -left) & (distance <= right)):
            left, right = (-1 if left >= keys - 1 else left), (-1 if right >= queries - 1 else right)
            return "causal" if (left, right) == (-1, 0) else f"window {left} {right}"
    return f"pattern {bits_of(seen)}"


def counts_words(weights: np.ndarray | None) -> str:
    """How often keys count, by their ``weights`` [heads, queries, keys] for equal scores: ``+counts NUMBERS`` (those of
    the first head) where some count more than others, ``+heads`` where heads differ. Nothing where all count once.
    """
    if weights is None:
        return ""
    smallest = np.where(weights > 1e-4, weights, np.inf).min(axis=-1, keepdims=True)
    times = np.rint(weights / smallest)
    if not np.allclose(weights / smallest, times, atol=0.02):
        return "+bias"
    if times.max() <= 1:
        return "" if bool(np.all(times == times[:1])) else "+heads"
    text = base64.urlsafe_b64encode(zlib.compress(times[0].astype(np.uint8).tobytes(), 9)).decode()
    return f"+counts {text}" + ("" if bool(np.all(times == times[:1])) else "+heads")


def counts_from(word: str, queries: int, keys: int) -> np.ndarray:
    """The numbers [queries, keys] of a word ``counts NUMBERS``."""
    data = zlib.decompress(base64.urlsafe_b64decode(word.split(" ")[1]))
    return np.frombuffer(data, np.uint8).reshape(queries, keys)


def bits_of(seen: np.ndarray) -> str:
    """A bool array [queries, keys] as text: its packed bits, compressed."""
    return base64.urlsafe_b64encode(zlib.compress(np.packbits(seen).tobytes(), 9)).decode()


def from_words(words: str, queries: int, keys: int) -> np.ndarray:
    """The bool array [queries, keys] that ``structure`` described."""
    kind, *rest = words.split(" ")
    if kind == "pattern":
        packed = np.frombuffer(zlib.decompress(base64.urlsafe_b64decode(rest[0])), np.uint8)
        return np.unpackbits(packed, count=queries * keys).astype(bool).reshape(queries, keys)
    left, right = {"none": (-1, -1), "causal": (-1, 0)}.get(kind) or (int(rest[0]), int(rest[1]))
    return window(left, right, queries, keys)


def window(left: int, right: int, queries: int, keys: int) -> np.ndarray:
    """Bool [queries, keys]: -left <= j - i - (keys - queries) <= right, where -1 is unlimited."""
    distance = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    return (distance >= -left if left >= 0 else distance == distance) & (
        distance <= right if right >= 0 else distance == distance
    )
