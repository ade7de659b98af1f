"""Language-model data: text, JSONL, Parquet and token files, near and far, by bytes and by a given tokenizer."""

import gzip
import json

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from phalanx.recipes.data import DataConfig
from phalanx_worker.training.data import text
from phalanx_worker.training.data.files import DataError, find
from phalanx_worker.training.data.opening import open_source, vocab_size
from phalanx_worker.training.data.stream import open_stream
from phalanx_worker.training.data.tokens import write_tokens

DOCUMENTS = ["one fish", "zwei Fische — ja", "drei"]


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def all_tokens(source):
    """The tokens of all windows, one after another, without what neighbours share."""
    windows = [source[index]["tokens"] for index in range(len(source))]
    return torch.cat([windows[0][:1], *(window[1:] for window in windows)]).tolist()


def write_parquet(path, documents, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({column: documents}), path)


def word_tokenizer(path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"<end>": 0, "<unk>": 1, "one": 2, "fish": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))
    return str(path)


def test_jsonl_and_parquet_of_the_same_documents_give_the_same_tokens(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": doc}) + "\n" for doc in DOCUMENTS))
    write_parquet(tmp_path / "a.parquet", DOCUMENTS, column="body")
    expected = list(b"".join(doc.encode() + b"\0" for doc in DOCUMENTS))
    for format in ("jsonl", "parquet"):
        config = DataConfig(format=format, paths=(str(tmp_path / f"a.{format}"),), field="body", seq_len=1, cache=cache)
        assert all_tokens(open_source(config)) == expected


def test_text_files_are_one_corpus_by_name_each_ended_by_a_zero_byte(tmp_path, cache):
    (tmp_path / "corpus").mkdir()
    for name, content in (("b.txt", "second\n"), ("a.txt", "first\n"), (".hidden", "never")):
        (tmp_path / "corpus" / name).write_text(content)
    for paths in ((f"{tmp_path}/corpus",), (f"{tmp_path}/corpus/*.txt",)):
        source = open_source(DataConfig(paths=paths, seq_len=1, cache=cache))
        assert all_tokens(source) == list(b"first\n\0second\n\0")


def test_packed_text_is_unpacked(tmp_path, cache):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    config = DataConfig(paths=(str(tmp_path / "a.txt.gz"),), seq_len=1, cache=cache)
    assert all_tokens(open_source(config)) == list(b"hello\0")


def test_a_url_is_read_like_a_path(cache):
    with fsspec.open("memory://corpus/a.jsonl", "wb") as stream:
        stream.write(b'{"text": "far away"}\n')
    config = DataConfig(format="jsonl", paths=("memory://corpus/*.jsonl",), seq_len=3, cache=cache)
    assert all_tokens(open_source(config)) == list(b"far away\0")[:7]


def test_a_given_tokenizer_and_its_end_of_text_are_used(tmp_path, cache):
    (tmp_path / "a.txt").write_text("one fish two")
    config = DataConfig(
        paths=(str(tmp_path / "a.txt"),),
        tokenizer=word_tokenizer(tmp_path / "tokenizer.json"),
        end_of_text="<end>",
        seq_len=1,
        cache=cache,
    )
    source = open_source(config)
    assert all_tokens(source) == [2, 3, 1, 0]
    assert source.vocab_size == vocab_size(config) == 4


def test_an_end_of_text_that_the_tokenizer_does_not_know_is_refused(tmp_path, cache):
    (tmp_path / "a.txt").write_text("one")
    path = word_tokenizer(tmp_path / "tokenizer.json")
    config = DataConfig(paths=(str(tmp_path / "a.txt"),), tokenizer=path, end_of_text="<eos>", cache=cache)
    with pytest.raises(DataError, match="'<eos>' is no symbol of"):
        open_source(config)


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
def test_a_token_file_without_header_is_read_as_it_is_said(tmp_path, cache, kind):
    np.arange(11, dtype=kind).tofile(tmp_path / "a.bin")
    config = DataConfig(
        format="tokens", paths=(str(tmp_path / "a.bin"),), token_type=kind, vocab_size=50, seq_len=5, cache=cache
    )
    source = open_source(config)
    assert [source[0]["tokens"].tolist(), source[1]["tokens"].tolist()] == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]
    assert source[0]["tokens"].dtype == torch.int64


