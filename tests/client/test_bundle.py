"""What goes into a bundle, and that the same tree always gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pytest
from phalanx.bundle import Bundle, pack, scan
from phalanx.errors import BundleError


def tree(root: Path, **files: str) -> Path:
    """Files by path; `__` in a keyword stands for `/` and `_dot_` for a leading dot."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def names(root: Path) -> list[str]:
    return [entry.name for entry in scan(root)]


def packed(root: Path) -> tuple[Bundle, bytes]:
    made = pack(root)
    data = made.path.read_bytes()
    made.discard()
    assert not made.path.exists()
    return made, data


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    first = tree(tmp_path / "a", **{"z.py": "1", "pkg/m.py": "2"})
    second = tree(tmp_path / "b", **{"pkg/m.py": "2", "z.py": "1"})
    os.utime(second / "z.py", (1, 1))
    (second / "pkg").chmod(0o700)
    one, data = packed(first)
    other, other_data = packed(second)
    assert data == other_data and one.sha256 == other.sha256 == hashlib.sha256(data).hexdigest()
    assert (one.files, one.bytes) == (2, len(data))


def test_only_the_executable_bit_is_kept(tmp_path: Path) -> None:
    tree(tmp_path, **{"run.sh": "", "data.txt": ""})
    (tmp_path / "run.sh").chmod(0o700)
    (tmp_path / "data.txt").chmod(0o600)
    made = pack(tmp_path)
    with tarfile.open(made.path) as tar:
        assert {m.name: (m.mode, m.mtime, m.uid, m.uname) for m in tar} == {
            "data.txt": (0o644, 0, 0, ""),
            "run.sh": (0o755, 0, 0, ""),
        }
    made.discard()


def test_some_directories_are_never_packed(tmp_path: Path) -> None:
    tree(
        tmp_path, **{"a.py": "", ".git/HEAD": "", "pkg/__pycache__/x.pyc": "", ".venv/bin/python": "", ".phalanx/x": ""}
    )
    assert names(tmp_path) == ["a.py"]


IGNORE_CASES = {
    "a pattern of the root ignores at any depth": ({".gitignore": "*.bin"}, ["a.bin", "d/b.bin"], []),
    "a slash anchors a pattern to its file": ({".gitignore": "/out"}, ["out/x", "d/out"], ["d/out"]),
    "a nested file speaks for its own directory": ({"d/.gitignore": "x"}, ["x", "d/x"], ["x"]),
    "a nested file overrules the one above": (
        {".gitignore": "*.log", "d/.gitignore": "!keep.log"},
        ["d/keep.log"],
        None,
    ),
    "an ignored directory cannot be reopened from inside": ({".gitignore": "d/", "d/.gitignore": "!x"}, ["d/x"], []),
    "the last pattern that fits decides": ({".gitignore": "*.txt\n!a.txt"}, ["a.txt", "b.txt"], ["a.txt"]),
    ".phalanxignore adds to .gitignore": ({".gitignore": "a", ".phalanxignore": "b"}, ["a", "b", "c"], ["c"]),
    ".phalanxignore may keep what git ignores": ({".gitignore": "model", ".phalanxignore": "!model"}, ["model"], None),
}


@pytest.mark.parametrize("case", IGNORE_CASES)
def test_ignore_files(tmp_path: Path, case: str) -> None:
    rules, files, kept = IGNORE_CASES[case]
    tree(tmp_path, **rules, **dict.fromkeys(files, ""))
    found = [name for name in names(tmp_path) if Path(name).name not in (".gitignore", ".phalanxignore")]
    assert found == (files if kept is None else kept)


def test_the_repository_above_has_a_say(tmp_path: Path) -> None:
    tree(
        tmp_path,
        **{".git/HEAD": "", ".gitignore": "*.ckpt\n/sub/local", "sub/a.py": "", "sub/b.ckpt": "", "sub/local": ""},
    )
    assert names(tmp_path / "sub") == ["a.py"]


def test_a_directory_that_its_repository_ignores_is_packed_when_asked_for(tmp_path: Path) -> None:
    tree(tmp_path, **{".git/HEAD": "", ".gitignore": "build/", "build/train.py": ""})
    assert names(tmp_path / "build") == ["train.py"]


def test_links_that_stay_inside_are_kept_as_links(tmp_path: Path) -> None:
    tree(tmp_path, **{"data/real.txt": "x"})
    (tmp_path / "link").symlink_to("data/real.txt")
    (tmp_path / "data" / "absolute").symlink_to(tmp_path / "data" / "real.txt")
    (tmp_path / "dir").symlink_to("data")
    made = pack(tmp_path)
    with tarfile.open(made.path) as tar:
        links = {member.name: member.linkname for member in tar if member.issym()}
    made.discard()
    assert links == {"link": "data/real.txt", "data/absolute": "real.txt", "dir": "data"}


@pytest.mark.parametrize("target", ["../outside", "/etc/hostname", "sub/../../outside"])
def test_a_link_that_leads_outside_is_refused(tmp_path: Path, target: str) -> None:
    root = tree(tmp_path / "code", **{"sub/a": ""})
    (root / "bad").symlink_to(target)
    with pytest.raises(BundleError, match=r"bad links to .*, outside of the working directory: copy"):
        pack(root)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match="loop links to itself"):
        pack(tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match=r"pipe is neither a file, a directory nor a link: exclude"):
        pack(tmp_path)


def test_too_much_is_refused_with_the_largest_named(tmp_path: Path) -> None:
    tree(tmp_path, **{"data/big.bin": "x" * 5000, "data/more.bin": "x" * 4000, "small.py": "x"})
    with pytest.raises(BundleError) as raised:
        pack(tmp_path, max_bytes=8000)
    assert "the limit is 0.0 MiB; largest: data/ (0.0 MiB), small.py" in str(raised.value)
    assert ".phalanxignore" in str(raised.value)


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, **{f"shards/{i}": "" for i in range(9)}, **{"a.py": ""})
    with pytest.raises(BundleError, match=r"more than 4 files; largest: shards/ \(\d files\)"):
        pack(tmp_path, max_files=4)


def test_a_file_that_shrinks_while_it_is_packed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import phalanx.bundle as bundle

    tree(tmp_path, **{"a.py": "12345"})
    found = scan(tmp_path)
    monkeypatch.setattr(bundle, "scan", lambda *_, **__: found)
    (tmp_path / "a.py").write_text("1")
    with pytest.raises(BundleError, match="changed while it was packed"):
        pack(tmp_path)


@pytest.mark.skipif(not Path("/usr/bin/git").exists(), reason="needs git")
def test_the_selection_is_git_s(tmp_path: Path) -> None:
    """Against git itself, on a tree that uses most of what ignore files can say."""
    import subprocess

    rules = "*.log\n!keep.log\n/top\nbuild/\ndoc/*.txt\n**/deep/x\na/**/z\n\\#hash\nspace\\ \n[ab].c\n"
    files = ["keep.log", "d/x.log", "top", "d/top", "build/a", "d/build/b", "doc/a.txt", "doc/d/b.txt"]
    files += ["q/deep/x", "a/b/c/z", "#hash", "a.c", "c.c", "d/e/f"]
    tree(tmp_path, **{".gitignore": rules, "d/.gitignore": "!x.log\nf\n"}, **dict.fromkeys(files, ""))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert names(tmp_path) == sorted(listed.stdout.split())
