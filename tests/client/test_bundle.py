"""What goes into a bundle, and that the same tree always gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
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
    "a line that is no pattern says nothing": ({".gitignore": "[z-a]\n!\na\\\nb"}, ["a", "b"], ["a"]),
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


def test_so_is_a_directory_in_one_that_its_repository_ignores(tmp_path: Path) -> None:
    tree(tmp_path, **{".git/HEAD": "", ".gitignore": "build/\n*.log", "build/sub/train.py": "", "build/sub/x.log": ""})
    assert names(tmp_path / "build" / "sub") == ["train.py", "x.log"]


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


def test_a_link_that_comes_back_is_written_within_the_directory(tmp_path: Path) -> None:
    """As it was written, the node refuses it: there the directory has another name."""
    root = tree(tmp_path / "proj", **{"data/x": "1", "d/y": ""})
    (root / "l").symlink_to("../proj/data")
    (root / "d" / "chain").symlink_to("../l/x")
    (root / "d" / "dangling").symlink_to("../../proj/absent")
    made = pack(root)
    with tarfile.open(made.path) as tar:
        assert {m.name: m.linkname for m in tar if m.issym()} == {
            "l": "data",
            "d/chain": "../data/x",
            "d/dangling": "../absent",
        }
        tar.extractall(tmp_path / "node", filter="data")
    made.discard()
    assert (tmp_path / "node" / "d" / "chain").read_text() == "1"


@pytest.mark.parametrize("target", ["../outside", "/etc/hostname", "sub/../../outside"])
def test_a_link_that_leads_outside_is_refused(tmp_path: Path, target: str) -> None:
    root = tree(tmp_path / "code", **{"sub/a": ""})
    (root / "bad").symlink_to(target)
    with pytest.raises(BundleError, match=r"bad links to .*, outside of the working directory: copy"):
        pack(root)


@pytest.mark.parametrize("targets", [{"loop": "loop"}, {"loop": "pool", "pool": "loop"}, {"loop": "loop/x"}])
def test_a_link_to_itself_is_refused(tmp_path: Path, targets: dict[str, str]) -> None:
    for name, target in targets.items():
        (tmp_path / name).symlink_to(target)
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


# ------------------------------------------------------------------ against git itself


class Git:
    """What git takes of a tree, by the ignore files in it alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        subprocess.run(["git", "init", "-q", "--bare", directory], check=True)

    def names(self, root: Path) -> list[str]:
        argv = ["git", "-c", "core.excludesFile=", f"--git-dir={self.directory}", f"--work-tree={root}"]
        argv += ["ls-files", "-coz", "--exclude-standard"]
        listed = subprocess.run(argv, cwd=root, check=True, capture_output=True, text=True)
        return sorted(listed.stdout.split("\0")[:-1])


@pytest.fixture
def git(tmp_path: Path) -> Git:
    if shutil.which("git") is None:
        pytest.skip("needs git, to compare with")
    return Git(tmp_path / "git")


MOST_OF_WHAT_IT_CAN_SAY = "*.log\n!keep.log\n/top\nbuild/\ndoc/*.txt\n**/deep/x\na/**/z\n\\#hash\nspace\\ \n[ab].c\n"
ITS_FILES = ["keep.log", "d/x.log", "top", "d/top", "build/a", "d/build/b", "doc/a.txt", "doc/d/b.txt"]
ITS_FILES += ["q/deep/x", "a/b/c/z", "#hash", "space ", "a.c", "c.c", "d/e/f"]
SELECTIONS = {
    "most of what ignore files can say": (
        {".gitignore": MOST_OF_WHAT_IT_CAN_SAY, "d/.gitignore": "!x.log\nf\n"},
        ITS_FILES,
    ),
    "all but one kind": ({".gitignore": "*\n!*/\n!*.py"}, ["a.py", "a.txt", "d/c.py", "d/c.txt", "d/e/f.py"]),
    "all but one kind, the other way round": ({".gitignore": "*\n!*.py\n!*/"}, ["a.py", "d/c.py", "d/c.txt"]),
    "all but one kind at any depth": ({".gitignore": "*\n!*/\n!**/*.py"}, ["a.py", "d/c.py", "d/c.txt"]),
    "one file of a directory": ({".gitignore": "data/**\n!data/keep.txt"}, ["data/keep.txt", "data/x", "data/d/y"]),
    "directories below one": ({".gitignore": "data/**/\n"}, ["data/x", "data/d/y"]),
    "a byte order mark": ({".gitignore": "\ufeff*.bin\n"}, ["a.bin", "b.py"]),
    "lines of Windows": ({".gitignore": "*.bin\r\nout/\r\n"}, ["a.bin", "out/x", "b.py"]),
    "a page break is no line break": ({".gitignore": "a\x0cb\n"}, ["a", "b", "a\x0cb"]),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_the_selection_is_git_s(tmp_path: Path, git: Git, case: str) -> None:
    rules, files = SELECTIONS[case]
    root = tree(tmp_path / "tree", **rules, **dict.fromkeys(files, ""))
    assert names(root) == git.names(root)


SEGMENTS = ["a", "b", "c.py", "*", "**", "*.py", "a*", "?", "[ab]", "[!a]", "a[!x]b", "*b*", "\\a"]


def drawn_rules(chance: random.Random) -> str:
    lines = []
    for _ in range(chance.randint(1, 6)):
        path = "/".join(chance.choices(SEGMENTS, k=chance.choice([1, 1, 1, 2, 2, 3])))
        lines.append(chance.choice(["", "", "!"]) + chance.choice(["", "", "/"]) + path + chance.choice(["", "", "/"]))
    return "\n".join(lines) + "\n"


def drawn_tree(chance: random.Random) -> dict[str, str]:
    """Files by path: some under the directories `a`, `b` and `d`, with an ignore file here and there."""
    directories = ["/".join(chance.choices("abd", k=depth)) for depth in (0, 1, 1, 2, 2, 3)]
    files = dict.fromkeys(
        (f"{d}/{chance.choice(['c.py', 'x.py', 'ab', 'y'])}".lstrip("/") for d in directories * 2), ""
    )
    ruled = {"", *chance.sample(directories, k=chance.randint(0, 2))}
    return files | {f"{d}/.gitignore".lstrip("/"): drawn_rules(chance) for d in ruled}


def test_the_selection_is_git_s_whatever_the_rules(tmp_path: Path, git: Git) -> None:
    for seed in range(400):
        files = drawn_tree(random.Random(seed))
        root = tree(tmp_path / str(seed), **files)
        assert names(root) == git.names(root), (seed, {name: text for name, text in files.items() if text})
