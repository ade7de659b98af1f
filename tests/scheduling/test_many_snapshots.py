"""The properties of `test_properties` for hundreds of snapshots each, thousands in all, drawn as there."""

import pytest
import test_properties as properties
from hypothesis import given, settings
from hypothesis import strategies as st

MANY = settings(properties.QUICK, max_examples=180)


def many(prop, *drawn):
    """The same property, tried more often."""
    return pytest.mark.slow(MANY(given(*drawn)(prop.hypothesis.inner_test)))


cases = properties.cases
test_limits = many(properties.test_no_node_and_no_quota_is_over_committed_now_or_when_all_has_stopped, cases)
test_gangs = many(
    properties.test_a_gang_is_whole_on_ready_nodes_of_one_cluster_type_and_required_domain_or_absent, cases
)
test_holds = many(properties.test_every_queued_job_either_starts_or_is_held_with_words, cases)
test_order = many(
    properties.test_the_lists_in_another_order_give_the_same_plan, cases, st.randoms(use_true_random=False)
)
test_stopping = many(properties.test_while_jobs_are_stopping_planning_again_decides_nothing_new, cases)
test_rest = many(properties.test_plans_that_are_carried_out_come_to_rest, cases)
test_loops = many(properties.test_who_was_evicted_and_waits_again_starts_no_loop, cases)
test_disturbed = many(properties.test_only_those_are_disturbed_who_may_be, cases)
test_spared = many(properties.test_no_victim_can_be_spared, cases)
test_kept = many(properties.test_what_is_kept_for_a_waiting_job_is_there_when_all_has_stopped, cases)
test_changes = many(properties.test_a_planner_fed_with_changes_says_what_a_fresh_pass_says, st.data())
