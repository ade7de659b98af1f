"""What a job's Python has on top of the node's own: lines as pip's requirements files have them.

Owns which lines are taken: requirements by name and version or by URL (PEP 508, read by `packaging`), with hashes
behind them or without, and the few options that say where packages come from. What points into a file system (`-r`,
`-e`, `./path`) is refused: a line must mean the same on every node. Pure; refuses to know how an environment is built.
"""

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement

LINES_MAX = 500
LINE_MAX_CHARS = 8_000
ALL_MAX_CHARS = 64 << 10  # a thousand jobs of one request may each get a copy

_WITH_URL = frozenset({"--index-url", "-i", "--extra-index-url", "--find-links", "-f"})
_WITH_NAME = frozenset({"--only-binary", "--no-binary"})
_ALONE = frozenset({"--pre", "--prefer-binary", "--no-index"})
_HASHES = re.compile(r"(\s+--hash=sha(256:[0-9a-f]{64}|384:[0-9a-f]{96}|512:[0-9a-f]{128}))+$")
_COMMENT = re.compile(r"(^|\s)#.*$")


def clean_requirements(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines without comments, blanks and repetitions, in their order. Raises ValueError naming the line."""
    found = dict.fromkeys(cleaned for line in lines if (cleaned := _COMMENT.sub("", line).strip()))
    if len(found) > LINES_MAX:
        raise ValueError(f"{len(found)} lines, at most {LINES_MAX}")
    if (chars := sum(map(len, found))) > ALL_MAX_CHARS:
        raise ValueError(f"{chars} characters in all, at most {ALL_MAX_CHARS}")
    for line in found:
        problem = _problem(line)
        if problem:
            raise ValueError(f"{line[:80]!r} {problem}")
    return tuple(found)


def _problem(line: str) -> str:
    """What is wrong with a line; "" if nothing is."""
    if len(line) > LINE_MAX_CHARS or not line.isprintable():
        return f"is longer than {LINE_MAX_CHARS} characters or holds a control character"
    if line.endswith("\\"):
        return "ends in a backslash: pip would read the next line as part of it"
    if line.startswith("-"):
        return _problem_of_option(line)
    if line.startswith((".", "/", "~")) or "file:" in line.lower():
        return "is a path: every node must be able to fetch it, so name a package or an http(s) URL"
    named = _HASHES.sub("", line)
    try:
        requirement = Requirement(named)
    except InvalidRequirement as error:
        return f"is no requirement: {str(error).splitlines()[0]}"
    except RecursionError:
        return "is no requirement: its marker is nested too deep"
    if any(word.startswith("-") for word in named.split()):  # pip looks for them first, even in a marker's text
        return "has an option behind the requirement, which is not taken here"
    return _problem_of_url(requirement.url) if requirement.url else ""


def _problem_of_option(line: str) -> str:
    option, _, value = line.replace("=", " ", 1).partition(" ")
    value = value.strip()
    if option in _WITH_URL | _WITH_NAME and len(value.split()) > 1:  # pip would read more options there
        return f"takes one value, but has {value!r:.80}"
    if option in _WITH_URL:
        return _problem_of_url(value)
    if option in _WITH_NAME:
        return "" if value else "names no package"
    if option in _ALONE:
        return f"takes no value, but has {value!r:.40}" if value else ""
    known = ", ".join(sorted(_WITH_URL | _WITH_NAME | _ALONE))
    return f"has an option that is not taken here (these are: {known})"


def _problem_of_url(url: str) -> str:
    try:
        parts = urlsplit(url.removeprefix("git+"))
        named, secret = parts.hostname, parts.username or parts.password  # a token stands where a user would
    except ValueError:
        named = secret = None
    if not named or not url.startswith(("https://", "http://", "git+https://")):
        return "needs an http(s) URL"
    return "has a user or password in its URL, which everybody who sees the job would see" if secret else ""
