"""What blocks cost where AnchorAttention gathers keys: `python tools/stripes.py MODEL --inputs FILE` prints a table.

Of every head of every causal or full site, on the first input and with the anchor of `anchor THETA`: the share of all
scores that is computed and the share of the attention weight that is held, once with every key within theta of the
anchor alone (stripes of one row of blocks), once with the whole blocks of these keys. What is always kept is in both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from attncompile import measure, pipeline
from attncompile.core.block_pattern import BlockGeometry
from attncompile.core.block_selection import BlockSelection, kept, weights
from attncompile.core.verdict import Verdict
from attncompile.plugins import mechanism
from attncompile.search import heads
from attncompile.search.candidates import THETAS
from attncompile.search.maps import Operands
from attncompile.search.slim import SlimModel
from attncompile.shaped import binding_of


def within(entry: Operands, geometry: BlockGeometry, head: int, theta: float, every: int) -> np.ndarray:
    """Of one in ``every`` rows of blocks: scores of keys, of blocks, and all; weights of keys, of blocks; queries."""
    edge, tokens = geometry.edge, geometry.tokens
    query, key = entry.query[head], entry.key[head // (entry.heads // len(entry.key))]
    which = range(0, geometry.count, every)
    family = BlockSelection(f"anchor {theta:g}").family
    scores = weights(query, key, entry.scale, geometry, family, which)
    blocks = kept(scores, theta, "anchor", geometry.causal)
    always = kept(scores, 0.0, "share", geometry.causal)
    sums = np.zeros(6)
    for r in which:
        rows = np.arange(r * edge, min((r + 1) * edge, tokens))
        end = rows[-1] + 1 if geometry.causal else tokens
        stands = (np.arange(end) // edge).astype(int)
        anchor = scores[r][always[r]].max()
        near = key[:end] @ (query[rows].mean(axis=0) * np.float32(entry.scale)) >= anchor - np.float32(theta)
        of_keys, of_blocks = always[r][stands] | near, blocks[r][stands]
        logits = query[rows] @ key[:end].T * np.float32(entry.scale)
        seen = (np.arange(end) <= rows[:, None]) | (not geometry.causal)
        logits = np.where(seen, logits, -np.inf)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        sums += [(seen & of_keys).sum(), (seen & of_blocks).sum(), seen.sum(),
                 p[:, of_keys].sum(), p[:, of_blocks].sum(), len(rows)]  # fmt: skip
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--every", type=int, default=4, help="rows of blocks, of which one is looked at")
    given = parser.parse_args()
    found = pipeline.inspect(given.model, pipeline.Options(inputs=given.inputs))
    feed = found.feeds[0]
    world = pipeline.Worlds(found.index)(binding_of(found, feed))
    subject, specs = mechanism("BlockSparseAttention"), []
    for site in found.detection.sites:
        geometry = heads.choice_geometry(subject, site, world.binding)
        if not isinstance(geometry, Verdict):
            specs.append(heads.spec(site, geometry, world))
    sums = np.zeros((len(THETAS), 6))
    with tempfile.TemporaryDirectory() as folder:
        slim = SlimModel(found.index.model, Path(folder))
        names = sorted({n for s in specs for n in s.read})
        session = measure.open_session(slim.with_outputs(names, "captured.onnx"), measure.default_threads())
        values = {**feed, **dict(zip(names, measure.run_session(session, feed, names), strict=True))}
    for spec in specs:
        for entry in spec.operands(values):
            geometry = entry.geometry(spec.geometry)
            for n, theta in enumerate(THETAS):
                sums[n] += np.sum([within(entry, geometry, h, theta, given.every) for h in range(entry.heads)], axis=0)
    table = Table("theta", "scores of keys", "of blocks", "ratio", "weight of keys", "of blocks", box=SIMPLE)
    for theta, (keys, blocks, every, held, more, queries) in zip(THETAS, sums, strict=True):
        table.add_row(f"{theta:g}", f"{keys / every:.1%}", f"{blocks / every:.1%}", f"{blocks / keys:.2f}",
                      f"{held / queries:.2%}", f"{more / queries:.2%}")  # fmt: skip
    edges = sorted({s.geometry.edge for s in specs})
    Console().print(f"{given.model.name}: {len(specs)} sites, blocks of {', '.join(map(str, edges))}", table)


if __name__ == "__main__":
    main()
