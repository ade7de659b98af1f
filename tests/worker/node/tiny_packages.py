"""Tiny packages made on the spot, so that pip builds for real and needs no network."""

from __future__ import annotations

import io
import tarfile
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path

_PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def wheel(directory: Path, name: str, version: str, files: Mapping[str, str]) -> None:
    """A pure Python wheel that puts `files` into site-packages."""
    info = f"{name}-{version}.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, *meta, f"{info}/RECORD"))
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, **meta, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)


def sdist(directory: Path, name: str, version: str, backend: str) -> None:
    """A source package; `backend` is the code that pip runs to build it."""
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "pyproject.toml": _PYPROJECT,
        "backend.py": textwrap.dedent(backend),
    }
    with tarfile.open(directory / f"{name}-{version}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{name}-{version}/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def lines(directory: Path, *requirements: str) -> list[str]:
    """Of an environment that takes packages from `directory` alone."""
    return ["--no-index", f"--find-links {directory}", *requirements]
