"""The language model's data: Python source files found on this machine, as tokens.

``python -m attncompile.models.trained.corpus --out FOLDER`` writes the tokenizer, one xz file of uint16 tokens a split,
and ``corpus.json`` with counts and hashes. Which split a file is in, its SHA-256 says; so a file keeps its split
whatever else is found. Files of one package stand together in the order of their paths, so that what a long context
sees before a file is often what that file imports.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attncompile.models.trained.recipe import LmRecipe, load

# The library of Python itself, and these packages where they are installed. transformers and diffusers are left out:
# their files are copies of one another with another name in them, so held-out files would be known from training.
PACKAGES = (
    "torch", "sympy", "scipy", "sklearn", "numpy", "matplotlib", "networkx", "timm", "mypy", "fontTools", "pygments",
    "onnxruntime", "huggingface_hub", "onnxscript", "setuptools", "sentence_transformers", "onnx", "narwhals", "mpmath",
    "pydantic", "hypothesis", "polygraphy", "triton", "_pytest", "rich", "PIL", "joblib", "fsspec", "onnx_ir",
    "filelock", "anyio", "packaging", "virtualenv", "jsonschema", "jinja2", "click", "typer", "httpx", "yaml", "attr",
    "regex", "tqdm", "requests", "urllib3", "pyparsing", "dateutil", "execnet", "xdist", "safetensors", "torchgen",
)  # fmt: skip
SPLITS = ("train", "validation", "test")
EOF = "<eof>"
SPECIAL = (EOF, "<key>", "<value>", "<end>")
_SMALLEST, _LARGEST = 400, 400_000  # bytes
_NEAR_COPY = 0.5
_HELD = 8  # windows of the test split that are committed


@dataclass(frozen=True, slots=True)
class Source:
    """One file: its package, its path inside it, its text and the SHA-256 of its bytes."""

    package: str
    path: str
    text: str
    digest: str

    @property
    def split(self) -> str:
        """1 file in 50 is for validation, 1 in 50 for the test, by the first four bytes of its hash."""
        bucket = int(self.digest[:8], 16) % 50
        return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def find() -> list[Source]:
    """Files in the order of package and path; of files with equal text (spaces and comments' ends aside) the first."""
    sources, seen = [], set()
    for package, root in _roots():
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).as_posix()
            if any(part in inside for part in ("site-packages/", "_vendor/", "_pyrepl/")) or path.is_symlink():
                continue
            data = path.read_bytes()
            if not _SMALLEST <= len(data) <= _LARGEST:
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            same = hashlib.sha256("".join(text.split()).encode()).digest()
            if same not in seen:
                seen.add(same)
                sources.append(Source(package, inside, text, hashlib.sha256(data).hexdigest()))
    return sources


def _roots() -> Iterator[tuple[str, Path]]:
    paths = sysconfig.get_paths()
    yield "python", Path(paths["stdlib"])
    for package in PACKAGES:
        root = Path(paths["purelib"]) / package
        if root.is_dir():
            yield package, root


def without_near_copies(sources: list[Source]) -> list[Source]:
    """Drops held-out files of which more than half of the long lines stand in training files."""

    def lines(source: Source) -> list[bytes]:
        long = (line.strip() for line in source.text.splitlines())
        return [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in long if len(line) > 30]

    trained = {line for source in sources if source.split == "train" for line in lines(source)}
    kept = []
    for source in sources:
        if source.split != "train":
            own = lines(source)
            if not own or sum(line in trained for line in own) > _NEAR_COPY * len(own):
                continue
        kept.append(source)
    return kept


