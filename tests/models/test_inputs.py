"""Real inputs of the recipes: they fit the exported graph, differ from one another and have structure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from polygraphy.json import load_json

from attncompile.core.errors import BadArguments
from attncompile.models import NAMES
from attncompile.models.images import structured_images
from attncompile.models.inputs import samples, write
from tests.exports import exported


@pytest.mark.parametrize("name", NAMES)
def test_samples_run_and_differ(name: str) -> None:
    path = exported(name, "torchscript", 17)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = [session.run(None, sample) for sample in samples(name, 3, exporter="torchscript")]
    assert all(np.isfinite(array).all() for result in results for array in result)
    assert not np.allclose(results[0][0], results[1][0])
    assert not np.allclose(results[1][0], results[2][0])


def test_minilm_reads_sentences() -> None:
    first, second = samples("minilm", 2, tokens=128)
    assert first["input_ids"].shape == (1, 128)
    assert first["input_ids"][0, 0] == 101  # [CLS]
    lengths = [int(sample["attention_mask"].sum()) for sample in (first, second)]
    assert all(8 < length < 64 for length in lengths)
    assert (first["input_ids"][0, lengths[0] :] == 0).all()  # [PAD]


def test_minilm_finds_the_sentence_that_means_the_same() -> None:
    """The weights are the trained ones: a paraphrase is nearer than the other sentences."""
    from attncompile.models.minilm import tokenize

    path = exported("minilm", dynamic=("batch", "sequence"))
    texts = ["It will rain on Thursday.", "Rain is expected on Thursday.", "How do I change a filter?", "A red bus."]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    embedding = session.run(["sentence_embedding"], dict(tokenize(texts, 24)))[0]
    similarity = embedding @ embedding.T
    np.testing.assert_allclose(np.diag(similarity), 1.0, atol=1e-5)
    assert similarity[0, 1] > 0.8
    assert similarity[0, 2:].max() < 0.4


def test_images_have_neighbours_that_resemble_one_another() -> None:
    images = structured_images(4, 3, 48, seed=0)
    assert images.shape == (4, 3, 48, 48)
    assert images.dtype == np.float32
    a, b = images[..., :-1].ravel(), images[..., 1:].ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.8


def test_files_hold_the_sets(tmp_path: Path) -> None:
    wanted = samples("vit", 2)
    one = np.load(write("vit", tmp_path / "one.npz"))
    assert one.files == ["pixel_values"]
    np.testing.assert_array_equal(one["pixel_values"], wanted[0]["pixel_values"])
    many = load_json(str(write("vit", tmp_path / "many.json", count=2)))
    assert [list(feed) for feed in many] == [["pixel_values"]] * 2
    np.testing.assert_array_equal(many[1]["pixel_values"], wanted[1]["pixel_values"])


@pytest.mark.parametrize(
    ("file", "count", "words"),
    [("x.txt", 1, "neither"), ("x.npz", 2, "one input set"), ("x.json", 0, "--count"), ("no/x.npz", 1, "not a folder")],
)
def test_bad_files_are_refused(file: str, count: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadArguments, match=words):
        write("vit", tmp_path / file, count=count)
    assert not list(tmp_path.iterdir())
