"""Job files: what is read, and that each mistake is one line that says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx.errors import JobFileError
from phalanx.jobfile import JobFile, override, read

GOOD = """\
# a comment
name: lm
resources:
  replicas: 2
  gpu_types: [h100, a100]
run:
  command: python train.py
  env: {DEBUG: no, AT: 1:30}
time_limit: 4h
not_before: 2026-11-21T00:00:00Z
"""


def written(directory: Path, text: str | bytes, name: str = "job.yaml") -> Path:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_yaml_is_read_by_its_core_schema(tmp_path: Path) -> None:
    document = read(written(tmp_path, GOOD)).document
    assert document["run"]["env"] == {"DEBUG": "no", "AT": "1:30"}
    assert document["not_before"] == "2026-11-21T00:00:00Z"
    assert document["resources"] == {"replicas": 2, "gpu_types": ["h100", "a100"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("-2", -2),
        ("~", None),
        ("", None),
        ("true", True),
        ("yes", "yes"),
        ("0.1.2", "0.1.2"),
        ("1_000", "1_000"),
        ("'7'", "7"),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    assert read(written(tmp_path, f"x: {text}")).document == {"x": value}


def test_json_is_read_too(tmp_path: Path) -> None:
    assert read(written(tmp_path, '{"name": "lm"}', "job.json")).document == {"name": "lm"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [a", r"job.yaml:1:9: not valid YAML: expected ',' or ']'"),
        ("name: a\n\tb: c", r"job.yaml:2:1: not valid YAML: found character '\\t'"),
        ("a: 1\nb: 2\na: 3", r"job.yaml:3:1: a is given twice, first in line 1"),
        ("r:\n  x: 1\n  x: 2", r"job.yaml:3:3: r.x is given twice"),
        ("- a", r"job.yaml:1:1: is a list: expected keys like name"),
        ("", r"job.yaml:1:1: is empty"),
        ("a: 1\n---\nb: 2", r"job.yaml:2:1: not valid YAML: but found another document"),
        ("a: !!python/object/apply:os.system [ls]", r"job.yaml:1:4: not valid YAML: could not determine a constructor"),
        ("a: !!timestamp 2026-01-01", r"job.yaml:1:4: not valid YAML: could not determine a constructor"),
        ("a: *b", r"job.yaml:1:4: not valid YAML: found undefined alias"),
        ("a: &a [*a]", r"job.yaml: "),
        ("a: 1e999", r"job.yaml: holds a number that is not finite"),
        (b"a: \xff\n", r"job.yaml:1:1: is not UTF-8"),
        (b"\n\na: \xff", r"job.yaml:3:1: is not UTF-8"),
        (b"b: 1\na: \x00", r"job.yaml:2: not valid YAML: it has the control character #x00"),
        ("a: " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 900 + "]" * 900, r"job.yaml: is nested more than 64 deep"),
        ("a: " + "[" * 80 + "]" * 80, r"job.yaml: is nested more than 64 deep"),
        ("a: " + "1" * 5000, r"job.yaml: not valid YAML: Exceeds the limit"),
        ("x" * (2 << 20), r"job.yaml: is 2097152 bytes; a job file has at most 1048576"),
    ],
)
def test_malformed_yaml_says_where(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(JobFileError, match=said) as raised:
        read(written(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_a_billion_laughs_are_cut_short(tmp_path: Path) -> None:
    levels = ["l0: &l0 {a: 1}"] + [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(JobFileError, match="more than 20000 fields"):
        read(written(tmp_path, "\n".join(levels)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,}', r"job.json:1:9: not valid JSON"),
        ('{"a": 1\n "b": 2}', r"job.json:2:2: not valid JSON: Expecting ',' delimiter"),
        ('{"a": 1, "a": 2}', r"job.json: 'a' is given twice"),
        ('{"a": NaN}', r"job.json: holds a number that is not finite"),
        ("[1]", r"job.json:1:1: is a list"),
        ("[" * 100_000, r"job.json: is nested more than 64 deep"),
        ('{"a":' * 900 + "1" + "}" * 900, r"job.json: is nested more than 64 deep"),
        ('{"a": ' + "1" * 5000 + "}", r"job.json: holds a number that is too long"),
    ],
)
def test_malformed_json_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(JobFileError, match=said):
        read(written(tmp_path, text, "job.json"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"absent.yaml: cannot read it: No such file"):
        read(tmp_path / "absent.yaml")


def test_a_field_has_a_place(tmp_path: Path) -> None:
    job = read(written(tmp_path, GOOD))
    assert job.place("resources.replicas") == f"{job.path}:4:3"
    assert job.place("resources.gpu_types[1]") == f"{job.path}:5:21"
    assert job.place("resources.absent") == f"{job.path}:3:1", "a field that is missing stands at its parent"
    assert job.place("absent") == str(job.path)
    assert JobFile({}).place("x") == ""


def test_the_directory_counts_from_the_file(tmp_path: Path) -> None:
    assert read(written(tmp_path, "run: {workdir: .}")).workdir() == tmp_path
    assert read(written(tmp_path, "run: {workdir: ../x}")).workdir() == tmp_path / "../x"
    assert read(written(tmp_path, "run: {command: x}")).workdir() is None
    with pytest.raises(JobFileError, match=r"job.yaml:1:7: run.workdir is 7: expected a path"):
        read(written(tmp_path, "run: {workdir: 7}")).workdir()
    with pytest.raises(JobFileError, match=r"job.yaml:1:7: run.workdir is '~nosuch/x': Could not determine home"):
        read(written(tmp_path, "run: {workdir: ~nosuch/x}")).workdir()


def test_overrides_set_fields_and_leave_the_rest() -> None:
    document = {"resources": {"gpus": 1}, "run": None}
    changed = override(document, ["resources.gpus=4", "run.env.A=x y", "labels={a: b}", "retries.max=0"])
    assert changed == {
        "resources": {"gpus": 4},
        "run": {"env": {"A": "x y"}},
        "labels": {"a": "b"},
        "retries": {"max": 0},
    }
    assert document == {"resources": {"gpus": 1}, "run": None}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("resources", "'resources' is no setting: expected something like"),
        ("a..b=1", "is no setting"),
        ("name.x=1", "name.x cannot be set: name is 'lm', not a group of fields"),
        ("a=[", "the value is not valid YAML; quote it"),
        ("a=1e999", "not finite"),
        ("a=" + "1" * 5000, r"'a=1{78}': the value is not valid YAML; quote it"),
        ("a=" + "[" * 900 + "]" * 900, r"a=\[{78}: is nested more than 64 deep"),
        ("a=" + "[" * 80 + "]" * 80, r"a=\[{78}: is nested more than 64 deep"),
        (".".join("a" * 900) + "=1", r"--set: is nested more than 64 deep"),
    ],
)
def test_bad_overrides(setting: str, said: str) -> None:
    with pytest.raises(JobFileError, match=said):
        override({"name": "lm"}, [setting])
