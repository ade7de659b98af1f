"""Ranks that take no step any more, and ranks that end themselves for what a check of their own found."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import offences
from phalanx_worker.protocol import Health

pytestmark = pytest.mark.asyncio(loop_scope="session")

STEPS = """
    import os, threading, time
    import phalanx
    for step in range(8):
        phalanx.report(step=step)
        time.sleep(0.02)
    def wait_for_ever():
        threading.Event().wait()
    if os.environ["RANK"] == "0":
        phalanx.report(step=8)
    wait_for_ever()
"""


def rule(action: str) -> Health:
    return Health(hang=action, hang_factor=2.0, hang_at_least_s=0.5)


async def test_a_group_that_hangs_is_ended_and_its_stacks_are_kept(workbench: Any) -> None:
    attempt = workbench.attempt(f"python {workbench.script(STEPS)}", ranks=2, health=rule("restart"))
    exits = await attempt.run()
    assert [(end["signal"], end["fault"], end["final"]) for end in exits] == [(signal.SIGKILL, "hang", False)] * 2
    assert exits[1]["reason"].startswith("took no step for ")
    assert exits[0]["reason"].startswith("was ended because rank 1 took no step for ")
    assert (await attempt.group())["first_failed_rank"] == 1
    (mark,) = workbench.server.marks(attempt.id, "health")
    assert (mark["data"]["check"], mark["data"]["action"], mark["data"]["blamed"]) == ("hang", "restart", 1)
    assert "the stacks of 2 of its 2 ranks here are in stacks/attempt-1-" in mark["data"]["message"]
    stacks = {path: body for (of, _, path), body in workbench.server.outputs.items() if of == attempt.id}
    assert sorted(path.rpartition("/")[2] for path in stacks) == ["rank-0.txt", "rank-1.txt"]
    assert all(b"wait_for_ever" in body for body in stacks.values())


async def test_a_hang_may_only_be_told(workbench: Any) -> None:
    attempt = await workbench.attempt(f"python {workbench.script(STEPS)}", health=rule("warn")).start()
    await workbench.server.until(lambda: workbench.server.marks(attempt.id, "health"))
    assert (await attempt.group(state="running"))["hung"]
    await attempt.runners[0].kill_group(attempt.id)
    assert [end["fault"] for end in await attempt.exits()] == [""]
    assert len(workbench.server.marks(attempt.id, "health")) == 1


async def test_a_group_that_was_killed_while_its_hang_was_looked_into_is_not_ended_for_it(workbench: Any) -> None:
    attempt = await workbench.attempt(f"python {workbench.script('import time; time.sleep(60)')}").start()
    runner, said = attempt.runners[0], []
    (group,) = [group for group in runner._groups() if group.order.attempt_id == attempt.id]
    await runner.kill_group(attempt.id)
    await attempt.exits()
    group._events = replace(group._events, put=said.append)
    group.fail(offences.hang("took no step for 300 s", rank=0, final=False))
    assert said == [] and group.blame.offence is None


async def test_a_hang_may_end_the_job_for_good(workbench: Any) -> None:
    exits = await workbench.attempt(f"python {workbench.script(STEPS)}", health=rule("stop")).run()
    assert [(end["fault"], end["final"]) for end in exits] == [("hang", True)]


async def test_nobody_is_blamed_where_all_came_as_far(workbench: Any) -> None:
    script = workbench.script(STEPS.replace('if os.environ["RANK"] == "0":', "if False:"))
    attempt = workbench.attempt(f"python {script}", ranks=2, health=rule("restart"))
    assert {end["fault"] for end in await attempt.run()} == {"hang"}
    assert (await attempt.group())["first_failed_rank"] is None


async def test_another_node_keeps_its_stacks_when_asked(workbench: Any) -> None:
    attempt = await workbench.attempt(f"python {workbench.script('import time; time.sleep(60)')}").start()
    await attempt.runners[0].keep_stacks(attempt.id)
    await workbench.server.until(lambda: workbench.server.marks(attempt.id, "note"))
    await attempt.runners[0].stop_group(attempt.id, 5.0)
    await attempt.exits()
    (body,) = [body for (of, _, _), body in workbench.server.outputs.items() if of == attempt.id]
    assert b"MainThread" in body


@pytest.mark.parametrize(("action", "final"), [("restart", False), ("stop", True)])
async def test_what_a_check_of_its_own_found_is_why_a_rank_ended(workbench: Any, action: str, final: bool) -> None:
    script = workbench.script(f"""
        import os, sys, time
        from phalanx import job
        if os.environ["RANK"] == "1":
            job.mark("health", check="nan", action="{action}", message="the loss of step 12 is NaN", blamed=1)
            sys.exit(1)
        time.sleep(60)
    """)
    attempt = await workbench.attempt(f"python {script}", ranks=2).start()
    await attempt.group(state="failing")
    await attempt.runners[0].stop_group(attempt.id, 5.0)
    exits = await attempt.exits()
    assert [(end["fault"], end["final"]) for end in exits] == [("health", final)] * 2
    assert exits[1]["reason"] == "stopped itself: the loss of step 12 is NaN"
    assert (await attempt.group())["first_failed_rank"] == 1


async def test_a_rank_that_ends_right_after_its_word_is_heard(workbench: Any) -> None:
    """While the runner rests from reading it; and the other rank, which fails for it, may be seen to end first."""
    script = workbench.script("""
        import os, time
        import phalanx
        from phalanx import job
        said = os.environ["PHALANX_OUTPUT_DIR"] + "/said"
        phalanx.report(step=1)
        time.sleep(0.03)
        if os.environ["RANK"] == "1":
            job.mark("health", check="nan", action="stop", message="the loss of step 12 is NaN", blamed=1)
            open(said, "x").close()
        while not os.path.exists(said):
            time.sleep(0.001)
        os._exit(1)
    """)
    exits = await workbench.attempt(f"python {script}", ranks=2).run()
    assert [(end["fault"], end["final"]) for end in exits] == [("health", True)] * 2


async def test_a_check_that_only_warned_is_no_reason_of_a_later_end(workbench: Any) -> None:
    script = workbench.script("""
        import sys
        from phalanx import job
        job.mark("health", check="spike", action="warn", message="the loss of step 12 is high")
        sys.exit(3)
    """)
    attempt = workbench.attempt(f"python {script}")
    assert [(end["fault"], end["reason"]) for end in await attempt.run()] == [("", "")]
    assert len(workbench.server.marks(attempt.id, "health")) == 1


async def test_stacks_follow_no_link_that_the_job_has_laid(workbench: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = workbench.script(f"""
        import os, time
        os.symlink({str(elsewhere)!r}, os.environ["PHALANX_OUTPUT_DIR"] + "/stacks")
        print("laid", flush=True)
        time.sleep(60)
    """)
    attempt = await workbench.attempt(f"python {script}").start()
    await attempt.printed("laid")
    await attempt.runners[0].keep_stacks(attempt.id)
    await workbench.server.until(lambda: workbench.server.marks(attempt.id, "note"))
    assert list(elsewhere.iterdir()) == []
    assert workbench.server.marks(attempt.id, "note")[0]["data"]["message"] == "no step on another node"


async def test_a_sign_of_life_or_the_end_of_the_work_is_no_hang(workbench: Any) -> None:
    script = workbench.script("""
        import time
        import phalanx
        for step in range(8):
            phalanx.report(step=step)
            time.sleep(0.02)
        for _ in range(15):
            phalanx.alive()
            time.sleep(0.1)
        phalanx.finished()
        time.sleep(2)
    """)
    attempt = workbench.attempt(f"python {script}", health=rule("restart"))
    assert [(end["exit_code"], end["fault"]) for end in await attempt.run()] == [(0, "")]
    assert workbench.server.marks(attempt.id, "health") == workbench.server.marks(attempt.id, "alive") == []


async def test_a_job_without_preflight_cannot_say_that_its_node_is_unfit(workbench: Any) -> None:
    script = workbench.script("""
        import sys
        from phalanx import job
        job.mark("health", check="preflight", action="restart", message="the node is slow", blamed=0)
        sys.exit(1)
    """)
    assert [end["fault"] for end in await workbench.attempt(f"python {script}").run()] == ["health"]
