"""The job file: what it says, what it refuses, and in which words."""

import json
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phalanx.units import parse_duration, parse_size
from phalanx_server.domain.environment import clean_requirements
from phalanx_server.domain.errors import Invalid, UnknownField
from phalanx_server.domain.run_spec import program_of
from phalanx_server.domain.spec import JobSpec, parse_job

SMALL = {"name": "a", "resources": {"gpus_per_replica": 1}, "run": {"command": "true"}}
FULL = {
    "name": "gpt-small",
    "tenant": "research/nlp",
    "priority": "high",
    "resources": {
        "replicas": 2,
        "gpus_per_replica": 8,
        "gpu_types": ["h100", "a100"],
        "cpus_per_gpu": 8,
        "memory_per_gpu": "64GiB",
    },
    "run": {"command": "python train.py", "workdir": ".", "env": {"OMP_NUM_THREADS": "4"}, "bundle": "ab" * 32},
    "time_limit": "4h",
    "retries": {"max": 3, "backoff": "30s"},
    "preemption": {"preemptible": True, "grace": "120s", "min_runtime": "10m"},
    "checkpoint": {"url": "s3://bucket/gpt"},
    "restart": "eager",
    "not_before": "2026-11-21T01:00:00+01:00",
    "labels": {"team": "nlp"},
    "deadline": "2026-11-22T00:00:00Z",
    "after": {"ok": [f"job_{'0' * 32}"], "any": [f"array_{'1' * 32}"]},
    "array": {"indices": "0, 3, 7-9:2", "max_running": 2},
}
SHAPED = {
    "replicas": 4,
    "gpus_per_replica": 2,
    "elastic": {"min_replicas": 2, "max_replicas": 8},
    "topology": {"required": "rack", "slice": {"level": "node", "replicas": 2}},
}


def changed(**fields):
    """SMALL with dotted fields changed: `resources__replicas=2`."""
    document = json.loads(json.dumps(SMALL))
    for name, value in fields.items():
        *parents, last = name.split("__")
        inner = document
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return document


def test_a_full_job_file_is_written_out_in_seconds_and_bytes():
    dump = parse_job(FULL).dump()
    assert dump["time_limit"] == 14400.0
    assert dump["preemption"] == {"preemptible": True, "grace": 120.0, "min_runtime": 600.0}
    assert dump["resources"]["memory_per_replica"] == 8 * 64 << 30
    assert dump["resources"]["cpus_per_replica"] == 64
    assert dump["resources"]["ranks_per_replica"] == 8
    assert dump["not_before"] == "2026-11-21T00:00:00Z"
    assert parse_job(FULL).priority_value == 10
    assert parse_job(FULL).world_size == 16


@pytest.mark.parametrize(
    "document",
    [SMALL, FULL, changed(resources__gpus_per_replica=0, resources__replicas=3), {**SMALL, "resources": SHAPED}],
)
def test_what_is_stored_reads_back_to_the_same(document):
    spec = parse_job(document)
    assert parse_job(json.loads(json.dumps(spec.dump()))) == spec


def test_an_array_stands_for_a_job_of_each_index():
    assert parse_job(FULL).indices == (0, 3, 7, 9)
    assert parse_job(changed(array={"indices": 5})).indices == (5,)
    assert parse_job(SMALL).indices == (None,)
    assert len(parse_job(changed(array={"indices": "0-9999"})).indices) == 10_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"elastic": {"min_replicas": 5, "max_replicas": 8}}, "around it"),
        ({"elastic": {"min_replicas": 4, "max_replicas": 20_000}}, "at most 10000"),
        ({"elastic": {"min_replicas": 3, "max_replicas": 2}}, "more than max_replicas"),
        ({"elastic": {"min_replicas": 1, "max_replicas": 8}}, "does not divide min_replicas, 1"),
        ({"replicas": 5}, "does not divide replicas, 5"),
    ],
)
def test_the_size_of_a_gang_agrees_with_its_range_and_its_slices(changes, said):
    with pytest.raises(Invalid, match=said) as refused:
        parse_job({**SMALL, "resources": SHAPED | changes})
    assert refused.value.errors[0].field.startswith(("resources.elastic", "resources.topology"))