def train_tokenizer(sources: list[Source], vocab: int) -> object:
    """A byte-level BPE of ``vocab`` tokens on every fourth training file; the special tokens are the first ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [source.text for source in sources if source.split == "train"][::4]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read(folder: Path, split: str) -> NDArray[np.uint16]:
    """The tokens of a split; raises ``ValueError`` where they are not the ones that ``corpus.json`` names."""
    data = lzma.decompress((folder / f"{split}.xz").read_bytes())
    named = json.loads((folder / "corpus.json").read_text())["splits"][split]["sha256"]
    if hashlib.sha256(data).hexdigest() != named:
        raise ValueError(f"{folder / split}.xz: not the tokens that corpus.json names")
    return np.frombuffer(data, dtype="<u2")


def places(tokens: NDArray[np.uint16], length: int, count: int) -> list[tuple[int, int]]:
    """Up to ``count`` windows of ``length`` tokens as the number of the file and the first token, each inside one file,
    at most two a file, spread over all files. Raises ``ValueError`` where no file is so long.
    """
    ends = np.flatnonzero(tokens == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    found = [
        (number, int(start) + at * length)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        for at in range(min(2, (end - start) // length))
    ]
    if not found:
        raise ValueError(f"no held-out file has {length} tokens")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[index] for index in chosen]


def windows(tokens: NDArray[np.uint16], length: int, count: int) -> NDArray[np.int64]:
    """Those windows [window, length]."""
    return np.stack([tokens[start : start + length] for _, start in places(tokens, length, count)]).astype(np.int64)


def held(folder: Path) -> NDArray[np.int64]:
    """The few windows [window, tokens] of the test split that are committed."""
    record = json.loads((folder / "corpus.json").read_text())["held"]
    data = lzma.decompress((folder / "held.xz").read_bytes())
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{folder}/held.xz: not the tokens that corpus.json names")
    return np.frombuffer(data, dtype="<u2").reshape(record["windows"], -1).astype(np.int64)


def write(folder: Path, recipe: LmRecipe) -> dict[str, object]:
    """Writes tokenizer, tokens and ``corpus.json`` into ``folder``; returns what the last holds."""
    sources = without_near_copies(find())
    tokenizer = train_tokenizer(sources, recipe.vocab)
    tokenizer.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    splits: dict[str, object] = {}
    for split in SPLITS:
        chosen = [source for source in sources if source.split == split]
        pieces = []
        for at in range(0, len(chosen), 256):
            texts = [source.text for source in chosen[at : at + 256]]
            for encoded in tokenizer.encode_batch(texts):  # type: ignore[attr-defined]
                pieces.append(np.array([*encoded.ids, 0], dtype="<u2"))
        tokens = np.concatenate(pieces)
        data = tokens.tobytes()
        (folder / f"{split}.xz").write_bytes(lzma.compress(data, preset=6))
        last, files = tokens, chosen  # of the test, in the end
        splits[split] = {
            "files": len(chosen),
            "bytes": sum(len(source.text.encode()) for source in chosen),
            "tokens": len(tokens),
            "sha256": hashlib.sha256(data).hexdigest(),
            "files_sha256": hashlib.sha256("\n".join(source.digest for source in chosen).encode()).hexdigest(),
        }
    few = windows(last, recipe.context + 1, _HELD).astype("<u2")
    (folder / "held.xz").write_bytes(lzma.compress(few.tobytes(), preset=9))
    known = importlib.metadata.packages_distributions()
    packages = sorted({source.package for source in sources} - {"python"})
    record = {
        "python": platform.python_version(),
        "packages": {package: _version(known.get(package, [])) for package in packages},
        "vocab": recipe.vocab,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "splits": splits,
        "held": {
            "windows": len(few),
            "sha256": hashlib.sha256(few.tobytes()).hexdigest(),
            # What is committed is others' source: data/NOTICE gives its licences.
            "files": [f"{files[n].package}/{files[n].path}" for n, _ in places(last, recipe.context + 1, _HELD)],
        },
    }
    (folder / "corpus.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _version(names: list[str]) -> str:
    return f"{names[0]} {importlib.metadata.version(names[0])}" if names else "unknown"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and the tokens")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(write(arguments.out, load().lm), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
