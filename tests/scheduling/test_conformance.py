"""The conformance cases, run by their own program against `phalanx plan`, as somebody outside would run them."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases"

# What this version must get right. The others need preemption, reservations, elasticity or fair sharing.
BUILT = [
    "a-01-r4", "a-02", "a-08", "a-11", "c-04", "fs-03", "fs-16b", "fs-21", "g-01", "g-types-1",
    "g-types-quota-1", "h-array-1", "h-impossible-1", "h-maintenance-1", "h-reasons-1", "h-space-1", "hv-01",
    "hv-02", "k-h04", "k-h11", "k-p04", "k-p09", "k-p20", "k-p23", "k-r13797", "k-s01", "k-s04", "k-s05",
    "k-s18", "k-s19", "k-s20b", "kt-03", "n-avoid-1", "n-cluster-1", "n-lost-1", "n-share-tenant", "r-03",
    "r-06", "s-for-1", "s-next-1", "sl-03", "t-01", "t-04", "t-05", "t-07", "t-09", "t-12", "t-13b",
    "u-quota-1", "u-share-1",
]  # fmt: skip

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the conformance cases are not at {CASES}")


def run_cases(*only: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "phalanx"), "plan"]
    chosen = [word for name in only for word in ("--only", name)]
    argv = [sys.executable, str(CASES / "check.py"), str(CASES), "--batch", "--command", shlex.join(command), *chosen]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def test_every_case_named_here_exists():
    assert [name for name in BUILT if not (CASES / f"{name}.json").is_file()] == []


def test_the_cases_that_are_built_pass():
    done = run_cases(*BUILT)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{len(BUILT)} passed, 0 failed"), done.stdout