def test_the_short_form_may_be_elastic_and_stay_together():
    asked = {key: value for key, value in SHAPED.items() if key in ("elastic", "topology")}
    resources = parse_job({**SMALL, "resources": {"gpus": 4, **asked}}).resources
    assert resources.replicas == 4 and resources.elastic and resources.topology
    assert (resources.elastic.max_replicas, resources.topology.required) == (8, "rack")


def test_a_deadline_before_the_earliest_start_is_refused():
    with pytest.raises(Invalid, match="not after not_before") as refused:
        parse_job(changed(not_before="2026-11-21T00:00:00Z", deadline="2026-11-20T00:00:00Z"))
    assert refused.value.errors[0].field == "deadline"


def test_gpus_is_short_for_replicas_of_one_gpu():
    spec = parse_job({**SMALL, "resources": {"gpus": 16}})
    assert (spec.resources.replicas, spec.resources.gpus_per_replica, spec.resources.gpus) == (16, 1, None)


def test_a_cpu_job_has_one_rank_and_one_cpu_unless_it_says_otherwise():
    spec = parse_job({**SMALL, "resources": {"gpus": 0, "replicas": 4}})
    assert (spec.resources.gpus_per_replica, spec.resources.ranks_per_replica) == (0, 1)
    assert (spec.resources.replicas, spec.resources.cpus_per_replica) == (4, 1)


@pytest.mark.parametrize("given", ["300", "0.5", 300])
def test_a_job_may_say_when_a_rank_of_it_is_a_straggler(given):
    env = parse_job(changed(run__env={"PHALANX_STRAGGLER_S": given})).run.env
    assert env == {"PHALANX_STRAGGLER_S": str(given)}


BAD = {
    "resources.replicas": [0, -1, 10_001, 10**40, 1.5, True, "2", None.__class__],
    "resources.gpus_per_replica": [-1, 1025, 2.0, False, "8"],
    "resources.gpu_types": [["h100", "h100"], ["x"] * 17, "h100"],
    "resources.memory_per_gpu": ["64 gigs", -1, "1.5", [], "9" * 70],
    "resources.cpus_per_gpu": [-1, "4"],
    "run.command": ["", "   ", 3, "x" * (65 << 10), "a\0b", "\ud800"],
    "run.env": [{"1A": "x"}, {"RANK": "0"}, {"PHALANX_JOB_ID": "x"}, {"A": "x" * (65 << 10)}, []]
    + [{"PHALANX_STRAGGLER_S": text} for text in ("5m", "0", "-1", "inf", "")],
    "run.bundle": ["abc", "G" * 64],
    "name": ["", "-a", "a b", "x" * 129, 4],
    "tenant": ["", "A", "a//b", "/a", "a/", 3, "x" * 300],
    "priority": ["hgh", 1001, 1.5, True, [], None],
    "time_limit": [0, -1, "4x", "", "1e400s", float("inf"), float("nan"), 1e12, True],
    "retries.max": [-1, 1001, "3"],
    "preemption.grace": ["2h", -1],
    "restart": ["sometimes", 1],
    "not_before": [
        *("2026-11-21T00:00:00", "tomorrow", 5),
        *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-01:00", "9999-12-31T23:59:59.999999Z"),
        "9001-01-01T00:00:00Z",
    ],
    "labels": [{"a": True}, {"": "x"}, {"a=b": "x"}, {str(n): "x" for n in range(65)}, {"a": "x" * 257}],
    "held": ["yes", 1],
    "deadline": [5, "2026-11-21T00:00:00", "9001-01-01T00:00:00Z"],
    "after": [["job_1"], {"ok": [f"job_{'0' * 32}"], "any": [f"job_{'0' * 32}"]}],
    "after.ok": ["job_1", ["job_1"], ["train"], [f"att_{'0' * 32}"], [f"job_{n:032x}" for n in range(257)]],
    "array": ["0-9", {}, {"max_running": 2}],
    "array.indices": ["", "a", "-1", "1-", "3-1", "0-9:0", "0,0", "0-3,2", "0-10000", "0-999999999", "0," * 9999, True],
    "resources.elastic": [{"min_replicas": 2}, {"min_replicas": 2, "max_replicas": 3}, 4],
    "resources.elastic.min_replicas": [0, "1"],
    "resources.topology": [{}, "rack", {"required": "rack", "preferred": "node"}],
    "resources.topology.required": ["", "no level", 3],
    "checkpoint.url": ["bucket", "", "x" * 3000],
}
CASES = [(field, value) for field, values in BAD.items() for value in values if value is not type(None)]


