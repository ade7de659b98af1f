"""What somebody meant who mistyped a name."""

from __future__ import annotations

import time

import pytest
from phalanx_server.domain.tenant import nearest

FLEET = [f"gpu-node-{n:05}" for n in range(20_000)]


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("reserch", ["vision", "research"], "research"),
        ("n00", ["n0", "n1"], "n0"),
        ("elsewhere", ["n0", "n1"], None),
        ("anything", [], None),
        ("gpu-node-001x23", FLEET, "gpu-node-00123"),
        ("gpunode-00123", FLEET, "gpu-node-00123"),
        ("gpu-node-01324x", FLEET, "gpu-node-01324"),
        ("something", FLEET, None),
    ],
)
def test_the_nearest_name(typed: str, known: list[str], meant: str | None) -> None:
    assert nearest(typed, known) == meant


def test_among_very_many_alike_it_is_found_in_a_moment() -> None:
    begin = time.process_time()
    nearest("gpu-node-001x23", FLEET)
    assert time.process_time() - begin < 0.25
