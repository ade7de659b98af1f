"""`phalanx up` itself: what it leaves behind, and that it goes on where it was."""

import sys
import time

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def document(command: str) -> dict:
    return {"name": "kept", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": command}}


def wait_running(client, job_id: str, *, attempts: int):
    deadline = time.monotonic() + 60
    while (job := client.job(job_id)).state != "running" or job.attempts != attempts:
        assert not job.ended and time.monotonic() < deadline, job
        time.sleep(0.1)


def test_it_continues_where_it_was_and_shows_the_token_once(machine):
    machine.start().wait_up()
    with machine.client() as client:
        done = client.wait(client.submit(document("echo kept")).id, timeout_s=60)
        running = client.submit(document("sleep 600"))
        wait_running(client, running.id, attempts=1)
    token = machine.environment["PHALANX_TOKEN"]
    code, output = machine.stop()
    assert (code, token in output) == (0, True)
    assert "Stopping 1 job (kept): the next `phalanx up` on this data goes on" in output
    assert machine.left_over() == []

    machine.start().wait_up()
    with machine.client() as client:
        assert client.job(done.id).state == "succeeded"
        assert "kept" in client.logs(done.id)
        wait_running(client, running.id, attempts=2)
        first = client.attempts(running.id)[0]
        assert (first.outcome, first.message) == ("requeued", "Phalanx was stopped")
        client.cancel(running.id)
        assert client.wait(running.id, timeout_s=60).state == "cancelled"
    code, output = machine.stop()
    assert (code, token in output, "Stopping" in output) == (0, False, False)
    assert "Taken up again, as not ended before: 1 job (kept)" in output
    assert machine.left_over() == []


def test_the_exit_code_of_its_command_is_its_own_and_nothing_is_left(machine):
    machine.start(sys.executable, "-c", "raise SystemExit(5)")
    output, _ = machine.process.communicate(timeout=180)
    assert machine.process.returncode == 5, output
    assert machine.left_over() == []


@pytest.mark.parametrize("name", ["postgres", "ray", "logs/scheduler.log", "logs/agent.log"])
def test_ctrl_c_while_it_starts_leaves_nothing(machine, name):
    machine.start()
    deadline = time.monotonic() + 60
    while not (machine.data / name).exists():
        assert machine.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    code, output = machine.stop()
    assert (code, machine.left_over()) == (0, [])
    assert "Traceback" not in output and "phalanx up:" not in output, output


def test_ctrl_c_ends_its_command_as_interrupted(machine):
    machine.start(sys.executable, "-c", "import time; print('it runs', flush=True); time.sleep(600)")
    for line in machine.process.stdout:
        if "it runs" in line:
            break
    code, _ = machine.stop()
    assert (code, machine.left_over()) == (130, [])


def test_a_second_up_on_the_same_data_is_refused(machine, second):
    machine.start().wait_up()
    second.start()
    output, _ = second.process.communicate(timeout=60)
    assert second.process.returncode != 0
    assert "in use by another" in output
