"""Where runs come from: files, and what jobs reported. What cannot be used is left out and named with the reason."""

import json
from datetime import UTC, datetime

import pytest
from phalanx.models import Attempt, Job, Point, Series
from phalanx_server.scaling.history import Names, run_of
from phalanx_server.scaling.runs import LeftOut, Run, flops_per_parameter_token, read_runs

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "runs").write_text(text)
        return tmp_path / "runs"

    return write


def test_a_csv_file_with_the_names_of_the_literature(file):
    runs, left_out = read_runs(file("Run,N,D,L,C,more\na,1e6,2e7,3.5,,x\nb,1e6,2e7,3.4,2e14,y\n"))
    assert runs == [Run("a", 1e6, 2e7, 3.5, 1.2e14), Run("b", 1e6, 2e7, 3.4, 2e14)] and left_out == []
    assert flops_per_parameter_token(runs) == pytest.approx(8)


def test_json_as_a_list_or_as_this_command_prints_it(file):
    rows = [{"parameters": 1e6, "tokens": 2e7, "loss": 3.5, "gpus": 2, "tokens_per_s": 1e5, "gpu_type": "h100"}]
    (run,), _ = read_runs(file(json.dumps(rows)))
    assert run.name == "run 1" and run.flops_per_s_per_gpu == pytest.approx(6e6 * 1e5 / 2)
    assert read_runs(file(json.dumps({"runs": rows, "law": {}})))[0] == [run]


REASONS = {
    ",2e7,3.5": "it has no parameters",
    ",,3.5": "it has no parameters and no tokens",
    "1e6,2e7,nan": "its loss is nan: it must be a number over 0",
    "1e6,-1,3": "its tokens is -1: it must be a number over 0",
    "big,2e7,3": "its parameters is big: it must be a number over 0",
}


@pytest.mark.parametrize(("row", "reason"), REASONS.items(), ids=REASONS.values())
def test_a_row_that_cannot_be_used_is_left_out_with_the_reason(file, row, reason):
    runs, left_out = read_runs(file(f"name,parameters,tokens,loss\nx,{row}\ny,1e6,2e7,3\n"))
    assert [run.name for run in runs] == ["y"] and left_out == [LeftOut("x", reason)]


WRONG = {
    "parameters,token,loss\n1,2,3\n": "it has no column 'tokens'; is it 'token'?",
    "a,b\n1,2\n": "it has no column 'parameters'; it has a, b",
    "parameters,tokens,loss\n": "it has no runs",
    "[1]": "expected a list of objects",
    "{": "Expecting",
    "": "it has no header",
}


@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=WRONG.values())
def test_a_file_of_something_else_is_refused(file, text, said):
    with pytest.raises(ValueError) as raised:
        read_runs(file(text))
    assert said in str(raised.value)


# ------------------------------------------------------------------ jobs


def series(name, values, *, count=1):
    return Series(name, 0, [Point(NOW, step, v, v, v, count) for step, v in enumerate(values, 1)])


def job(state="succeeded"):
    spec = {"resources": {"replicas": 2, "gpus_per_replica": 4}}
    return Job("job_1", "lm", state=state, spec=spec, attempt=Attempt("attempt_1", gpu_type="h100"))


def test_a_job_is_its_last_losses_its_tokens_and_its_speed():
    losses = [5.0] * 98 + [3.0, 2.0]
    reported = [
        series("loss", losses),
        series("tokens_total", [step * 1e4 for step in range(1, 101)]),
        series("parameters", [1e6]),
        series("tokens_per_s", [10.0, 4e5, 4e5]),
    ]
    run = run_of(job(), reported, Names())
    assert run == Run("lm job_1", 1e6, 1e6, pytest.approx(10 / 3), 6e12, 4e5, 8, "h100")  # steps 98, 99, 100
    assert run_of(job(), reported, Names(), tail=0).loss == 2
    renamed = [series("eval_loss", [2.5]), *reported]
    assert run_of(job(), renamed, Names(loss="eval_loss")).loss == 2.5


@pytest.mark.parametrize(
    ("state", "reported", "reason"),
    [
        ("running", [], "it is running: only runs that succeeded count"),
        ("failed", [], "it failed"),
        ("succeeded", [], "it did not report loss and tokens_total and parameters"),
        ("succeeded", [series("loss", [2.0]), series("parameters", [9.0])], "it did not report tokens_total"),
        (
            "succeeded",
            [series("loss", [2.0, "nan"]), series("parameters", [9.0]), series("tokens_total", [9.0])],
            "its loss is nan: it must be a number over 0",
        ),
    ],
)
def test_a_job_that_cannot_tell_is_left_out_with_the_reason(state, reported, reason):
    assert run_of(job(state), reported, Names()) == LeftOut("lm job_1", reason)
