"""`phalanx up` itself: what it leaves behind, and that it goes on where it was."""

import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_it_continues_where_it_was_and_shows_the_token_once(machine):
    machine.start().wait_up()
    with machine.client() as client:
        document = {"name": "kept", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "echo kept"}}
        job = client.wait(client.submit(document).id, timeout_s=60)
    token = machine.environment["PHALANX_TOKEN"]
    code, output = machine.stop()
    assert (code, token in output) == (0, True)
    assert machine.left_over() == []

    machine.start().wait_up()
    with machine.client() as client:
        assert client.job(job.id).state == "succeeded"
        assert "kept" in client.logs(job.id)
        assert client.wait(client.submit(document).id, timeout_s=60).state == "succeeded"
    code, output = machine.stop()
    assert (code, token in output) == (0, False)


def test_the_exit_code_of_its_command_is_its_own_and_nothing_is_left(machine):
    machine.start(sys.executable, "-c", "raise SystemExit(5)")
    output, _ = machine.process.communicate(timeout=180)
    assert machine.process.returncode == 5, output
    assert machine.left_over() == []


@pytest.mark.parametrize("name", ["postgres", "ray"])
def test_ctrl_c_while_it_starts_leaves_nothing(machine, name):
    machine.start()
    while not (machine.data / name).exists():
        assert machine.process.poll() is None
    machine.stop()
    assert machine.left_over() == []


def test_a_second_up_on_the_same_data_is_refused(machine, second):
    machine.start().wait_up()
    second.start()
    output, _ = second.process.communicate(timeout=60)
    assert second.process.returncode != 0
    assert "in use by another" in output
