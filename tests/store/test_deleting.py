"""Files are gone only where the storage says so: one that is away for a moment is not an empty one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.outputs import OutputFiles

DIGEST = "0" * 64
KINDS = pytest.mark.parametrize("kind", [LogFiles, OutputFiles])


class Refusing:
    """A storage that cannot look: fsspec's `exists` says no to every error."""

    def exists(self, _: str) -> bool:
        return False

    def rm(self, path: str, **_: Any) -> None:
        raise PermissionError(path)

    def mv(self, path: str, _: str) -> None:
        raise PermissionError(path)


class Interrupted:
    """One whose files somebody else deletes at the same time, and not all of them."""

    def rm(self, path: str, **_: Any) -> None:
        raise FileNotFoundError(f"{path}/one")

    def info(self, path: str) -> dict[str, Any]:
        return {"name": path}


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "file").write_bytes(b"x")


def left(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()]


@KINDS
async def test_what_is_there_goes_and_what_is_not_is_passed_over(kind: Any, tmp_path: Path) -> None:
    make(tmp_path, "a", "c", "d")
    await kind(tmp_path.as_uri()).delete(["a", "b", "c"])
    assert left(tmp_path) == ["d"]


@KINDS
async def test_a_storage_that_is_not_mounted_is_not_an_empty_one(kind: Any, tmp_path: Path) -> None:
    root, away = tmp_path / "storage", tmp_path / "away"
    make(root, "a")
    files = kind(root.as_uri())
    shutil.move(root, away)
    with pytest.raises(FileNotFoundError, match="mount"):
        await files.delete(["a"])
    shutil.move(away, root)
    await files.delete(["a"])
    assert left(root) == []


@KINDS
@pytest.mark.parametrize(("storage", "error"), [(Refusing(), PermissionError), (Interrupted(), FileNotFoundError)])
async def test_what_the_storage_refuses_is_said(kind: Any, storage: Any, error: type[Exception]) -> None:
    files = kind("memory://")
    files._fs = storage
    with pytest.raises(error):
        await files.delete(["a"])


@KINDS
async def test_an_object_storage_has_no_root_to_look_for(kind: Any) -> None:
    await kind("memory://nowhere").delete(["a"])


TAKES = pytest.mark.parametrize("take", [BundleFiles.set_aside, BundleFiles.put_back, BundleFiles.delete_aside])


@TAKES
async def test_a_bundle_that_is_not_there_is_passed_over(take: Any, tmp_path: Path) -> None:
    for root in (tmp_path.as_uri(), "memory://nowhere"):
        await take(BundleFiles(root), DIGEST)


@TAKES
async def test_a_bundle_is_not_taken_for_gone_because_the_storage_is_away(take: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mount"):
        await take(BundleFiles((tmp_path / "away").as_uri()), DIGEST)
    files = BundleFiles("memory://")
    files._fs = Refusing()
    with pytest.raises(PermissionError):
        await take(files, DIGEST)


async def test_a_bundle_goes_in_two_steps_of_which_the_first_can_be_undone(tmp_path: Path) -> None:
    (source := tmp_path / "source").write_bytes(b"code")
    files = BundleFiles((tmp_path / "storage").as_uri())
    await files.write(DIGEST, source)
    for undo, size in ((files.put_back, 4), (files.delete_aside, None)):
        await files.set_aside(DIGEST)
        assert await files.size_bytes(DIGEST) is None
        await undo(DIGEST)
        assert await files.size_bytes(DIGEST) == size
