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

from attncompile.models.trained import corpus, inputs, scores, tasks  # noqa: E402
from attncompile.models.trained.evaluate import Session, Torch  # noqa: E402
from attncompile.models.trained.export import built, committed  # noqa: E402
from attncompile.models.trained.recipe import load  # noqa: E402
from attncompile.verification.inputs import load_inputs  # noqa: E402

DATA = Path(corpus.__file__).with_name("data")
RUNS = json.loads((DATA / "runs.json").read_text())


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
    got = scores.classes(load().vit, Session(committed("vit"), "cpu").one_by_one, 4, 4)
    assert got["images"] == 4 and got["top1"] == 1.0
    assert got["loss"] == pytest.approx(0.01723, abs=1e-3)


def test_dit_removes_noise() -> None:
    got = scores.denoising(load().dit, Session(committed("dit"), "cpu").one_by_one, 1)
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["lm", "--mixed"], "are of texts of --data"),
        (["lm", "--split", "validation"], "are of texts of --data"),
        (["vit", "--data", "nowhere"], "vit takes images"),
    ],
)
def test_inputs_refuse_options_that_say_nothing(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inputs", *given, "--out", str(tmp_path / "x.json")])
    assert inputs.main() == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_inputs_refuse_texts_without_room_or_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _split(tmp_path, [np.arange(4, 40) for _ in range(4)])
    given = ["inputs", "lm", "--tokens", "32", "--data", str(tmp_path), "--mixed", "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", given)
    assert inputs.main() == 2
    assert "--mixed: 32 tokens have no room" in capsys.readouterr().err


def test_inputs_refuse_more_text_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inputs", "lm", "--count", "7", "--out", str(tmp_path / "x.json")])
    assert inputs.main() == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: --count is 7: there are 6 sets for lm"


def _split(folder: Path, files: list[np.ndarray], tokenizer: str | None = None) -> None:
    """A split of these files as ``corpus`` writes it."""
    tokens = np.concatenate([np.append(file, 0) for file in files]).astype("<u2")
    (folder / "test.xz").write_bytes(lzma.compress(tokens.tobytes()))
    known = json.loads((DATA / "corpus.json").read_text())["tokenizer_sha256"]
    record = {"splits": {"test": {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}},
              "tokenizer_sha256": tokenizer or known}  # fmt: skip
    (folder / "corpus.json").write_text(json.dumps(record))


def test_more_text_is_of_files_of_their_own_and_of_none_that_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(3)
    windows = corpus.held(DATA)[[1, 6]]
    fine = [rng.integers(4, 4096, size) for size in (70, 65, 64, 301, 80)]
    within = [np.concatenate([fine[0][:9], window, fine[1][:3]]) for window in windows]
    _split(tmp_path, [fine[0], within[0], fine[1], rng.integers(4, 4096, 63), fine[2], fine[3], within[1], fine[4]])

    def made(count: int, part: str, *options: str) -> list[list[int]]:
        out = tmp_path / f"{part}.json"
        given = ["lm", "--tokens", "64", "--data", str(tmp_path), "--part", part, "--count", str(count), *options]
        monkeypatch.setattr(sys, "argv", ["inputs", *given, "--out", str(out)])
        assert inputs.main() == 0
        sets = load_inputs(out)
        assert all(s["input_ids"].shape == (1, 64) and s["input_ids"].dtype == np.int64 for s in sets)
        return [s["input_ids"][0].tolist() for s in sets]

    wanted = [file[:64].tolist() for file in fine]
    assert made(2, "calibration") == [wanted[0], wanted[4]] and made(3, "calibration") == wanted[::2]
    assert made(2, "held-out") == wanted[1::2]
    assert made(2, "both") == [wanted[0], wanted[1], wanted[4], wanted[3]]
    more = ["--tokens", "65", "--data", str(tmp_path), "--part", "both", "--count", "3"]
    monkeypatch.setattr(sys, "argv", ["inputs", "lm", *more, "--out", str(tmp_path / "x.json")])
    assert inputs.main() == 2  # one file has 64 tokens
    assert "--count is 3: 2 files of" in capsys.readouterr().err
    _split(tmp_path, fine, "0" * 64)
    assert inputs.main() == 2
    assert "another tokenizer's" in capsys.readouterr().err
    (tmp_path / "test.xz").write_bytes(lzma.compress(b"\1\0\0\0"))
    assert inputs.main() == 2
    assert "not the tokens that corpus.json names" in capsys.readouterr().err


def test_texts_are_mixed_with_records_and_repeated_segments(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    files = [rng.integers(4, 4096, 96 + n) for n in range(8)]
    _split(tmp_path, files)
    sets = inputs.samples("lm", 4, "calibration", load(), tokens=96, more=inputs.Texts(tmp_path, mixed=True))
    plain, records, repeated, again = (s["input_ids"][0].tolist() for s in sets)
    assert [plain, again] == [files[0][:96].tolist(), files[6][:96].tolist()] and len(records) == len(repeated) == 96
    keys = [tuple(records[i + 1 : i + 1 + tasks.KEYS]) for i, t in enumerate(records) if t == tasks.KEY]
    assert len(keys) == 8 and all(keys.count(key) == 2 for key in keys), "each record is asked for"
    pieces = [tuple(repeated[i : i + 96 // 8]) for i in range(96 - 96 // 8 + 1)]
    assert len(set(pieces)) < len(pieces) and repeated != files[4][:96].tolist()


def test_many_images_come_in_fours_and_parts_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompile.models.trained import many_images

    monkeypatch.setattr(many_images, "_DRAWN", 4)
    sets = [one["images"] for one in many_images.load_data(2)]
    assert [s.shape for s in sets] == [(4, 3, 256, 256)] * 4 and sets[0].dtype == np.float32
    assert len({image.tobytes() for s in sets for image in s}) == 16
    again = [one["images"] for one in many_images.load_data(1)]
    assert [a.tobytes() for a in again] == [s.tobytes() for s in sets[:2]]  # calibration, held out
