"""The function body of ``NeighborhoodAttention`` for one configuration, and the node that calls it."""

from __future__ import annotations

from onnx import FunctionProto, NodeProto, helper

from attncompile.core.errors import Unsupported
from attncompile.plugins.body import DOMAIN, Body, attribute_names, overload_of
from attncompile.plugins.neighborhood.cached import cached_body, cuts
from attncompile.plugins.neighborhood.call import Call
from attncompile.plugins.neighborhood.gridded import gridded_body
from attncompile.plugins.neighborhood.op import OP_TYPE, Neighborhood
from attncompile.plugins.neighborhood.rings import ring_body
from attncompile.plugins.neighborhood.sliding import sliding_body


def function(hood: Neighborhood, call: Call) -> FunctionProto:
    """A body in standard ops of ``call.opset``. Raises ``Unsupported`` where there is none."""
    body = Body(call.opset)
    if call.bias and (hood.prefix or hood.suffix):
        raise Unsupported("bias", "the rows of prefix and suffix tokens take no bias")
    optional = {"key_mask": call.key_mask, "bias": call.bias, "sinks": call.sinks, "window_bias": call.window_bias}
    given = {name: name * there for name, there in optional.items()}
    if hood.circular:
        output = ring_body(body, hood, call, "query", "key", "value", given["window_bias"])
    elif slides(hood, call.bias):
        made = cached_body if cuts(hood, call) else sliding_body
        output = made(body, hood, call, "query", "key", "value", given["key_mask"], given["sinks"])
    else:
        output = gridded_body(body, hood, call, "query", "key", "value", given["key_mask"], given["bias"])
    last = max((at for at, there in enumerate(optional.values(), 1) if there), default=0)
    names = ["query", "key", "value", *list(optional)[:last]]
    template = node(hood, call, ("", "", ""), "", "")
    doc = f"{OP_TYPE} in standard ops, for {call.dtype} and {call.heads}/{call.kv_heads} heads"
    return body.function(OP_TYPE, overload(hood, call), names, output, attribute_names(template), doc)


def slides(hood: Neighborhood, bias: bool) -> bool:
    """Whether the body for any length does it: a bias is cut into tiles by a table, which needs a fixed length."""
    return hood.sliding and not bias


def overload(hood: Neighborhood, call: Call) -> str:
    return overload_of({**hood.attributes(), **call.configuration()})


def node(hood: Neighborhood, call: Call, inputs: tuple[str, ...], output: str, name: str) -> NodeProto:
    """The op itself; its attributes say all that a kernel needs."""
    layouts = dict(zip(("q_layout", "k_layout", "v_layout", "o_layout"), call.layouts, strict=True))
    made = helper.make_node(
        OP_TYPE, list(inputs), [output], name=name, domain=DOMAIN, scale=call.scale, **hood.attributes(), **layouts
    )
    made.overload = overload(hood, call)
    return made
