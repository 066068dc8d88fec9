"""The trained models' data, scores and weights; training itself is tried in two steps at a tiny size."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attncompile.models.trained import corpus, draw, scores, tasks, train  # noqa: E402
from attncompile.models.trained.muon import orthogonal  # noqa: E402
from attncompile.models.trained.recipe import load  # noqa: E402

DATA = Path(corpus.__file__).with_name("data")
CPU = torch.device("cpu")


def _windows(rows: int = 3, length: int = 701) -> torch.Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(1))


def test_each_record_is_asked_for_once_and_answered_by_what_it_held() -> None:
    probes = tasks.needle(_windows(), 500, torch.Generator().manual_seed(2))
    for row, answers, distances in zip(
        probes.windows.tolist(), probes.answers.tolist(), probes.distance.tolist(), strict=True
    ):
        for answer, distance in zip(answers, distances, strict=True):
            begin = answer[0] - tasks.KEYS - 2
            asked = row[begin : begin + tasks.RECORD]
            assert asked == row[begin - distance : begin - distance + tasks.RECORD]
            assert asked[0] == tasks.KEY and asked[tasks.KEYS + 1] == tasks.VALUE and asked[-1] == tasks.END
            assert row[answer[0] : answer[-1] + 1] == asked[tasks.KEYS + 2 : -1]
        assert row.count(tasks.KEY) == 2 * len(answers)


def test_a_segment_is_repeated_without_overlap() -> None:
    probes = tasks.copy(_windows(), 500, 90, torch.Generator().manual_seed(2))
    again = probes.answers[:, 0]
    first = again - probes.distance
    assert torch.equal(probes.windows.gather(1, again), probes.windows.gather(1, first))
    assert (first[:, -1] < again[:, 0]).all()


def test_the_loss_leaves_out_what_nobody_can_know() -> None:
    windows = _windows(rows=6)
    generator, coin = torch.Generator().manual_seed(3), random.Random(3)
    inputs, targets = tasks.mixed(windows, 500, 1 / 3, 1 / 3, generator, coin)
    assert (targets[4:] == windows[4:, 1:]).all()  # code
    known = targets >= 0
    assert (targets[known] == torch.cat([inputs[:, 1:], targets[:, -1:]], 1)[known]).all()
    records = tasks.RECORD + tasks.KEYS + 1
    count = max(4, 701 // 64)
    assert ((~known[:2]).sum(1) == count * records).all()


def test_predicting_every_token_scores_1_and_none_scores_0() -> None:
    generator = torch.Generator().manual_seed(4)
    needle, copy = tasks.needle(_windows(), 500, generator), tasks.copy(_windows(), 500, 50, generator)
    assert tasks.found(needle.windows[:, 1:], needle) == (1.0, [1.0] * 4)
    assert tasks.copied(copy.windows[:, 1:], copy) == 1.0
    wrong = needle.windows[:, 1:].clone()
    wrong[0, needle.answers[0, 0, 2] - 1] += 1  # one token of one value
    records = needle.answers.shape[0] * needle.answers.shape[1]
    assert tasks.found(wrong, needle)[0] == pytest.approx(1 - 1 / records)
    assert tasks.copied(torch.zeros_like(copy.windows[:, 1:]), copy) == 0.0


@pytest.mark.parametrize("side", [128, 200, 256])
def test_the_cue_names_one_glyph_and_that_is_far(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[draw.Glyphs] = []
    cover = draw._cover
    monkeypatch.setattr(
        draw, "_cover", lambda glyphs, index, size: (seen.append(glyphs), cover(glyphs, index, size))[1]
    )
    images, labels = draw.scene(5, side, torch.Generator().manual_seed(5), CPU, full=True)
    assert images.shape == (5, 3, side, side) and images.abs().max() <= 1
    glyphs = seen[0]
    for row in range(5):
        same = (glyphs.colour[row, 1:] - glyphs.colour[row, 0]).abs().amax(1) <= 0.0601
        assert glyphs.shape[row, 1:][same].tolist() == [labels[row].item()]
        if side >= 200:
            target = 1 + int(same.nonzero()[0])
            far = torch.hypot(glyphs.x[row, target] - glyphs.x[row, 0], glyphs.y[row, target] - glyphs.y[row, 0])
            assert far > 42


def test_drawings_are_their_seeds() -> None:
    one, two, other = (draw.family(4, 64, torch.Generator().manual_seed(seed), CPU) for seed in (6, 6, 7))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_orthogonal_brings_singular_values_near_1() -> None:
    matrices = torch.randn(3, 70, 40, generator=torch.Generator().manual_seed(8))
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert values.min() > 0.3 and values.max() < 1.4


def test_psnr_of_a_known_error() -> None:
    image = torch.zeros(2, 3, 5, 5)
    assert scores.psnr(image + 0.2, image) == pytest.approx([20.0, 20.0], abs=1e-4)


def test_committed_windows_are_the_ones_of_the_record() -> None:
    held = corpus.held(DATA)
    recipe = load().lm
    assert held.shape[1] == recipe.context + 1
    assert held.max() < recipe.vocab and not (held == 0).any()


def test_windows_stay_inside_files() -> None:
    tokens = np.array([*[5] * 9, 0, *[6] * 3, 0, *[7] * 13, 0], dtype=np.uint16)
    assert sorted(corpus.windows(tokens, 4, 9)[:, 0].tolist()) == [5, 5, 7, 7]
    assert all(len(set(row)) == 1 for row in corpus.windows(tokens, 4, 9).tolist())
    with pytest.raises(ValueError, match="no held-out file"):
        corpus.windows(tokens, 14, 1)


TINY = """
hidden = 64
heads = 1
ffn = 96
layers = 2
seed = 3
rate = 4e-3
rate_other = 4e-3
decay = 0.01
"""


@pytest.mark.slow
def test_vit_trains_goes_on_and_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    recipe = tmp_path / "recipe.toml"
    image = "patch = 16\nclasses = 8\nphases = [[1.0, 96, 4]]\nside = 96\n"
    recipe.write_text(
        f"[lm]{TINY}vocab = 64\nrope_theta = 1e4\ncontext = 32\nneedles = 0.1\ncopies = 0.1\nphases = [[1.0, 32, 2]]\n"
        f"[vit]{TINY}{image}[dit]{TINY}{image}steps = 2\n"
    )
    common = ["train", "vit", "--recipe", str(recipe), "--seconds", "300", "--out", str(tmp_path)]
    for steps in ("2", "3"):
        monkeypatch.setattr(sys, "argv", [*common, "--state", str(tmp_path / "state"), "--steps", steps])
        train.main()
    assert "goes on at step 2" in capsys.readouterr().out
    record = json.loads((tmp_path / "vit.json").read_text())
    assert record["steps"] == 3 and record["evaluation"]["images"] == 20

    from attncompile.models.recipe import Options
    from attncompile.models.trained.export import built, export

    out = export("vit", tmp_path, tmp_path / "vit.onnx", Options(opset=18, dtype="fp32"), load(recipe))
    made = built("vit", load(recipe), tmp_path, torch.float32)
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = made.module(images)
    got = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )
    np.testing.assert_allclose(got[0], expected.numpy(), atol=1e-4)
