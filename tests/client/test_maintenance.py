"""Maintenance windows from the command line and the SDK, against the real server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from phalanx.client import Client
from phalanx_server.actions.bootstrap import Bootstrapped
from phalanx_server.supervise import wait_until

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out
from played_cluster import PlayedCluster
from test_against_server import JOB, Run, Served, run
from test_steering import admin, served, tokens

__all__ = ["admin", "run", "served", "tokens"]  # fixtures


@pytest.fixture
def node(database: str, served: Served, tokens: Bootstrapped, admin: Client) -> Iterator[str]:
    """The name of one of the nodes of a cluster."""
    with PlayedCluster(database, served.url, tokens.cluster_token):
        wait_until(lambda: list(admin.nodes()), timeout_s=60, what="the node")
    yield next(iter(admin.nodes())).name


def test_a_window_on_the_command_line(run: Run, admin: Client, node: str) -> None:
    assert "no maintenance is planned" in run("maintenance").stderr
    words = ("--start", "+2h", "--for", "1.5h", "--reason", "new kernel")
    made = json.loads(run("maintenance", "create", node, *words, "-o", "json").stdout)
    start, end = (datetime.fromisoformat(made[name]) for name in ("starts_at", "ends_at"))
    assert end - start == timedelta(minutes=90)
    assert abs(start - datetime.now(UTC) - timedelta(hours=2)) < timedelta(minutes=1)
    listed = run("maintenance", "list").stdout
    assert made["id"] in listed and "planned" in listed and node in listed and "new kernel" in listed
    run("maintenance", "set", made["id"], "--for", "3h")
    assert admin.maintenance_window(made["id"]).ends_at == start + timedelta(hours=3)
    assert "has not begun" in run("maintenance", "end", made["id"], code=5).stderr
    run("maintenance", "set", made["id"], "--start", "2026-01-01T00:00:00Z")
    assert "over" in run("maintenance", "end", made["id"]).stdout
    assert run("maintenance", "list").stdout == "" and made["id"] in run("maintenance", "list", "--over").stdout
    assert "is deleted" in run("maintenance", "delete", made["id"]).stdout
    assert list(admin.maintenance_windows(over=True)) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--for", "1h"), "of which nodes?"),
        (("n0",), "when does it end?"),
        (("n0", "--for", "soon"), "--for is 'soon': expected a duration"),
        (("n0", "--for", "1h", "--end", "+2h"), "say the same"),
        (("n0", "--for", "9999999999d"), "--for is '9999999999d': expected a duration"),
        (("n0", "--for", "1h", "--start", "+9999999999d"), "--start is '9999999999d': expected a duration"),
        (("n0", "--end", "+3000000d"), "--end is '+3000000d': that is after the year 9999"),
        (("n0", "--end", "tomorrow"), "--end is 'tomorrow': expected a time"),
        (("n0", "--end", "2030-01-01T00:00:00"), "--end has no time zone"),
        (("--label", "rack", "--for", "1h"), "--label is 'rack': expected KEY=VALUE"),
        (("n0", "--for", "1h"), "there is no node 'n0'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(run: Run, words: tuple[str, ...], said: str) -> None:
    result = run("maintenance", "create", *words, code=2)
    assert said in " ".join(result.stderr.split())


def test_what_a_window_names_and_its_labels_can_be_taken_away(run: Run, admin: Client, node: str) -> None:
    start = datetime.now(UTC) + timedelta(hours=1)
    made = admin.create_maintenance(starts_at=start, ends_at=start + timedelta(hours=1), nodes=[node])
    run("maintenance", "set", made.id, "--no-nodes", "--label", "rack=r1")
    changed = admin.maintenance_window(made.id)
    assert (changed.nodes, changed.labels, changed.covers) == ([], {"rack": "r1"}, 2)
    assert "no node is named, and no label" in run("maintenance", "set", made.id, "--no-labels", code=2).stderr
    run("maintenance", "set", made.id, "--no-labels", "--node", node)
    changed = admin.maintenance_window(made.id)
    assert (changed.nodes, changed.labels, changed.covers) == ([node], {}, 1)
    assert admin.change_maintenance(made.id, nodes=[], labels={"rack": "r1"}).nodes == []
    for words in (("--node", node, "--no-nodes"), ("--label", "rack=r1", "--no-labels")):
        assert "contradict each other" in run("maintenance", "set", made.id, *words, code=2).stderr


def test_who_waits_for_it_is_told(
    run: Run, admin: Client, database: str, served: Served, tokens: Bootstrapped, node: str
) -> None:
    for each in admin.nodes():
        now = datetime.now(UTC)
        admin.create_maintenance(starts_at=now, ends_at=now + timedelta(hours=1), nodes=[each.name])
    job = admin.submit(JOB).id
    with PlayedCluster(database, served.url, tokens.cluster_token):
        wait_until(lambda: admin.job(job).hold, timeout_s=60, what="the word why it waits")
        hold = admin.job(job).hold
    assert hold is not None and hold.reason == "maintenance"
    assert "maintenance window that ends at" in " ".join(run("explain", job).stdout.split())
