"""How a rank ends itself for what a check found: one of each node speaks, the others wait to be asked."""

import pytest
from phalanx import job
from phalanx_worker.training.health import telling
from phalanx_worker.training.health.telling import Finding, Unhealthy, end

FOUND = Finding("corruption", 20, "the parameters of rank 1 differ", blamed=1)


@pytest.fixture
def marks(monkeypatch):
    marks = []
    monkeypatch.setenv("PHALANX_JOB_ID", "job_1")
    monkeypatch.setattr(telling.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(job, "mark", lambda kind, **data: marks.append((kind, data["action"], data["blamed"])))
    monkeypatch.setattr(telling.time, "sleep", lambda _: marks.append("waits"))
    return marks


def test_the_first_rank_of_a_node_says_why_and_ends(marks, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(Unhealthy, match="the parameters of rank 1 differ: restart"):
        end(FOUND, "restart")
    assert marks == [("health", "restart", 1)]


def test_the_others_say_nothing_and_end_as_soon_as_they_are_asked(marks, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(job, "should_stop", lambda: len(marks) == 3)
    with pytest.raises(Unhealthy):
        end(FOUND, "restart")
    assert marks == ["waits"] * 3


def test_or_after_a_while_where_nobody_asks(marks, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(job, "should_stop", lambda: False)
    monkeypatch.setattr(telling.time, "monotonic", iter(range(100)).__next__)
    with pytest.raises(Unhealthy):
        end(FOUND, "restart")
    assert 3 <= len(marks) <= 5
