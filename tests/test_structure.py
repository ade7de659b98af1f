"""The shape of the project: import direction, a light client, and names that users may have for themselves."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

# What `import phalanx` may not bring along: it stands in every training script.
HEAVY = {"torch", "ray", "pydantic", "httpx", "typer", "rich", "yaml", "numpy"}


def run(*argv: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(arg) for arg in argv], cwd=cwd, capture_output=True, text=True)


def test_imports_point_one_way():
    done = run(BIN / "lint-imports")
    assert done.returncode == 0, done.stdout


def test_importing_the_client_is_light():
    done = run(sys.executable, "-c", "import phalanx, sys; print(' '.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_nothing_of_ours_has_a_name_that_users_have(tmp_path):
    for name in ("client", "server", "worker"):
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        assert run(sys.executable, "-c", probe, cwd=tmp_path).returncode == 0, name


def test_packages_have_empty_inits():
    inits = [path for part in ("server", "worker") for path in (ROOT / part).rglob("__init__.py")]
    assert inits
    assert [str(path) for path in inits if path.stat().st_size] == []


def test_every_target_that_the_documents_name_exists():
    text = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert named >= {"demo", "setup", "test", "test-slow", "check"}, "the pattern finds them"
    listed = {line.split()[0] for line in run("make", "help").stdout.splitlines()}
    assert named <= listed


def test_benchmarks_that_can_be_quick_are_told_to_be():
    said = run("make", "-n", "bench", "shapes", "BENCH_FLAGS=--quick").stdout
    told = dict(re.findall(r"python benchmarks/(\w+)\.py ?(.*)", said))
    quick = {name for name in told if '"--quick"' in (ROOT / "benchmarks" / f"{name}.py").read_text()}
    assert quick == {"pass_speed", "admission"} == {name for name, flags in told.items() if flags == "--quick"}
    assert "benchmarks/$name.py --quick" in said


def test_the_distribution_has_its_three_packages():
    assert all(importlib.util.find_spec(name) for name in ("phalanx", "phalanx_server", "phalanx_worker"))
