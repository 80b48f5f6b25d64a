"""From files of text to a tokenizer and to Megatron's indexed dataset; a file that is wrong ends in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from megatron_hybrid.errors import DataError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEXTS = [f"What is {a} plus {b} ?\n{a + b}" for a in range(12) for b in range(12)]


def run(tool, *flags):
    return subprocess.run(
        [sys.executable, TOOLS / f"{tool}.py", *map(str, flags)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus and the tokenizer that the tool makes of it."""
    path = tmp_path_factory.mktemp("corpus")
    (path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = ("--input", path / "corpus.jsonl", "--save", path / "tokenizer.model", "--vocab-size", 300)
    done = run("train_tokenizer", *flags, "--symbols", "<|user|>")
    assert done.returncode == 0, done.stderr
    assert "300 tokens" in done.stdout
    assert "--tokenizer-type SentencePieceTokenizer" in done.stdout
    return path


def test_the_tokenizer_gives_every_text_back(folder):
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (TEXTS[5], "two  spaces, \u00e9 and \u4e16 unseen ", "<|user|>"):
        assert model.decode(model.encode(text)) == text
    pieces = model.encode("<|user|>What is 11 plus 1 ?\n12", out_type=str)
    assert {"<|user|>", "\n", "1", "2"} <= set(pieces)
    assert "11" not in "".join(piece if len(piece) > 1 else " " for piece in pieces)


def test_the_dataset_holds_every_text_and_its_end(folder):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    done = run(
        "preprocess_data",
        *("--input", folder / "corpus.jsonl", "--output-prefix", folder / "data"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model"),
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(TEXTS)} documents" in done.stdout
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    dataset = IndexedDataset(str(folder / "data"))
    assert [row.tolist() for row in dataset] == [[*model.encode(text), model.eos_id()] for text in TEXTS]
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))


@pytest.mark.parametrize(
    ("content", "vocab_size", "message"),
    [
        ('{"text": "one"}\n{"txt": "two"}\n', 300, "line 2 has no text"),
        ('{"text": "one"}\nnot json\n', 300, "line 2 is not JSON"),
        ("\n", 300, "holds no text"),
        ('{"text": "one"}\n', 30000, "30000 tokens"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, content, vocab_size, message):
    monkeypatch.syspath_prepend(TOOLS)
    import train_tokenizer

    (tmp_path / "corpus.jsonl").write_text(content)
    flags = ["--input", str(tmp_path / "corpus.jsonl"), "--save", str(tmp_path / "t.model")]
    args = train_tokenizer.parser().parse_args([*flags, "--vocab-size", str(vocab_size)])
    with pytest.raises(DataError, match=message):
        train_tokenizer.train(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_of_a_larger_corpus_as_many_lines_are_drawn_the_same_each_time(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from train_tokenizer import drawn

    lines = [str(i) for i in range(1000)]
    kept = drawn(iter(lines), 100)
    assert len(set(kept)) == 100
    assert kept == drawn(iter(lines), 100)
    assert sum(int(line) > 500 for line in kept) > 25  # not the first hundred; 50 is expected, with a deviation of 5
    assert drawn(iter(lines), 2000) == lines