def test_a_far_token_file_with_a_header_says_its_own_width_and_vocabulary(cache):
    with fsspec.open("memory://tokens/a.bin", "wb") as stream:
        assert write_tokens(stream, [np.array([70_000, 1]), np.array([2])], vocab_size=70_001) == 3
    config = DataConfig(format="tokens", paths=("memory://tokens/a.bin",), seq_len=2, cache=cache)
    source = open_source(config)
    assert source[0]["tokens"].tolist() == [70_000, 1, 2]
    assert source.vocab_size == 70_001


def test_several_files_are_one_source_and_no_window_spans_two(tmp_path, cache):
    for name, begin, count in (("a", 0, 7), ("b", 100, 2), ("c", 200, 5)):
        np.arange(begin, begin + count, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    config = DataConfig(format="tokens", paths=(str(tmp_path),), vocab_size=256, seq_len=2, cache=cache)
    source = open_source(config)
    assert [source[i]["tokens"].tolist() for i in range(len(source))] == [
        [0, 1, 2],
        [2, 3, 4],
        [4, 5, 6],
        [200, 201, 202],
        [202, 203, 204],
    ]


def test_a_stream_gives_each_rank_its_share_of_windows(tmp_path, cache):
    np.arange(81, dtype=np.uint16).tofile(tmp_path / "a.bin")
    config = DataConfig(format="tokens", paths=(str(tmp_path),), vocab_size=81, seq_len=4, cache=cache)
    streams = [open_stream(config, dp_rank=rank, dp_size=2, batch=4, seed=3) for rank in range(2)]
    seen = []
    for _ in range(5):
        for stream in streams:
            tokens = next(stream)["tokens"]
            assert (tokens.shape, tokens.dtype) == ((2, 5), torch.int64)
            seen += tokens[:, 0].tolist()
    assert sorted(seen) == list(range(0, 80, 4))


def test_text_is_prepared_once(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    config = DataConfig(paths=(str(tmp_path / "a.txt"),), seq_len=2, cache=cache)
    first = all_tokens(open_source(config))
    monkeypatch.setattr(text, "text_pieces", lambda _: pytest.fail("it was prepared before"))
    assert all_tokens(open_source(config)) == first


def test_a_large_text_is_read_in_pieces_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_BYTES", 10)
    (tmp_path / "a.txt").write_text("a line\nanother one\nand more\nlast")
    pieces = list(text.text_pieces(find([str(tmp_path / "a.txt")])[0]))
    assert b"".join(piece for piece, _ in pieces).decode() == (tmp_path / "a.txt").read_text()
    assert len(pieces) > 1 and all(piece.endswith(b"\n") for piece, _ in pieces[:-1])
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    ("name", "content", "given", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', {"format": "jsonl"}, "line 2 has no field text"),
        ("a.jsonl", b"{nonsense\n", {"format": "jsonl"}, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', {"format": "jsonl"}, "3 is not text"),
        ("a.bin", b"abc", {"format": "tokens", "vocab_size": 9}, "3 bytes, not a multiple of 2"),
        ("a.bin", b"abcd", {"format": "tokens"}, "set data.vocab_size"),
        ("a.bin", b"PHXTOKEN" + bytes(10), {"format": "tokens"}, "was it cut short"),
        ("a.txt", b"abc", {"seq_len": 100}, "4 tokens do not make one sample of 101"),
        ("b.txt", b"", {"tokenizer": "bytes", "end_of_text": "<end>"}, "has no use with bytes"),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path, cache, name, content, given, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        open_source(DataConfig(paths=(str(tmp_path / name),), cache=cache, **given))


def test_a_missing_column_is_answered_with_those_there_are(tmp_path, cache):
    write_parquet(tmp_path / "a.parquet", DOCUMENTS, column="content")
    with pytest.raises(DataError, match="no column text, only content"):
        open_source(DataConfig(format="parquet", paths=(str(tmp_path / "a.parquet"),), cache=cache))


def test_a_path_that_names_nothing_is_said(cache):
    with pytest.raises(DataError, match="/nowhere/at/all names no file"):
        open_source(DataConfig(paths=("/nowhere/at/all",), cache=cache))
