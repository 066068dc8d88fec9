"""The committed trained models: they are the recorded files, and on a short input they score what they scored."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import lzma
import platform
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from attncompile.models.trained import corpus, inputs, scores  # noqa: E402
from attncompile.models.trained.evaluate import Session, Torch  # noqa: E402
from attncompile.models.trained.export import built, committed  # noqa: E402
from attncompile.models.trained.recipe import load  # noqa: E402
from attncompile.verification.inputs import load_inputs  # noqa: E402

DATA = Path(corpus.__file__).with_name("data")
RUNS = json.loads((DATA / "runs.json").read_text())
CPU = ["CPUExecutionProvider"]


@pytest.mark.parametrize("name", sorted(RUNS))
def test_the_file_is_the_recorded_one(name: str) -> None:
    data = committed(name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == RUNS[name]["sha256"]
    assert len(data) == RUNS[name]["bytes"] < 40e6
    module = built(name, load(), committed(name), torch.float32).module  # every weight is in the file
    assert sum(parameter.numel() for parameter in module.parameters()) == RUNS[name]["parameters"]


def test_held_windows_are_the_named_files_and_their_licences_stand_beside_them() -> None:
    """The notice has a line for every window; of versions that this machine has, the text is compared."""
    record = json.loads((DATA / "corpus.json").read_text())
    versions = record["packages"] | {"python": f"python {record['python']}"}
    notice = (DATA / "NOTICE").read_text()
    listed = [line.split() for line in notice.splitlines() if re.match(r"\d+  ", line)]
    files = [f.split("/", 1) for f in record["held"]["files"]]
    assert len(files) == record["held"]["windows"]
    assert [line[:4] for line in listed] == [[str(n), *versions[p].split(), f] for n, (p, f) in enumerate(files)]
    assert all(len(line) > 4 for line in listed), "a licence for each"
    for package, file in files:
        apache = "Apache-2.0" in next(" ".join(line) for line in listed if line[3] == file)
        assert f"\n{package}:" in notice or f" {package}:" in notice if apache else f"\n{package}\n---" in notice

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(lzma.decompress((DATA / "tokenizer.json.xz").read_bytes()).decode())
    compared = 0
    for (package, file), window in zip(files, corpus.held(DATA), strict=True):
        root = next((root for name, root in corpus._roots() if name == package), None)
        if root is not None and _here(package, record) == versions[package] and (root / file).is_file():
            assert tokenizer.decode(window.tolist()) in (root / file).read_text(), file
            compared += 1
    assert compared or _here("torch", record) != versions["torch"]


def _here(package: str, record: dict[str, Any]) -> str:
    if package == "python":
        return f"python {platform.python_version()}"
    name = record["packages"][package].split()[0]
    return f"{name} {importlib.metadata.version(name)}"


def test_lm_knows_code() -> None:
    windows = torch.from_numpy(corpus.held(DATA))[:1, :513]
    logits = Torch("lm", committed("lm"), load())(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits[0], windows[0, 1:]).item()
    assert loss == pytest.approx(1.61235, abs=2e-3)  # chance is 8.3


def test_vit_finds_the_cues_glyph() -> None:
    got = scores.classes(load().vit, Session(committed("vit"), CPU).one_by_one, 4, 4)
    assert got["images"] == 4 and got["top1"] == 1.0
    assert got["loss"] == pytest.approx(0.01723, abs=1e-3)


def test_dit_removes_noise() -> None:
    got = scores.denoising(load().dit, Session(committed("dit"), CPU).one_by_one, 1)
    assert [got[f"error_at_{at}"] for at in (0.1, 0.5, 0.9)] == pytest.approx([0.00545, 0.00668, 0.10811], rel=0.02)


@pytest.mark.parametrize(("name", "count"), [("lm", 6), ("vit", 2), ("dit", 3)])
def test_inputs_fit_the_model_and_parts_share_nothing(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    proto = onnx.load(committed(name))
    seen = []
    for part in ("calibration", "held-out"):
        out = tmp_path / f"{part}.json"
        monkeypatch.setattr(sys, "argv", ["inputs", name, "--count", str(count), "--part", part, "--out", str(out)])
        assert inputs.main() == 0
        sets = load_inputs(out, proto)  # refuses names, types and shapes that are not the model's
        assert len(sets) == count
        seen += [np.asarray(one[proto.graph.input[0].name]).tobytes() for one in sets]
    assert len(set(seen)) == 2 * count


def test_inputs_refuse_more_text_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inputs", "lm", "--count", "7", "--out", str(tmp_path / "x.json")])
    assert inputs.main() == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: --count is 7: there are 6 sets for lm"
