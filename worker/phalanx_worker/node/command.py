"""How a command is run: forked from the warm process, executed directly, or through the shell, and why.

Owns the rule (design: "What the agent does with Ray"). Pure: knows no process.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from phalanx_worker.runtime import cold
from phalanx_worker.runtime.spec import Program

_SHELL_CHARACTERS = frozenset("|&;<>()$`\n*?[]~#!")
# fmt: off
_SHELL_WORDS = frozenset({
    ".", ":", "alias", "bg", "break", "case", "cd", "continue", "eval", "exec", "exit", "export", "fg", "for",
    "getopts", "hash", "if", "jobs", "local", "read", "readonly", "return", "set", "shift", "source", "test",
    "times", "trap", "type", "ulimit", "umask", "unalias", "unset", "until", "wait", "while", "{",
})
# fmt: on
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_PYTHON = re.compile(r"python(3(\.\d+)?)?$")

# Read when the interpreter, the C library or torch starts, so a process that has started already cannot honour them.
_IMPORT_TIME_PREFIXES = (
    *("LD_", "PYTHON", "MALLOC_", "GLIBC_", "MKL_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "ATEN_", "DNNL_", "ONEDNN_"),
    *("TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "LC_", "LANG"),
)
_READ_LATER = ("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "TORCH_NCCL_", "TORCH_HOME")


@dataclass(frozen=True)
class Launch:
    program: Program
    cold_reason: str = ""

    @property
    def warm(self) -> bool:
        return self.program.kind != "exec"

    @property
    def is_ours(self) -> bool:
        """Whether its script runs in an interpreter that Phalanx started, so that it can be watched from outside."""
        return self.warm or cold.is_command_line(self.program.argv)


def plan_launch(command: str, env: Mapping[str, str], *, python: str, version: str, warm_unfit: str) -> Launch:
    """Decide how `command` runs with the user's `env`.

    `python` is the warm process's interpreter (an absolute path), `version` its version as "3.11"; `warm_unfit` says
    why it cannot serve, "" if it can.
    Raises ValueError for a command that cannot be parsed or is empty.
    """
    if needs_shell(command):
        return Launch(_shell(command), "the command needs a shell")
    argv = shlex.split(command)
    if not argv:
        raise ValueError("the command is empty")
    if argv[0] in _SHELL_WORDS or _ASSIGNMENT.match(argv[0]):
        return Launch(_shell(command), "the command needs a shell")
    is_python = _is_python(argv[0], python)
    as_given = Program("exec", argv, name=argv[0], shell=not is_python)
    if not is_python:
        return Launch(as_given, f"{os.path.basename(argv[0])} is not Python")  # noqa: PTH119 - text, not a path
    if foreign := _foreign_reason(argv[0], env, version):
        return Launch(as_given, foreign)
    program = _warm_program(argv)
    if program is None:
        return Launch(as_given, "only `python script.py` and `python -m module` start warm")
    reason = _environment_reason(env) or warm_unfit
    return Launch(_cold(program, argv), reason) if reason else Launch(program)


def needs_shell(command: str) -> bool:
    """Whether an unquoted character of `command` means something to a shell that splitting into words would lose."""
    quote = ""
    characters = iter(command)
    for character in characters:
        if quote == "'":
            quote = "" if character == "'" else quote
        elif character == "\\":
            next(characters, "")
        elif quote == '"':
            if character in "$`":
                return True
            quote = "" if character == '"' else quote
        elif character in "'\"":
            quote = character
        elif character in _SHELL_CHARACTERS:
            return True
    return False


def _shell(command: str) -> Program:
    return Program("exec", ["/bin/sh", "-c", command], name="sh", shell=True)


def _is_python(word: str, python: str) -> bool:
    if "/" in word:
        return os.path.dirname(word) == os.path.dirname(python) and bool(_PYTHON.match(os.path.basename(word)))  # noqa: PTH119, PTH120
    return bool(_PYTHON.match(word))


def _foreign_reason(word: str, env: Mapping[str, str], version: str) -> str:
    """Why this may be a Python that has nothing of ours installed; "" if it is the node's."""
    minor = _PYTHON.match(word.rpartition("/")[2])
    if minor and minor[2] and f"3{minor[2]}" != version:
        return f"{word} is not the node's Python {version}"
    return "PATH is set, so `python` may be another one" if "PATH" in env and "/" not in word else ""


def _warm_program(argv: list[str]) -> Program | None:
    rest = argv[1:]
    if rest[:1] == ["-u"]:  # output is passed on line by line in any case
        rest = rest[1:]
    if rest[:1] == ["-m"] and len(rest) > 1:
        return Program("module", rest[1:], name=argv[0])
    if rest and not rest[0].startswith("-") and rest[0].endswith(".py"):
        return Program("script", rest, name=argv[0])
    return None


def _cold(program: Program, argv: list[str]) -> Program:
    flags = ["-u"] if "-u" in argv[1:2] else []
    return Program("exec", cold.command_line(argv[0], flags, program.kind, program.argv), name=argv[0])


def _environment_reason(env: Mapping[str, str]) -> str:
    for name in sorted(env):
        if name.startswith(_IMPORT_TIME_PREFIXES) and not name.startswith(_READ_LATER):
            return f"{name} is set, which matters when Python starts"
    threads = env.get("OMP_NUM_THREADS", "1")
    return "" if threads.isdigit() and int(threads) > 0 else "OMP_NUM_THREADS is not one number"
