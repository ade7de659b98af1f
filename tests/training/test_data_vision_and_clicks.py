"""Pictures and click logs: image folders, tar shards, digits, Criteo's lines."""

import io
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from phalanx.recipes.data import DataConfig
from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.data.opening import open_source
from phalanx_worker.training.data.stream import open_stream
from PIL import Image


def picture(shade, size=(6, 4)):
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(stream, members):
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shard(first, count):
    for number in range(first, first + count):
        yield f"{number:04d}.png", picture(number)
        yield f"{number:04d}.cls", str(number % 3).encode()
        yield f"{number:04d}.json", b"{}"


def click_line(label, counts, words):
    return "\t".join([label, *counts, *words]).encode() + b"\n"


def test_an_image_folder_has_a_class_per_directory(tmp_path):
    for name, shade in (("cat", 10), ("dog", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(shade))
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    source = open_source(DataConfig(format="images", paths=(str(tmp_path),)))
    assert len(source) == 2 and source.classes == ["cat", "dog"]
    assert source[1]["label"] == 1
    assert source[1]["image"].shape == (3, 4, 6) and source[1]["image"][0].unique().tolist() == [20]


def test_pictures_of_any_size_come_in_batches_of_one_size(tmp_path):
    (tmp_path / "a").mkdir()
    for number, size in enumerate([(6, 4), (4, 9), (30, 31), (8, 8)]):
        (tmp_path / "a" / f"{number}.png").write_bytes(picture(50, size))
    config = DataConfig(format="images", paths=(str(tmp_path),), image_size=8)
    batch = next(open_stream(config, dp_rank=0, dp_size=1, batch=4, seed=0))
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0].unique().tolist() == [50]
    assert batch["label"].tolist() == [0, 0, 0, 0]


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(b"nonsense")
    source = open_source(DataConfig(format="images", paths=(str(tmp_path),)))
    with pytest.raises(DataError, match=r"bad\.png is not a picture"):
        source[0]


@pytest.mark.parametrize("root", ["file", "memory"])
def test_tar_shards_near_and_far_give_each_sample_by_its_index(tmp_path, root):
    base = f"memory://shards-{tmp_path.name}" if root == "memory" else str(tmp_path)
    for number in range(2):
        with fsspec.open(f"{base}/shard-{number}.tar", "wb") as stream:
            write_tar(stream, shard(number * 5, 5))
    source = open_source(DataConfig(format="tar", paths=(f"{base}/shard-*.tar",), cache=str(tmp_path / "cache")))
    assert len(source) == 10
    for index in range(10):
        assert source[index]["label"] == index % 3
        assert source[index]["image"][0].unique().tolist() == [index]


def test_tar_shards_are_read_by_worker_processes(tmp_path):
    with open(tmp_path / "a.tar", "wb") as stream:
        write_tar(stream, shard(0, 12))
    config = DataConfig(
        format="tar", paths=(str(tmp_path / "a.tar"),), image_size=4, workers=2, cache=str(tmp_path / "cache")
    )
    stream = open_stream(config, dp_rank=0, dp_size=1, batch=4, seed=0)
    shades = torch.cat([next(stream)["image"][:, 0, 0, 0] for _ in range(3)])
    assert sorted(shades.tolist()) == list(range(12))
    stream.close()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("1.png", b"")], "no 1.cls with its label"),
        ([("1.png", b""), ("1.cls", b"cat")], "not the number of a class"),
        ([("notes.txt", b"")], "hold no picture with a label"),
    ],
)
def test_a_shard_that_cannot_be_used_is_named(tmp_path, members, said):
    with open(tmp_path / "a.tar", "wb") as stream:
        write_tar(stream, members)
    with pytest.raises(DataError, match=said):
        open_source(DataConfig(format="tar", paths=(str(tmp_path / "a.tar"),), cache=str(tmp_path / "cache")))


def test_a_compressed_shard_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match="not a plain tar file"):
        open_source(DataConfig(format="tar", paths=(str(tmp_path / "a.tar"),), cache=str(tmp_path / "cache")))


def test_the_digits_come_as_numbers_from_0_to_1():
    batch = next(open_stream(DataConfig(format="digits"), dp_rank=0, dp_size=1, batch=1797, seed=0))
    assert batch["image"].shape == (1797, 1, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["image"].aminmax() == (0.0, 1.0)
    assert torch.bincount(batch["label"]).min() > 170


def test_criteo_lines_become_fixed_records(tmp_path):
    counts = ["", "-2", *(["3"] * 11)]
    words = ["", "ffffffff", *(["0000001a"] * 24)]
    (tmp_path / "day.tsv").write_bytes(click_line("1", counts, words) + click_line("0", ["0"] * 13, [""] * 26))
    config = DataConfig(format="criteo", paths=(str(tmp_path / "day.tsv"),), cache=str(tmp_path / "cache"))
    source = open_source(config)
    assert len(source) == 2
    sample = source[0]
    assert sample["dense"].tolist() == pytest.approx([0, 0, *[np.log(4)] * 11])
    assert sample["categories"].tolist() == [0, 2**32 - 1, *[26] * 24]
    batch = next(open_stream(config, dp_rank=0, dp_size=1, batch=2, seed=0))
    assert (batch["dense"].shape, batch["categories"].shape) == ((2, 13), (2, 26))
    assert sorted(batch["label"].tolist()) == [0.0, 1.0]
    assert (batch["label"].dtype, batch["categories"].dtype) == (torch.float32, torch.int64)


def test_a_line_that_is_not_criteos_is_named(tmp_path):
    (tmp_path / "day.tsv").write_bytes(b"1\t2\t3\n")
    with pytest.raises(DataError, match="26 hexadecimal words"):
        open_source(DataConfig(format="criteo", paths=(str(tmp_path / "day.tsv"),), cache=str(tmp_path / "cache")))