@pytest.mark.parametrize(("field", "value"), CASES, ids=lambda value: repr(value)[:30])
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(Invalid) as refused:
        parse_job(changed(**{field.replace(".", "__"): value}))
    error = refused.value.errors[0]
    assert error.field.startswith(field)
    assert refused.value.code == "invalid_request"
    assert len(refused.value.detail) < 400


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("resorces", "resources"),
        ("resources__replcas", "replicas"),
        ("run__comand", "command"),
        ("retries__backof", "backoff"),
        ("checkpoint__keeplast", "keep_last"),
        ("lables", "labels"),
        ("after__okay", "ok"),
        ("array__max_runing", "max_running"),
        ("resources__elastic__min_replica", "min_replicas"),
        ("resources__topology__require", "required"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_valid_one(field, nearest):
    with pytest.raises(UnknownField) as refused:
        parse_job(changed(**{field: 1}))
    (error,) = [error for error in refused.value.errors if error.field == field.replace("__", ".")]
    assert error.hint == f"did you mean {nearest}?"


@pytest.mark.parametrize(
    "field",
    [
        "run__environment__image",
        "run__secrets",
        "checkpoint__keep_last",
    ],
)
def test_what_is_not_built_yet_is_refused_by_name_and_never_ignored(field):
    with pytest.raises(Invalid) as refused:
        parse_job(changed(**{field: {"some": "thing"}}))
    assert refused.value.errors[0].field == field.replace("__", ".")
    assert "not supported by this version" in refused.value.detail
    if field != "run__environment__image":
        assert parse_job(changed(**{field: None}))


def test_requirements_lose_comments_blanks_and_repetitions():
    given = [
        "einops==0.8.1  # shapes",
        "",
        "  # only a comment",
        "einops==0.8.1",
        "tool @ https://x.example/t.whl#sha256=ab",
    ]
    environment = parse_job(changed(run__environment={"requirements": given})).run.environment
    assert environment and environment.requirements == ("einops==0.8.1", "tool @ https://x.example/t.whl#sha256=ab")


def test_requirements_may_be_held_to_their_hashes():
    line = f"einops==0.8.1 ; python_version > '3' --hash=sha256:{'ab' * 32} --hash=sha512:{'cd' * 64}"
    assert clean_requirements([line]) == (line,)
    for wrong in ("--hash=md5:ab", f"--hash=sha256:{'ab' * 31}", f"--hash=sha256:{'ab' * 32} -e ."):
        with pytest.raises(ValueError, match="einops"):
            clean_requirements([f"einops==0.8.1 {wrong}"])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "say requirements"),
        ({"requirements": "requirements.txt"}, "list of lines"),
        ({"requirements": ["-r other.txt"]}, "option that is not taken"),
        ({"requirements": ["-e ."]}, "option that is not taken"),
        ({"requirements": ["./wheels/x.whl"]}, "is a path"),
        ({"requirements": ["x @ file:///etc/x.whl"]}, "is a path"),
        ({"requirements": ["numpy=="]}, "is no requirement"),
        ({"requirements": ["--index-url"]}, "needs an http"),
        ({"requirements": ["--index-url https://me:secret@packages.example/simple"]}, "password in its URL"),
        ({"requirements": ["--pre yes"]}, "takes no value"),
        ({"requirements": [f"package{n}" for n in range(501)]}, "at most 500"),
        ({"requirements": ["a\x07b"]}, "control character"),
        ({"requirements": ["--index-url https://packages.example/ -r /etc/hosts"]}, "takes one value"),
        ({"requirements": ["--find-links=https://packages.example/ --index-url=file:///x"]}, "takes one value"),
        ({"requirements": ["--no-binary :all: -e git+https://packages.example/x"]}, "takes one value"),
        ({"requirements": ["--index-url https://packages.example/\\"]}, "ends in a backslash"),
        ({"requirements": ["a; os_name > '3 --config-settings=x=y '"]}, "an option behind"),
        ({"requirements": ["a; " + "(" * 1_900]}, "is no requirement"),
        ({"requirements": ["x @ git+https://ghp_secret@packages.example/x"]}, "password in its URL"),
        ({"requirements": [f"package{n}; os_name == '{'x' * 400}'" for n in range(400)]}, "characters in all"),
    ],
)
def test_requirements_that_cannot_be_built_everywhere_are_refused(environment, said):
    with pytest.raises(Invalid, match=said) as refused:
        parse_job(changed(run__environment=environment))
    assert refused.value.errors[0].field.startswith("run.environment")


