"""What a launch of each op has to do, for the cost model."""

from __future__ import annotations

from collections.abc import Callable

from attncompile.core.errors import Unsupported
from attncompile.core.kernel import OpCall, Program, Work
from attncompile.plugins.linear_attention.op import APPLY, COMBINE, DELTA, OUTPUT, SOLVE, STATE, STATES, STEP

MULTIPROCESSORS = 132
"""Of the GPU whose launches the cost model knows: some grids are made after their number."""
CHANNEL = 3
"""The kernels' constant ``DECAY`` of gates for every channel."""


def work(call: OpCall, program: Program) -> Work:
    """``scores`` are elements that are mapped, summed or weighed beside the products. Raises ``Unsupported`` for a call
    that does not say batch and lengths.
    """
    if call.batch is None or (call.query_length is None and call.key_length is None and call.op != COMBINE):
        raise Unsupported("sizes", "the cost of a launch needs batch and lengths")
    return _OF[call.op](_Sizes(call, program))


class _Sizes:
    """Of one call: tokens, heads of all batch entries, padded features, how the program cuts them."""

    def __init__(self, call: OpCall, program: Program) -> None:
        self.call, self.constants = call, program.constants
        batch = call.batch or 1
        self.batch, self.keys, self.queries = batch, call.key_length or 0, call.query_length or 0
        self.heads, self.groups = batch * call.heads, batch * call.kv_heads
        self.features = int(self.constants.get("K1") or 0)
        self.state = call.head_dim * call.value_dim
        self.learned = int(self.constants.get("W1") or 0)
        if self.learned:  # the projection, and twice as many features as it gives
            self.state = 2 * call.attributes["width"] * call.value_dim
            self.features = 2 * self.learned + self.learned * call.head_dim // call.value_dim
        self.both = call.head_dim + call.value_dim
        self.values = _up(call.value_dim, self.constant("BV"))
        self.chunk = call.attributes.get("chunk", 0) or self.keys or self.queries or 1
        self.chunks = _up(self.keys or self.queries, self.chunk)
        self.gates = call.head_dim if call.attributes.get("decay") == CHANNEL else 0
        maps = [self.constants.get(name) for name in ("MAP", "Q_MAP", "K_MAP", "NORM")]
        self.mapped = bool(self.learned or any(maps) or "total" in call.outputs)

    def constant(self, name: str, otherwise: int = 1) -> int:
        return int(self.constants.get(name) or otherwise)

    def read(self, keys: bool = True) -> float:
        """Bytes of keys and values, or of queries and the output."""
        rows = self.groups * self.keys if keys else self.heads * self.queries
        return 2.0 * rows * self.both


def _up(size: int, part: int) -> int:
    return -(-size // part)


def _state(s: _Sizes) -> Work:
    side = s.constant("HB")
    blocks = s.batch * _up(s.call.kv_heads, side) * s.values * s.chunks
    elements = s.groups * s.keys * (2 * s.learned or s.features) * s.values * s.mapped
    return Work(
        2.0 * s.groups * s.keys * s.features * s.call.value_dim * side, float(elements), 0.0,
        s.read() + 4.0 * s.groups * s.chunks * s.state, blocks, steps=_up(s.chunk, s.constant("BN")),
    )  # fmt: skip


def _states(s: _Sizes) -> Work:
    blocks = s.groups * s.values * _up(s.call.head_dim, s.constant("BK", s.features))
    decayed = s.groups * s.keys * s.features * s.values * bool(s.call.attributes.get("decay"))
    size = s.read() + 4.0 * s.groups * (s.chunks * s.state + s.keys * s.gates)
    flops = 2.0 * s.groups * s.keys * s.features * s.call.value_dim
    return Work(flops, float(decayed), 0.0, size, blocks, steps=_up(s.keys, s.constant("BT", s.chunk)))


def _combine(s: _Sizes) -> Work:
    pieces = s.call.shapes.get("state", ())
    count = pieces[2] if len(pieces) > 2 and pieces[2] is not None else 1
    blocks = s.groups * s.values * _up(s.call.head_dim, s.constant("BK"))
    size = 4.0 * s.groups * s.state * (count + 1)
    return Work(0.0, 0.0, 0.0, size, blocks, steps=_up(count, s.constant("AHEAD")))


def _apply(s: _Sizes) -> Work:
    tiles = _up(s.queries, s.constant("BM"))
    places = min(tiles, max(MULTIPROCESSORS * s.constant("BLOCKS") // s.heads, 1))
    elements = s.heads * s.queries * (2 * s.learned or s.features) * s.values * s.mapped
    flops = 2.0 * s.heads * s.queries * s.features * s.call.value_dim
    size = s.read(keys=False) + 4.0 * s.heads * s.state
    return Work(flops, float(elements), 0.0, size, s.heads * s.values * places, steps=_up(tiles, places))


def _output(s: _Sizes) -> Work:
    rows = s.constant("BT", s.chunk)
    scores = float(s.heads * s.queries * rows)
    flops = 2.0 * s.heads * s.queries * s.features * s.call.value_dim * (2 if s.chunk > rows else 1)
    flops += 2.0 * scores * (s.features + s.call.value_dim)
    size = s.read(keys=False) + s.read() + 4.0 * s.groups * (s.chunks * s.state + s.keys * s.gates)
    steps = _up(s.features, s.constant("BK")) if s.gates else _up(min(s.chunk, s.queries), rows)
    return Work(flops, scores * s.values, 0.0, size, s.heads * s.values * s.chunks, steps=steps)


def _solve(s: _Sizes) -> Work:
    tile = int(s.call.attributes["tile"])
    tiles = s.groups * _up(s.keys, tile)
    size = 2.0 * s.groups * s.keys * s.call.head_dim + 4.0 * tiles * tile * tile
    return Work(2.0 * tiles * tile * tile * (s.call.head_dim + 4 * tile), 0.0, 0.0, size, tiles)


def _delta(s: _Sizes) -> Work:
    tile = int(s.call.attributes["tile"])
    size = s.read() + 2.0 * s.groups * s.keys * s.call.value_dim
    size += 4.0 * s.groups * (s.chunks * s.state + s.keys * tile)
    flops = 2.0 * s.groups * s.keys * s.call.value_dim * (2 * s.features + tile)
    return Work(flops, 0.0, 0.0, size, s.groups * s.values, steps=_up(s.keys, tile))


def _step(s: _Sizes) -> Work:
    flops = 2.0 * (s.heads * s.queries + s.groups * s.keys) * s.features * s.call.value_dim
    size = s.read(keys=False) + s.read() + 8.0 * s.groups * s.state
    return Work(flops, 0.0, 0.0, size, s.groups * s.values, steps=s.keys)


_OF: dict[str, Callable[[_Sizes], Work]] = {
    STATE: _state, COMBINE: _combine, APPLY: _apply, STATES: _states, OUTPUT: _output, SOLVE: _solve, DELTA: _delta,
    STEP: _step,
}  # fmt: skip
