"""What a pattern of paths means."""

from __future__ import annotations

import pytest
from phalanx.globs import matcher, matches


@pytest.mark.parametrize(
    ("pattern", "fits", "not_fits"),
    [
        ("*.pt", ["model.pt", ".pt", "dir.pt/below"], ["out/model.pt", "model.ptx"]),
        ("out", ["out", "out/a", "out/a/b"], ["outer", "a/out"]),
        ("out/", ["out/a"], ["outer"]),
        ("./out", ["out/a"], []),
        ("out/**", ["out/a", "out/a/b"], ["outer/a"]),
        ("out/*", ["out/a", "out/a/b"], ["a/out"]),
        ("**/*.txt", ["a.txt", "a/b.txt", "a/b/c.txt"], ["a.tx", "a.txt.gz"]),
        ("logs/**/err?.log", ["logs/err1.log", "logs/a/b/err2.log"], ["logs/err.log", "err1.log"]),
        ("a/**/b/**/c", ["a/b/c", "a/x/b/y/z/c"], ["a/c", "b/c"]),
        ("**", ["a", "a/b"], []),
        (".", ["a", "a/b"], []),
        ("[ab].txt", ["a.txt", "b.txt"], ["c.txt", "[ab].txt"]),
        ("a[!b]c", ["axc"], ["abc", "a/c"]),
        ("[", ["["], ["a"]),
    ],
)
def test_what_fits(pattern: str, fits: list[str], not_fits: list[str]) -> None:
    assert [path for path in [*fits, *not_fits] if matches(matcher([pattern]), path)] == fits


def test_any_of_several_will_do_and_none_fits_nothing() -> None:
    both = matcher(["*.pt", "logs/**"])
    assert [path for path in ["a.pt", "logs/a", "b"] if matches(both, path)] == ["a.pt", "logs/a"]
    assert not matches(matcher([]), "a")


def test_a_walk_learns_where_nothing_can_fit() -> None:
    at_top = matcher(["out/*.pt", "*.txt"])
    assert at_top.enter("out").may_fit and not at_top.enter("out").fits
    assert not at_top.enter("src").may_fit


def test_many_stars_take_no_time() -> None:
    assert not matches(matcher(["*a" * 200 + "b"]), "a" * 1000)