def test_mounts_are_read_only_paths_of_the_node_unless_said_otherwise():
    (mount,) = parse_job(changed(run__mounts=[{"source": "host:///srv//sets/", "target": "/data/."}])).run.mounts
    assert (mount.source, mount.target, mount.read_only) == ("/srv/sets", "/data", True)


@pytest.mark.parametrize(
    ("mounts", "said"),
    [
        ([{"source": "pvc://datasets", "target": "/data"}], "only directories of the node"),
        ([{"source": "srv", "target": "/data"}], "not an absolute path"),
        ([{"source": "/srv/../etc", "target": "/data"}], "without '..'"),
        ([{"source": "/srv", "target": "/etc/sub"}], "directory of the system"),
        ([{"source": "/srv", "target": "/"}], "root directory"),
        ([{"source": "/a", "target": "/data"}, {"source": "/b", "target": "/data/b"}], "mounted over"),
        ([{"source": "/a", "target": f"/data{n}"} for n in range(17)], "16"),
    ],
)
def test_mounts_that_would_cover_something_are_refused(mounts, said):
    with pytest.raises(Invalid, match=said) as refused:
        parse_job(changed(run__mounts=mounts))
    assert refused.value.errors[0].field.startswith("run.mounts")


@pytest.mark.parametrize("pattern", ["/etc/*", "../*", "out/../../x", ""])
def test_outputs_lie_in_the_working_directory(pattern):
    assert parse_job(changed(run__outputs=["out/**", "model.pt"])).run.outputs == ("out/**", "model.pt")
    with pytest.raises(Invalid, match="working directory"):
        parse_job(changed(run__outputs=[pattern]))


def test_shm_is_a_size():
    assert parse_job(changed(run__shm="16GiB")).run.shm == 16 << 30
    with pytest.raises(Invalid):
        parse_job(changed(run__shm=0))


@pytest.mark.parametrize("document", [None, [], "job", 3, {}])
def test_what_is_no_job_file_at_all_is_refused(document):
    with pytest.raises(Invalid):
        parse_job(document)


def test_errors_of_a_batch_name_the_job():
    with pytest.raises(Invalid) as refused:
        parse_job(changed(resources__replicas=0), where="jobs[3]")
    assert refused.value.errors[0].field == "jobs[3].resources.replicas"


def test_per_gpu_and_per_replica_must_agree():
    agreeing = {"gpus_per_replica": 2, "cpus_per_gpu": 4, "cpus_per_replica": 8}
    assert parse_job({**SMALL, "resources": agreeing}).resources.cpus_per_replica == 8
    with pytest.raises(Invalid, match="contradict"):
        parse_job({**SMALL, "resources": agreeing | {"cpus_per_replica": 9}})


def test_nesting_without_end_is_refused():
    deep: object = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(Invalid, match="levels deep"):
        parse_job({**SMALL, "labels": deep})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*JobSpec.model_fields, "x"]), json_values, max_size=6))
