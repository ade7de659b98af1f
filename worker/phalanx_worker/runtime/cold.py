"""A Python command that cannot be forked from the warm process, run in an interpreter of its own.

Owns the few lines between that interpreter's start and the script. Going through here instead of plain `python` gives
cold ranks the same marks and the same safe end as warm ones: CPython's own finalization kills a gloo thread that wants
the GIL at that moment, and torch then aborts ("terminate called without an active exception", 3 of 100 ranks measured).
"""

from __future__ import annotations

import sys

_STARTUP_MODULES = frozenset(sys.modules)

from phalanx_worker.runtime import marks, process_groups, script  # noqa: E402

# The first statement takes away the directory that `-c` puts on the path, before it can shadow anything of ours.
_BOOTSTRAP = "import sys; sys.flags.safe_path or sys.path.pop(0); from phalanx_worker.runtime.cold import main; main()"


def command_line(python: str, flags: list[str], kind: str, argv: list[str]) -> list[str]:
    """What to execute for `python [flags] [-m] argv…`; `kind` is `script` or `module`."""
    return [python, *flags, "-c", _BOOTSTRAP, python, kind, *argv]


def is_command_line(argv: list[str]) -> bool:
    return _BOOTSTRAP in argv


def main() -> None:
    spelled, kind, name, *arguments = sys.argv[1:]
    sys.orig_argv = [spelled, *(["-m"] if kind == "module" else []), name, *arguments]
    marks.after_torch(_install)
    start = script.run_module if kind == "module" else script.run_script
    start(name, arguments, keep_modules=_STARTUP_MODULES)


def _install() -> None:
    marks.install()
    process_groups.install()
