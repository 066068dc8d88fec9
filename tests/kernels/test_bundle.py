"""A bundle is the same bytes for the same kernels, and nothing that was changed is read as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from attncompile.core.errors import BadArguments
from attncompile.core.kernel import OpCall
from attncompile.core.verdict import Verdict
from attncompile.kernels import bundle
from attncompile.kernels.bundle import BadBundle, Bundle
from attncompile.kernels.entry import Compiled, Entry
from attncompile.kernels.records import Built, CallKernels, NodeCall, Refusal
from attncompile.kernels.schema import problem, schema
from attncompile.kernels.symbols import values
from tests.kernels.conftest import made_up

CALL = OpCall("Attention", "float16", 1, 1, 64, 64, attributes={"left": -1, "right": 0}, inputs={"key_mask": "bool"})


def built() -> Built:
    kernels = [made_up(80, "large", 90000), made_up(80), made_up(90, "large", 90000), made_up(90)]
    ids = [k.id for k in kernels]
    refused = (Refusal(86, "large", "shared", "needs more shared memory than there is"),)
    call = CallKernels(CALL, {80: (ids[0], ids[1]), 90: (ids[2], ids[3])}, refused)
    nodes = (
        (NodeCall("attn", "", "Attention", Verdict.yes(), CALL, {"B": "query[0]", "right": "0"}), call.key),
        (NodeCall("sparse", "If_1/then_branch", "BlockSparseAttention", Verdict.no("no-kernel", "none", "wait")), ""),
    )
    return Built({k.id: k for k in kernels}, (call,), nodes)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    out = tmp_path / "bundle"
    bundle.write(out, built(), "3.9.0")
    return out


def test_round_trip(made: Path) -> None:
    opened = Bundle.open(made)
    assert {i: opened.load(i) for i in opened.entries} == dict(built().compiled)
    index = json.loads((made / "bundle.json").read_text())
    jsonschema.validate(index, schema())
    assert index == opened.index and index["calls"][0]["refused"][0]["code"] == "shared"
    assert Entry.of_json(index["entries"][0]).to_json().items() <= index["entries"][0].items()


def test_same_kernels_same_bytes(made: Path, tmp_path: Path) -> None:
    shuffled = built()
    shuffled = replace(shuffled, compiled=dict(reversed(shuffled.compiled.items())))
    bundle.write(tmp_path / "again", shuffled, "3.9.0")
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((made / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    assert len(files) == 1 + 4 + 1, "PTX that is the same is one file"


def test_kernels_of_a_device(made: Path) -> None:
    opened = Bundle.open(made)
    key = opened.call_of("attn")
    assert values(opened.symbols_of("attn"), {"query": (3, 7, 8, 64)}) == {"B": 3, "right": 0}

    def chosen(capability: int) -> list[tuple[int, str]]:
        return [(c.entry.architecture, c.entry.tactic) for c in opened.kernels(key, capability)]

    assert chosen(90) == [(90, "large"), (90, "small")]
    assert chosen(80) == chosen(86) == [(80, "large"), (80, "small")]
    assert chosen(120) == [(80, "large"), (80, "small")], "by PTX: code for sm_90a runs nowhere else"
    assert chosen(75) == []
    with pytest.raises(BadBundle, match="node 'sparse' has no kernel: none"):
        opened.call_of("sparse", "If_1/then_branch")
    with pytest.raises(BadBundle, match="knows no node 'other'"):
        opened.call_of("other")
    with pytest.raises(BadBundle, match="has no call 0000"):
        opened.kernels("0000", 90)
    with pytest.raises(BadBundle, match="has no entry 0000"):
        opened.load("0000")


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "bundle.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return apply


def _cubin(change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: change(sorted((folder / "kernels").glob("*.cubin"))[0]) and None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "bundle.json").unlink(), "is no bundle: it has no bundle.json"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "bundle.json: it cannot be read"),
        (lambda folder: (folder / "bundle.json").write_bytes(b"\xff\xfe"), "bundle.json: it cannot be read"),
        (lambda folder: (folder / "bundle.json").write_text("[]"), "bundle.json: bundle is no object"),
        (_cubin(lambda p: p.write_bytes(p.read_bytes()[:-1])), ".cubin: its contents are not those of the index"),
        (_cubin(lambda p: p.write_bytes(b"x" * len(p.read_bytes()))), ".cubin: its contents are not those"),
        (_cubin(lambda p: p.unlink()), ".cubin: No such file"),
        (_index(lambda i: i.update(format=2)), "its format is 2, this version reads 1"),
        (_index(lambda i: i.update(format=True)), "its format is True|format is no integer"),
        (_index(lambda i: i.pop("format")), "its format is None"),
        (_index(lambda i: i.pop("nodes")), "bundle has no nodes"),
        (_index(lambda i: i.update(more=1)), "bundle has an unknown 'more'"),
        (_index(lambda i: i["entries"][1].pop("warps")), r"entries\[1\] has no warps"),
        (_index(lambda i: i["entries"][0].update(warps=0)), r"entries\[0\].warps is 0, below 1"),
        (_index(lambda i: i["entries"][0].update(shared="1")), r"entries\[0\].shared is no integer"),
        (_index(lambda i: i["entries"][0]["files"].update(ptx="../../etc")), r"files.ptx is '../../etc', which does"),
        (_index(lambda i: i["entries"][0]["arguments"][1].update(kind="float")), r"arguments\[1\].kind is 'float'"),
        (_index(lambda i: i["entries"][0].update(registers=7)), "entry [0-9a-f]{16} was changed"),
        (_index(lambda i: i["calls"][0]["kernels"][0].update(entry="0" * 16)), "names an entry 0{16} that is not"),
        (_index(lambda i: i["nodes"][0].update(call="0" * 16)), "node 'attn' names a call 0{16} that is not there"),
    ],
)  # fmt: skip
def test_damage_is_found_and_named(made: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(made)
    with pytest.raises(BadBundle, match=said) as caught:
        Bundle.open(made)
    assert str(made) in caught.value.message and caught.value.hint


def test_our_reading_of_the_schema_is_jsonschemas(made: Path) -> None:
    """On the sound index and on each one with a value taken out or replaced."""
    index = json.loads((made / "bundle.json").read_text())
    checker = jsonschema.Draft202012Validator(schema())

    def places(value: Any) -> list[tuple[Any, Any]]:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        return [(value, key) for key, _ in items] + [
            place for _, inner in items if isinstance(inner, dict | list) for place in places(inner)
        ]

    assert checker.is_valid(index) and not problem(index)
    count = 0
    for holder, key in places(index):
        before = holder[key]
        for other in (None, True, -1, "", "x" * 16, [], {}, 1.5):
            holder[key] = other
            assert checker.is_valid(index) == (not problem(index)), (key, other, problem(index))
            count += 1
        holder[key] = before
    assert count > 1000


def test_a_folder_that_is_not_ours_stays(tmp_path: Path, made: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(BadArguments, match="was not written by attncompile"):
        bundle.write(tmp_path / "mine", built(), "3.9.0")
    bundle.write(made, Built({}, ()), "3.9.0")
    assert not Bundle.open(made).entries, "a bundle is replaced whole"


def test_an_id_names_code_and_facts() -> None:
    one = made_up()
    others = [replace(one, cubin=b"x"), replace(one, ptx="x"), replace(one, entry=replace(one.entry, warps=8))]
    assert isinstance(one, Compiled) and len({one.id, *(o.id for o in others)}) == 4
