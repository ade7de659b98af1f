"""A pass turns most of the queue down quickly. Here the quick answer would be the wrong one."""

from snapshots import (
    NOW,
    evicted_by,
    expected_by,
    held_by,
    moved_by,
    node,
    plan_of,
    queued,
    resized_by,
    running,
    starts_of,
    tenant,
)

LOWER_OR_NEWER = {"within_tenant": "lower_or_newer_equal"}


def test_a_short_job_may_evict_where_a_long_one_of_its_class_was_in_the_way_of_what_is_reserved():
    jobs = [
        running("v", "n0", 8, started_at=0, time_limit_s=2000),
        queued("r", 8, tenant="u", priority=5, time_limit_s=1000),
        queued("long", 8, priority=1, submitted_at=10, time_limit_s=5000),
        queued("short", 8, priority=1, submitted_at=20, time_limit_s=100),
    ]
    plan = plan_of(jobs, [node("n0")], [tenant("t"), tenant("u")])
    assert evicted_by(plan) == {"v": "within_tenant"}
    assert held_by(plan) == {"r": "capacity", "long": "capacity", "short": "victims"}


def test_an_older_job_may_evict_a_newer_one_though_it_stands_behind_one_that_may_not():
    jobs = [
        running("v", "n0", 8, submitted_at=500, started_at=600, predicted_s=1e6),
        queued("newest", 8, submitted_at=900, predicted_s=100),
        queued("oldest", 8, submitted_at=0, predicted_s=1000),
    ]
    plan = plan_of(jobs, [node("n0")], [tenant("t", preemption=LOWER_OR_NEWER)], policy={"order": "shortest"})
    assert plan.preemptions[0].for_job == "oldest"


def test_an_expected_start_is_found_behind_very_many_moments_that_do_not_help():
    jobs = [running(f"b{i}", f"m{i}", started_at=0, predicted_s=NOW + 1 + i, priority=10) for i in range(300)]
    jobs += [
        running("big", "n0", 8, started_at=0, predicted_s=NOW + 0.5, priority=10),
        queued("next", 8, priority=9, predicted_s=500),
        queued("w", 1, 8, predicted_s=700, topology={"required": "rack"}),
    ]
    nodes = [node("n0", labels={"rack": "r"}), *(node(f"m{i}", 1, labels={"rack": f"r{i}"}) for i in range(300))]
    plan = plan_of(jobs, nodes, policy={"topology_levels": ["rack"]})
    assert expected_by(plan) == {"next": NOW + 0.5, "w": NOW + 500.5}


def test_a_window_elsewhere_hides_no_expected_start():
    tenants = [tenant("o"), tenant("a", "o", h100={"nominal": 8, "borrowing_limit": 0}), tenant("b", "o", h100=400)]
    jobs = [running(f"b{i}", f"m{i}", tenant="b", started_at=0, predicted_s=NOW + 1 + i) for i in range(300)]
    jobs += [
        running("ra", "n0", 8, tenant="a", started_at=0, predicted_s=NOW + 500),
        queued("w", 8, tenant="a", predicted_s=100),
    ]
    nodes = [node("n0"), node("n1"), node("x", 1), *(node(f"m{i}", 1) for i in range(300))]
    window = {"nodes": ["x"], "starts_at": 1e6, "ends_at": 2e6}
    assert expected_by(plan_of(jobs, nodes, tenants, maintenance=[window])) == {"w": NOW + 500}


def test_a_job_that_lacks_cpus_may_evict_the_cpu_job_that_has_them():
    jobs = [running("cpu", "n0", 0, cpus_per_replica=48), queued("gpu", 8, priority=1, cpus_per_replica=96)]
    assert evicted_by(plan_of(jobs, [node("n0", cpus=96)])) == {"cpu": "within_tenant"}


def test_a_quota_of_cpus_is_taken_back_from_jobs_on_other_gpus():
    tenants = [
        tenant("o"),
        tenant("a", "o", cpu=64, h100=8, a100=0),
        tenant("b", "o", cpu=0, a100=8),
    ]
    nodes = [node("n0", cpus=96), node("n1", gpu_type="a100", cpus=96)]
    jobs = [
        running("theirs", "n1", 8, tenant="b", gpu_types=["a100"], cpus_per_replica=64),
        queued("mine", 8, tenant="a", gpu_types=["h100"], cpus_per_replica=64),
    ]
    assert evicted_by(plan_of(jobs, nodes, tenants)) == {"theirs": "reclaim"}


def test_a_fair_share_counts_what_the_own_side_gives_up_first():
    tenants = [tenant("o", h100=20), tenant("a", "o", h100=0), tenant("b", "o", h100=0)]
    jobs = [
        running("e", {"n0": 8}, tenant="a", min_replicas=2, max_replicas=8),
        running("b1", "n0", 6, tenant="b"),
        running("b2", "n0", 6, tenant="b"),
        queued("w", 9, tenant="a"),
    ]
    plan = plan_of(jobs, [node("n0", 20)], tenants, policy={"fair_sharing": True})
    assert (resized_by(plan), list(evicted_by(plan).values())) == ({"e": 5}, ["fair_share"])


def test_two_elastic_jobs_are_not_given_the_same_gpus():
    """`x` is led on to 12 by what that would gain, and reaches 11."""
    at_once = {"topology": {"required": "node"}, "started_at": 0}
    steps = {"4": 4, "8": 8, "11": 8, "12": 60}
    jobs = [
        running("x", {"n0": 4}, min_replicas=4, max_replicas=12, speedup=steps, **at_once),
        running("y", {"n2": 1}, min_replicas=1, max_replicas=8, speedup={"1": 1, "8": 1.9}, **at_once),
    ]
    plan = plan_of(jobs, [node("n0", 8), node("n1", 11), node("n2", 1)])
    taken: dict[str, int] = {}
    for row in plan.resizes:
        for item in row.placement:
            taken[item.node] = taken.get(item.node, 0) + item.replicas
    assert taken == {"n0": 8, "n1": 8}


def test_idle_gpus_are_not_kept_for_a_size_that_is_not_reached():
    jobs = [
        running("a", {"n0": 6}, started_at=0, min_replicas=6, max_replicas=12, speedup={"6": 3, "10": 3, "12": 30}),
        running("b", {"n0": 2}, started_at=0, min_replicas=2, max_replicas=6, speedup={"2": 2, "6": 3}),
    ]
    plan = plan_of(jobs, [node("n0", 12)])
    assert (resized_by(plan), starts_of(plan), moved_by(plan)) == ({"b": 6}, {}, {})
