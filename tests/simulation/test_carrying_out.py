"""A plan is carried out in two steps, whatever it says: here a script decides in the planner's place."""

import pytest
from phalanx_server.domain.reason import WaitsForVictims
from phalanx_server.scheduling.plan import HoldGroup, Migration, Plan, Preemption, Resize, Start
from phalanx_server.scheduling.snapshot import PlacementItem, Policy, Seat
from phalanx_server.simulation import replay as replaying
from phalanx_server.simulation.figures import figures_of, summary_of
from phalanx_server.simulation.replay import Rules, Stuck, replay
from phalanx_server.simulation.trace import Cluster, Pool, TraceJob

FOUR = Cluster("four", (Pool(2, 2, "g"),))
N0, N1 = "g-00-0000", "g-00-0001"
RULES = Rules(policy=Policy(restart_s=4.0), stop_s=1.0, min_runtime_s=2.0)
A, B = (TraceJob(id=i, submit_s=s, duration_s=10.0, gpus=2, model="m") for i, s in (("a", 0.0), ("b", 3.0)))


def on(node, replicas=2):
    return (PlacementItem(node, replicas),)


class Script:
    """Plans by time, each of them made once; it remembers what it is told."""

    def __init__(self, plans):
        self.plans, self.told = dict(plans), []

    def __call__(self, snapshot):
        self.nodes = snapshot.nodes
        return self

    def apply(self, changes):
        self.told.append((changes.now, {job.id: job for job in changes.jobs}, changes.removed_jobs))
        return self.plans.pop(changes.now, Plan())

    def at(self, now, job):
        """What it was told last of the job at that time."""
        return next(jobs[job] for at, jobs, _ in reversed(self.told) if at == now and job in jobs)


@pytest.fixture
def run(monkeypatch):
    def run(plans, *trace, rules=RULES):
        script = Script(plans)
        monkeypatch.setattr(replaying, "Planner", script)
        return replay(trace, FOUR, rules), script

    return run


def attempts(done, job):
    return [(a.began_at, a.ended_at, a.replicas) for c in done.courses if c.job.id == job for a in c.attempts]


def test_an_evicted_job_stops_waits_and_goes_on_from_its_checkpoint(run):
    kept = Seat(gpu_type="g", placement=on(N0))
    done, script = run(
        {
            0: Plan(starts=(Start("a", "g", 2, on(N0)),)),
            3: Plan(
                preemptions=(Preemption("a", "b", "within_tenant", 6.0),),
                hold_groups=(HoldGroup(("b",), WaitsForVictims(("a",), 7.0), kept),),
            ),
            4: Plan(starts=(Start("b", "g", 2, on(N0)),)),
            14: Plan(starts=(Start("a", "g", 2, on(N0)),)),
        },
        A,
        B,
    )
    assert attempts(done, "b") == [(4, 14, 2)]
    assert attempts(done, "a") == [(0, 4, 2), (14, 25, 2)], "3 s done before the stop, 7 s left, 4 s to restart"
    at_3 = script.at(4, "b")
    assert (at_3.state, at_3.kept) == ("queued", kept), "a queued job carries what is kept for it"
    waiting = script.at(4, "a")
    assert (waiting.state, waiting.done_s, waiting.placement, waiting.for_job) == ("queued", 3, (), None)
    figures = figures_of([summary_of(done)])
    assert (figures["preemptions"], figures["lost_gpu_s"]) == (1, 2 * 1 + 2 * 4), "stopping and restarting, on 2 GPUs"
    assert figures["avg_wait_s"] == (10 + 1) / 2


def test_a_stopping_job_is_told_with_whom_it_stops_for(run):
    c = TraceJob(id="c", submit_s=3.5, duration_s=1.0, gpus=1)
    done, script = run(
        {
            0: Plan(starts=(Start("a", "g", 2, on(N0)),)),
            3: Plan(preemptions=(Preemption("a", "b", "reclaim", 6.0),)),
            4: Plan(starts=(Start("b", "g", 2, on(N0)), Start("a", "g", 2, on(N1)))),
            14: Plan(starts=(Start("c", "g", 1, on(N0, 1)),)),
        },
        A,
        B,
        c,
    )
    stopping = script.at(3.5, "a")
    assert (stopping.state, stopping.for_job, stopping.placement) == ("stopping", "b", on(N0))
    assert stopping.protected_until == 2.0
    assert [course.ended_at for course in done.courses] == [4 + 4 + 7, 14, 15]