def test_any_document_is_read_or_refused_in_words(document):
    try:
        spec = parse_job({**SMALL, **document})
    except Invalid as refused:
        assert refused.errors and refused.detail
    else:
        json.dumps(spec.dump(), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("4h", 14400),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("2d", 172800),
        (90, 90),
        ("1.5m", 90),
        ("1h 5m", 3900),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("64GiB", 64 << 30), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), (7, 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


DATA = {"paths": ["text/*.txt"]}


def recipe(**args: Any) -> dict[str, Any]:
    return {**SMALL, "run": {"recipe": "lm", "args": {"data": DATA, **args}}, "resources": {"gpus": 4}}


def test_a_recipe_stands_for_a_command():
    spec = parse_job(recipe(model={"layers": 2}, parallel={"tensor": 2}))
    assert parse_job(spec.dump()) == spec
    words = shlex.split(program_of(spec.dump()["run"]))
    assert words[:4] == ["python", "-m", "phalanx_worker.training.main", "lm"]
    assert json.loads(words[4]) == {"data": DATA, "model": {"layers": 2}, "parallel": {"tensor": 2}}


@pytest.mark.parametrize(
    ("run", "field", "says"),
    [
        ({"recipe": "ml"}, "run.recipe", "is none of lm"),
        ({"recipe": "lm", "command": "true"}, "run", "say either command, or recipe with args"),
        ({}, "run", "say either command, or recipe with args"),
        ({"command": "true", "args": {"a": 1}}, "run.args", "none is named"),
        ({"recipe": "lm", "args": {"data": DATA, "modle": {}}}, "run.args.modle", "is not a field; did you mean 'mod"),
        (
            {"recipe": "lm", "args": {"data": DATA, "model": {"layers": "many"}}},
            "run.args.model.layers",
            "'many' is not a whole number; write a whole number",
        ),
        ({"recipe": "lm", "args": {"data": DATA, "parallel": {"tensor": 3}}}, "run.args.parallel", "has no room"),
        ({"recipe": "script", "args": {"lr": 1}, "command": "true"}, "run.args", "write them into command"),
        ({"recipe": "script"}, "run.command", "is missing: the recipe script runs what it says"),
        ({"recipe": "lm", "args": {"x": "y" * 70_000}}, "run.args", "at most 65536"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_with_the_field_and_the_fix(run, field, says):
    with pytest.raises(Invalid) as refused:
        parse_job({**SMALL, "run": run, "resources": {"gpus": 4}})
    (error,) = refused.value.errors
    assert error.field == field
    assert says in error.message


def test_all_that_is_wrong_with_a_recipe_s_arguments_is_said_at_once_each_with_its_field():
    wrong = recipe(model={"layerz": 4, "width": "wide"}, train={"steps": 0, "global_batch": 0}, optim={"lr": "fast"})
    with pytest.raises(Invalid) as refused:
        parse_job({**wrong, "nmae": "x"}, where="jobs[3]")
    assert [error.field for error in refused.value.errors] == [
        "jobs[3].run.args.model.layerz",
        "jobs[3].run.args.model.width",
        "jobs[3].run.args.train.steps",
        "jobs[3].run.args.train.global_batch",
        "jobs[3].run.args.optim.lr",
        "jobs[3].nmae",
    ]
    assert refused.value.errors[2].message == "0 is not positive; use 1 or more"


def test_the_recipe_script_is_the_command_alone():
    plain = parse_job({**SMALL, "run": {"command": "python train.py"}})
    assert parse_job({**SMALL, "run": {"recipe": "script", "command": "python train.py"}}) == plain
    assert parse_job({**SMALL, "run": {"recipe": "script", "command": "python train.py", "args": {}}}) == plain


def test_a_recipe_fits_every_size_of_an_elastic_gang():
    resources = {"gpus": 4, "elastic": {"min_replicas": 1, "max_replicas": 4}}
    with pytest.raises(Invalid) as refused:
        parse_job({**recipe(train={"global_batch": 32}), "resources": resources})
    assert "run.args.train.global_batch: 32 is not a multiple of data" in refused.value.detail
    assert "(with 3 ranks)" in refused.value.detail
    assert parse_job({**recipe(train={"global_batch": 24}), "resources": resources})


def test_health_is_written_short_or_whole():
    hang = {"action": "restart", "at_least": "2m"}
    spec = parse_job({**SMALL, "health": {"nan": "stop", "hang": hang, "gpu": False}})
    assert spec.health is not None
    assert (spec.health.nan.action, spec.health.hang.at_least, spec.health.gpu.action) == ("stop", 120, "off")
    assert parse_job(spec.dump()) == spec
    assert parse_job(SMALL).health is None


@pytest.mark.parametrize(
    ("health", "field"),
    [
        ({"nan": "restart"}, "health.nan.action"),
        ({"hang": "skip"}, "health.hang.action"),
        ({"spike": {"factor": 1}}, "health.spike.factor"),
        ({"hangs": "warn"}, "health.hangs"),
        ({"corruption": {"every": 0}}, "health.corruption.every"),
    ],
)
def test_health_that_makes_no_sense_is_refused_by_name(health, field):
    with pytest.raises(Invalid) as refused:
        parse_job({**SMALL, "health": health})
    assert [error.field for error in refused.value.errors] == [field]
