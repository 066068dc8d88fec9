"""The zoo: a tenth of its entries, another one every day, and the counting and comparing that it rests on."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from attncompile.core.site import Detection
from attncompile.models.export import export_built, quiet
from attncompile.models.recipe import Built, Options
from attncompile.models.zoo.__main__ import main
from attncompile.models.zoo.check import attempt, compare, make
from attncompile.models.zoo.entry import Call, Entry
from attncompile.models.zoo.table import ENTRIES
from attncompile.models.zoo.truth import calls_of
from attncompile.passes.detect import detect
from attncompile.passes.load import load
from attncompile.passes.symbols import profile_for

TODAY = [
    i for i in range(len(ENTRIES)) if i % 10 == datetime.datetime.now(datetime.UTC).timetuple().tm_yday % 10
]  # fmt: skip


@pytest.mark.parametrize("position", TODAY, ids=[ENTRIES[i].title for i in TODAY])
def test_todays_tenth(position: int) -> None:
    outcome = attempt(position)
    assert not isinstance(outcome, str), outcome
    assert (outcome.missed, outcome.false, outcome.wrong) == ((), (), ()), outcome.near_misses
    assert outcome.found + outcome.refused == len(outcome.true)
    assert (len(outcome.true) == 0) == (outcome.entry.family == "negative" or outcome.entry.name == "convnext")


def test_the_table() -> None:
    titles = [e.title for e in ENTRIES]
    assert len(set(titles)) == len(titles) >= 60
    assert {e.exporter for e in ENTRIES} == {"dynamo", "torchscript"}
    assert {e.dtype for e in ENTRIES} == {"fp32", "fp16"}
    assert {e.attention for e in ENTRIES} == {"sdpa", "eager"}
    assert {bool(e.dynamic) for e in ENTRIES} == {True, False}


class _Calls(nn.Module):
    """Calls torch's attention with each kind of mask."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attend = nn.functional.scaled_dot_product_attention
        n = x.shape[-2]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        padding = torch.ones(2, 1, 1, n, dtype=torch.bool)
        padding[1, ..., -2:] = False
        bias = torch.zeros(n, n).masked_fill(j > i, float("-inf"))
        results = [
            attend(x, x, x),
            attend(x, x, x, is_causal=True),
            attend(x, x, x, bias),
            attend(x, x, x, attn_mask=(j <= i) & (j > i - 4)),
            attend(x, x[:, :2], x[:, :2], padding, enable_gqa=True),
            attend(x[:, :, -1:], x, x, is_causal=False),
        ]
        return sum(r.sum() for r in results)  # type: ignore[return-value]


def test_counting_knows_the_masks() -> None:
    calls = calls_of(Built(_Calls(), {"x": torch.randn(2, 4, 9, 8)}, ("y",), {}))
    assert [(c.mask, c.heads, c.head_dim, c.query_length, c.key_length) for c in calls] == [
        ("none", 4, 8, 9, 9), ("causal", 4, 8, 9, 9), ("causal", 4, 8, 9, 9), ("window 3 0", 4, 8, 9, 9),
        ("none+data", 4, 8, 9, 9), ("none", 4, 8, 1, 9),
    ]  # fmt: skip
    assert nn.functional.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"  # restored


def test_counting_sees_the_library_functions() -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, x, x)[0] + self.layer(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 7, 16, requires_grad=True)
    with torch.enable_grad():
        calls = calls_of(Built(Both(), {"x": x}, ("y",), {}))
    assert [(c.heads, c.head_dim, c.query_length, c.how) for c in calls] == [(4, 4, 7, "nn.MultiheadAttention")] * 2


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Entry, list[Call], Detection]:
    entry = next(e for e in ENTRIES if e.title == "grouped-repeat_interleave/torchscript/17/sdpa")
    path: Path = tmp_path_factory.mktemp("zoo") / "model.onnx"
    with quiet():
        built = make(entry)
        calls = calls_of(built)
        export_built(built, Options(exporter=entry.exporter, opset=entry.opset), path)
    model = load(path)
    return entry, calls, detect(model, profile_for(model, {}))


def test_comparing_fails_on_every_difference(compared: tuple[Entry, list[Call], Detection]) -> None:
    """A comparison that cannot fail proves nothing."""
    entry, calls, found = compared
    assert compare(entry, calls, found, 0, 0.0).passed
    (call,), (site,) = calls, found.sites
    assert compare(entry, [call, call], found, 0, 0.0).missed
    assert compare(entry, [], found, 0, 0.0).false
    assert compare(entry, calls, replace(found, sites=(site, site)), 0, 0.0).false
    assert compare(entry, calls, replace(found, sites=()), 0, 0.0).missed
    for change in ({"heads": 2}, {"head_dim": 16}, {"query_length": 3}, {"key_length": 3}):
        outcome = compare(entry, calls, replace(found, sites=(replace(site, **change),)), 0, 0.0)
        assert outcome.missed and outcome.false
    for mask in ("none", "window 3 0", "data", "causal+data"):
        assert compare(entry, [replace(call, mask=mask)], found, 0, 0.0).wrong
    assert compare(replace(entry, refused={"sinks": 1}), calls, found, 0, 0.0).missed


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--match", "no-codebook/torchscript"]) == 0
    assert "1 entries, 0 true sites, 0 found" in capsys.readouterr().out
    assert main(["--list", "--only", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ENTRIES[3::10]) and all(line.split()[0].endswith("3") for line in lines)