def test_a_resized_job_goes_on_at_its_next_at_another_speed(run):
    rules = Rules(policy=Policy(restart_s=4.0), stop_s=0.0, profiles={"m": {1: 20.0, 2: 10.0, 4: 8.0}})
    wide = (PlacementItem(N0, 2), PlacementItem(N1, 2))
    done, script = run(
        {
            0: Plan(starts=(Start("a", "g", 1, on(N0, 1)),)),
            3: Plan(resizes=(Resize("a", None, 4, wide),)),
        },
        A,
        TraceJob(id="b", submit_s=3.0, duration_s=1.0, gpus=3),
        rules=rules,
    )
    # 20 s of work on one GPU: 3 are done by 3, the other 17 go at 20 / 8 a second, after 4 s.
    assert attempts(done, "a") == [(0, 3, 1), (3, 3 + 4 + 17 / 2.5, 4)]
    job = script.at(3, "a")
    assert (job.state, job.placement, job.last_resized_at, job.started_at) == ("running", wide, 3, 3)
    assert (job.replicas, job.min_replicas, job.max_replicas) == (2, 1, 4)
    assert job.speedup == {"1": 1.0, "2": 2.0, "4": 2.5}
    figures = figures_of([summary_of(done)])
    assert (figures["resizes"], figures["lost_gpu_s"], figures["avg_jct_s"]) == (1, 16, 13.8)


def test_a_moved_job_holds_both_places_until_it_runs_at_the_second(run):
    rules = Rules(policy=Policy(restart_s=0.0), stop_s=1.0)
    done, script = run(
        {
            0: Plan(starts=(Start("a", "g", 2, on(N0)),)),
            3: Plan(migrations=(Migration("a", "b", on(N1)),)),
            4: Plan(starts=(Start("b", "g", 2, on(N0)),)),
        },
        A,
        B,
        TraceJob(id="c", submit_s=3.5, duration_s=1.0, gpus=4),
        rules=rules,
    )
    assert script.at(3.5, "a").next == Seat(gpu_type="g", placement=on(N1))
    moved = script.at(4, "a")
    assert (moved.state, moved.placement, moved.next) == ("running", on(N1), None)
    assert [a[:2] for a in attempts(done, "a")] == [(0, 4), (4, 11)]
    assert done.migrations == 1


def test_what_is_no_longer_kept_is_taken_back(run):
    kept = Seat(gpu_type="g", placement=on(N0))
    _, script = run(
        {
            0: Plan(hold_groups=(HoldGroup(("a",), WaitsForVictims((), 1.0), kept),)),
            3: Plan(starts=(Start("b", "g", 2, on(N0)),)),
            13: Plan(starts=(Start("a", "g", 2, on(N0)),)),
        },
        A,
        B,
    )
    assert script.at(1, "a").kept == kept
    assert script.at(3, "a").kept is None, "the pass at 1 kept nothing for it"


def test_a_pass_comes_when_the_plan_expects_a_start_and_when_a_protection_ends(run):
    hold = HoldGroup(("b",), WaitsForVictims(("a",), 5.0))
    _, script = run(
        {
            0: Plan(starts=(Start("a", "g", 2, on(N0)),)),
            3: Plan(hold_groups=(hold,)),
            10: Plan(starts=(Start("b", "g", 2, on(N0)),)),
        },
        A,
        B,
        rules=Rules(min_runtime_s=4.0),
    )
    assert [now for now, _, _ in script.told] == [0, 3, 4, 10]


def test_a_planner_that_never_comes_to_rest_is_an_error(monkeypatch):
    class Restless(Script):
        def apply(self, changes):
            jobs = {job.id: job for job in changes.jobs}
            if "a" in jobs and jobs["a"].state == "queued":
                return Plan(starts=(Start("a", "g", 2, on(N0)),), preemptions=(Preemption("a", "b", "reclaim", 0.0),))
            return Plan()

    monkeypatch.setattr(replaying, "Planner", Restless({}))
    with pytest.raises(Stuck, match="at 0 s planning never comes to rest"):
        replay([A, TraceJob(id="b", submit_s=0.0, duration_s=1.0, gpus=4)], FOUR, Rules())
