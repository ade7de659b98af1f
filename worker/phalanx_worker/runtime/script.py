"""Run a Python script or module in this process exactly as a fresh `python` would, and end as it would.

Owns `__main__`, `sys.argv`, `sys.path[0]`, the traceback and the exit status. Knows nothing of ranks. Never returns:
the process ends by `os._exit` after threads, exit handlers and buffers, because torch's Reducer can hang in the
interpreter's own finalization (its destructor joins the gloo thread while it holds the GIL which that thread wants).
"""

from __future__ import annotations

import atexit
import builtins
import os
import runpy
import signal
import sys
import threading
import traceback
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NoReturn

_OWN_FILES = (__file__, runpy.__file__, "<frozen runpy>")


def run_script(path: str, arguments: list[str], *, keep_modules: frozenset[str]) -> NoReturn:
    """As `python PATH ARGUMENTS…`. Modules in `keep_modules` are those that a fresh interpreter loads by itself."""
    exit_as_python(lambda: _execute_file(path, arguments, keep_modules))


def run_module(name: str, arguments: list[str], *, keep_modules: frozenset[str]) -> NoReturn:
    """As `python -m NAME ARGUMENTS…`."""
    exit_as_python(lambda: _execute_module(name, arguments, keep_modules))


def _execute_file(path: str, arguments: list[str], keep_modules: frozenset[str]) -> None:
    full_path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118 - "./" stays, as the interpreter leaves it
    loader = SourceFileLoader("__main__", full_path)
    sys.argv = [path, *arguments]
    try:
        source = loader.get_data(full_path)
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: can't open file {full_path!r}: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    directory = os.path.dirname(os.path.realpath(full_path))  # noqa: PTH120 - as the interpreter spells it
    _search_first(directory)
    forget_shadowed(directory, keep_modules)
    module = _fresh_main(loader)
    module.__dict__.update(__file__=full_path, __cached__=None)
    exec(compile(source, full_path, "exec", dont_inherit=True), module.__dict__)


def _execute_module(name: str, arguments: list[str], keep_modules: frozenset[str]) -> None:
    directory = str(Path.cwd())
    sys.argv = ["-m", *arguments]
    _search_first(directory)
    forget_shadowed(directory, keep_modules)
    _fresh_main(None)
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # what the interpreter itself calls for -m


def _fresh_main(loader: Any) -> types.ModuleType:
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __loader__=loader, __spec__=None, __annotations__={})
    sys.modules["__main__"] = module
    return module


def _search_first(directory: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, directory)


def forget_shadowed(directory: str, keep_modules: frozenset[str]) -> None:
    """Let the user's own modules win over ones of the same name that the warm process has already loaded.

    In a fresh interpreter the script's directory is searched first, so `queue.py` beside the script is what
    `import queue` gives. Whoever imported the other one before keeps it.
    """
    own = {entry.name.removesuffix(".py") for entry in _entries(directory) if _is_module(entry)} - keep_modules
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _is_module(entry: os.DirEntry[str]) -> bool:
    if entry.name.endswith(".py"):
        return True
    return entry.is_dir() and Path(entry.path, "__init__.py").exists()


def exit_as_python(body: Any) -> NoReturn:
    """Call it, and end with the status and the last words that Python would have ended with."""
    code: int
    try:
        body()
        code = 0
    except SystemExit as request:
        code = _exit_code(request)
    except KeyboardInterrupt as error:
        _show(error)
        code = -signal.SIGINT
    except BaseException as error:
        _show(error)
        code = 1
    _leave(code)


def _exit_code(request: SystemExit) -> int:
    if request.code is None:
        return 0
    if isinstance(request.code, int):
        return request.code & 0xFF
    print(request.code, file=sys.stderr)
    return 1


def _show(error: BaseException) -> None:
    """Print the traceback without the frames that started the script, through the script's own excepthook."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OWN_FILES:
        frames = frames.tb_next
    try:
        sys.excepthook(type(error), error.with_traceback(frames), frames)
    except BaseException:
        traceback.print_exc()


def _leave(code: int) -> NoReturn:
    for step in (threading._shutdown, atexit._run_exitfuncs, _flush_stdout, _flush_stderr):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException as error:
            if isinstance(error, BrokenPipeError):
                continue
            _show(error)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _flush_stdout() -> None:
    if sys.stdout is not None and not getattr(sys.stdout, "closed", False):  # as the interpreter: a script may do both
        sys.stdout.flush()


def _flush_stderr() -> None:
    if sys.stderr is not None and not getattr(sys.stderr, "closed", False):
        sys.stderr.flush()
