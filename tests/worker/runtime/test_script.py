"""A script run inside a process sees what it would see in a fresh interpreter, and ends the same way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.runtime import cold

IN_PROCESS = (
    "import sys; startup = frozenset(sys.modules); sys.path.pop(0)\n"
    "from phalanx_worker.runtime import script\n"
    "kind, name, *arguments = sys.argv[1:]\n"
    "run = script.run_module if kind == '-m' else script.run_script\n"
    "run(name, arguments, keep_modules=startup)\n"
)

PROBE = """
import json, pickle, sys
class Mine: pass
seen = {
    "argv": sys.argv,  "path": sys.path, "name": __name__, "file": __file__, "package": __package__,
    "spec": __spec__ and __spec__.name, "builtins": type(__builtins__).__name__, "doc": __doc__,
    "pickled": type(pickle.loads(pickle.dumps(Mine()))) is Mine, "main": sys.modules["__main__"].Mine is Mine,
    "names": sorted(name for name in globals() if name.startswith("__")),
}
print(json.dumps(seen, indent=1))
"""

ENDINGS = {
    "plain": "print('done')",
    "exit code": "import sys; sys.exit(300)",
    "exit text": "raise SystemExit('why')",
    "no stdout": "import sys; print('hi', flush=True); sys.stdout = None",
    "closed stdout": "import sys; print('hi', flush=True); sys.stdout.close()",
    "exit none": "import sys; sys.exit()",
    "exception": "def broken():\n    return 1 / 0\nbroken()",
    "syntax": "x = = 1",
    "interrupt": "raise KeyboardInterrupt",
    "chained": "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('b') from error",
    "atexit": "import atexit; atexit.register(print, 'bye'); print('hi')",
    "thread": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print(later))).start()\nlater = 5",
    "excepthook": "import sys\nsys.excepthook = lambda kind, *_: print('hook', kind.__name__)\nraise OSError",
    "spawn": "import multiprocessing as m\ndef f(x): return x + 1\n"
    "if __name__ == '__main__':\n    with m.get_context('spawn').Pool(1) as pool: print(pool.map(f, [1]))",
}


# Both ways in which the runtime runs a script: in a process that was there before, and in one of its own.
ENTRANCES = {
    "warm": lambda words: ["-c", IN_PROCESS, *(words if words[0] == "-m" else ["script", *words])],
    "cold": lambda words: cold.command_line(
        sys.executable, [], *(("module", words[1:]) if words[0] == "-m" else ("script", words))
    )[1:],
}


def run(arguments: list[str], cwd: Path) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "pack").mkdir()
    for name in ("probe.py", "sub/probe.py", "pack/__init__.py", "pack/__main__.py", "pack/mod.py"):
        (tmp_path / name).write_text(PROBE if "__init__" not in name else "")
    return tmp_path


@pytest.mark.parametrize("entrance", ENTRANCES.values(), ids=ENTRANCES.keys())
@pytest.mark.parametrize(
    "words",
    [
        ["probe.py", "a", "--b"],
        ["sub/probe.py"],
        ["./probe.py"],
        ["-m", "probe", "x"],
        ["-m", "pack"],
        ["-m", "pack.mod"],
        ["missing.py"],
        ["-m", "missing"],
    ],
    ids=" ".join,
)
def test_script_sees_a_fresh_interpreter(tree: Path, words: list[str], entrance: Any) -> None:
    assert run(entrance(words), tree) == run(words, tree)


@pytest.mark.parametrize("entrance", ENTRANCES.values(), ids=ENTRANCES.keys())
@pytest.mark.parametrize("text", ENDINGS.values(), ids=ENDINGS.keys())
def test_script_ends_as_in_a_fresh_interpreter(tmp_path: Path, text: str, entrance: Any) -> None:
    (tmp_path / "ending.py").write_text(text)
    assert run(entrance(["ending.py"]), tmp_path) == run(["ending.py"], tmp_path)


def test_own_modules_shadow_loaded_ones_but_not_the_interpreters(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("MINE = 1")
    (tmp_path / "io.py").write_text("raise SystemError")
    (tmp_path / "main.py").write_text("import queue, io; print(queue.MINE, io.StringIO)")
    code = IN_PROCESS.replace("kind, name", "import queue\nkind, name", 1)
    assert run(["-c", code, "script", "main.py"], tmp_path) == run(["main.py"], tmp_path)
