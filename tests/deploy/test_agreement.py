"""What chart, Dockerfiles, compose file and their documentation say of the code, held against the code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from phalanx.cli import plugins
from phalanx.cli.app import app
from phalanx_server.main import create_app
from phalanx_server.settings import Settings
from rendered import CHART, ROOT, VARIATIONS, Document, containers, named, notes, of_kind, pod_templates
from typer.core import TyperGroup

DEPLOY = ROOT / "deploy"
DOCKERFILES = ["server.Dockerfile", "worker.Dockerfile"]
COMPOSE = DEPLOY / "compose.yaml"
DOCS = ROOT / "docs" / "kubernetes.md"
PORT = Settings.model_fields["port"].default
# Fields of Settings that the chart sets itself, from values of other names.
OF_THE_CHART = {"database_url", "data_dir", "storage_url", "policy_file", "host", "port", "log_format"}
OF_THE_CHART |= {"metrics_host", "metrics_port"}
OF_THE_CHART |= {"bootstrap_admin_token_file", "bootstrap_cluster_token_file"}

ray_dir = Path(str(find_spec("ray").origin)).parent  # type: ignore[union-attr]  # not imported: that takes seconds


# ------------------------------------------------------------------ commands


def lines(script: str) -> list[list[str]]:
    """The commands of a shell script, word by word, without redirections, pipes and `exec`."""
    found = []
    for line in script.replace("\\\n", " ").replace("$$", "$").splitlines():
        for part in re.split(r"\s(?:\|\||&&|\||;)\s", line.strip()):
            words = shlex.split(re.sub(r"\s(>>?\s*\S+|&)", " ", part), comments=True)
            if words[:1] == ["exec"]:
                words = words[1:]
            found += [words] if words else []
    return found


def expect_known(words: list[str]) -> bool:
    """Fails unless a command of ours or of Ray has these options; False for other programs."""
    if words[:2] == ["ray", "start"]:
        options = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        source = (ray_dir / "scripts" / "scripts.py").read_text()
        assert [option for option in options if f'"{option}"' not in source] == []
        return True
    if words[:1] != ["phalanx"]:
        return False
    parse(*words[1:])
    return True


@cache
def parse(*words: str) -> None:
    """As the command line would, up to running it. Raises what the CLI prints as `error:`."""
    command: Any = typer.main.get_command(app)
    name, context, rest = "phalanx", None, list(words)
    while isinstance(command, TyperGroup) and rest:  # which leaves in `rest` what follows its own options
        context = command.make_context(name, rest[:1], parent=context)
        name, command, rest = command.resolve_command(context, rest)
    if rest != ["--help"]:
        command.make_context(name, rest, parent=context)


def chart_commands(documents: list[Document]) -> Iterator[list[str]]:
    """Of every container; the server's image has `phalanx` as its entry point."""
    for component, template in pod_templates(documents):
        for container in template["spec"]["containers"]:
            if container.get("command", [""])[0] == "/bin/bash":
                yield from lines(container["args"][0])
            elif component not in ("ray-head", "ray-worker"):
                yield ["phalanx", *container["args"]]


def test_the_charts_commands_are_ours(documents: list[Document]) -> None:
    for words in chart_commands(documents):
        assert expect_known(words), words


def test_the_charts_commands_are_all_of_them(default: list[Document]) -> None:
    used = [" ".join(words[:2]) for words in chart_commands(default)]
    assert sorted(used) == ["phalanx agent", "phalanx migrate", "phalanx scheduler", "phalanx server", "ray start"]


def test_the_parameters_of_ray_start_exist(documents: list[Document]) -> None:
    for cluster in of_kind(documents, "RayCluster"):
        spec = cluster["spec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            assert expect_known(["ray", "start", *(f"--{name}" for name in group["rayStartParams"])])


@pytest.mark.parametrize("file", DOCKERFILES)
def test_the_images_start_our_commands(file: str) -> None:
    entrypoint, command = (json.loads(value) for value in last(file, ["ENTRYPOINT", "CMD"]))
    assert expect_known([*entrypoint, *command])


def test_the_compose_files_commands_are_ours() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    known = {
        name: [words for words in compose_commands(service) if expect_known(words)]
        for name, service in services.items()
    }
    assert [name for name, found in known.items() if not found] == ["postgres"]
    assert [" ".join(words[:2]) for words in known["node"]] == ["ray start", "phalanx agent"]
    assert all(words[1] == "new-token" for words in known["tokens"])


def compose_commands(service: dict[str, Any]) -> list[list[str]]:
    command = service.get("command", [])
    if service.get("entrypoint", command)[:1] in (["/bin/sh"], ["/bin/bash"]):
        return lines(command[-1])
    return [["phalanx", *command]] if command else []


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_commands_that_the_notes_name_exist(name: str) -> None:
    text = re.sub(r"`[^`]*`", "", notes(VARIATIONS[name]))
    for words in lines("\n".join(line for line in text.splitlines() if line.startswith("  phalanx "))):
        assert expect_known(words), words


def test_the_commands_that_the_documentation_names_exist() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    ours = [words for block in blocks for words in lines(block) if words[0] == "phalanx"]
    assert len(ours) >= 3
    for words in ours:
        expect_known(words)


# ------------------------------------------------------------------ names


@cache
def known_variables() -> set[str]:
    agent: Any = plugins.load(next(iter(entry_points(group=plugins.GROUP, name="agent"))))["agent"]
    variables = [parameter.envvar or [] for parameter in agent.params]
    of_agent = {name for names in variables for name in ([names] if isinstance(names, str) else names)}
    return {f"PHALANX_{name.upper()}" for name in Settings.model_fields} | of_agent


def expect_names_known(names: set[str]) -> None:
    assert {name for name in names if name.startswith("PHALANX_")} <= known_variables()
    assert {name for name in names if name.startswith("RAY_")} <= rays_variables()


@cache
def rays_variables() -> set[str]:
    """Those that the worker's code sets or names, which a local cluster runs with."""
    source = "".join(path.read_text() for path in (ROOT / "worker").rglob("*.py"))
    return set(re.findall(r"\bRAY_\w+", source))


def test_the_charts_variables_are_settings_or_rays(documents: list[Document]) -> None:
    for _, template in pod_templates(documents):
        for container in containers(template):
            names = [variable["name"] for variable in container.get("env", ())]
            assert len(names) == len(set(names))
            expect_names_known(set(names))


@pytest.mark.parametrize("file", DOCKERFILES)
def test_the_images_variables_are_settings_or_rays(file: str) -> None:
    assignments = " ".join(value for name, value in instructions(file) if name == "ENV")
    names = {word.partition("=")[0] for word in shlex.split(assignments)}
    assert "PYTHONUNBUFFERED" in names
    expect_names_known(names)


def test_the_compose_files_variables_are_settings_or_rays() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for service in services.values():
        expect_names_known(set(service.get("environment", ())))


def test_the_chart_lets_every_setting_be_set() -> None:
    """A new setting has to be added to `controlPlane.settings` in values.schema.json, or above if it is the chart's."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    offered = schema["properties"]["controlPlane"]["properties"]["settings"]["propertyNames"]["enum"]
    assert set(offered) == set(Settings.model_fields) - OF_THE_CHART


def test_the_chart_decides_on_every_option_of_the_agent(charts: dict[str, list[Document]]) -> None:
    """A new option has to become a value of `agent`, unless it is of no use in a Pod."""
    agent: Any = plugins.load(next(iter(entry_points(group=plugins.GROUP, name="agent"))))["agent"]
    options = {parameter.opts[0] for parameter in agent.params if not parameter.hidden}
    given = {
        word.replace("--no-", "--")
        for documents in charts.values()
        for words in chart_commands(documents)
        if words[:2] == ["phalanx", "agent"]
        for word in words
        if word.startswith("--")
    }
    assert options - given == {"--ray-file", "--require-own-users"}


def test_settings_of_the_values_reach_every_process_of_the_control_plane(charts: dict[str, list[Document]]) -> None:
    documents = charts["settings and policy"]
    for part in ("server", "scheduler"):
        (container,) = named(documents, "Deployment", f"phalanx-{part}")["spec"]["template"]["spec"]["containers"]
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        settings = Settings.model_validate(
            {name.removeprefix("PHALANX_").lower(): value for name, value in env.items()}
        )
        assert (settings.fence_s, settings.metrics_public) == (90, True)
        assert str(settings.policy_file) == "/etc/phalanx/policy.json"
    assert json.loads(of_kind(documents, "ConfigMap")[0]["data"]["policy.json"]) == {"share_nodes": "tenant"}


# ------------------------------------------------------------------ ports and paths


def test_the_servers_port_is_one_everywhere(default: list[Document]) -> None:
    server = named(default, "Deployment", "phalanx-server")["spec"]["template"]["spec"]["containers"][0]
    service = named(default, "Service", "phalanx-server")["spec"]
    assert server["ports"] == [{"name": "http", "containerPort": PORT}]
    assert server["args"][-2:] == ["--port", str(PORT)]
    assert service["ports"] == [{"name": "http", "port": PORT, "targetPort": "http"}]
    assert last("server.Dockerfile", ["EXPOSE"]) == [str(PORT)]
    compose = yaml.safe_load(COMPOSE.read_text())["services"]["server"]
    assert compose["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]


def test_the_agent_calls_the_server_and_ray_by_their_names(default: list[Document]) -> None:
    (agent,) = named(default, "Deployment", "phalanx-agent")["spec"]["template"]["spec"]["containers"]
    script = agent["args"][0]
    (cluster,) = of_kind(default, "RayCluster")
    assert f"--server http://phalanx-server:{PORT} " in script.replace("'", "")
    head = f"{cluster['metadata']['name']}-head-svc:6379"  # as KubeRay calls its Service
    assert script.replace("'", "").count(head) == 2


def test_agent_and_workers_mean_the_same_directories(default: list[Document]) -> None:
    (agent,) = named(default, "Deployment", "phalanx-agent")["spec"]["template"]["spec"]["containers"]
    words = next(words for words in lines(agent["args"][0]) if words[0] == "phalanx")
    worker = dict(pod_templates(default))["ray-worker"]["spec"]["containers"][0]
    mounts = {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert words[words.index("--data") + 1] in mounts
    assert words[words.index("--checkpoint-root") + 1] in mounts


@cache
def servers_paths() -> set[str]:
    return {getattr(route, "path", "") for route in create_app(Settings()).state.routes}


def test_probes_ask_for_what_is_served(documents: list[Document]) -> None:
    rays = (ray_dir / "dashboard" / "modules" / "reporter" / "healthz_agent.py").read_text()
    for component, template in pod_templates(documents):
        for container in containers(template):
            for probe in (value for name, value in container.items() if name.endswith("Probe")):
                path = probe["httpGet"]["path"]
                if component == "server":
                    assert path in servers_paths() and probe["httpGet"]["port"] == "http"
                else:
                    assert f'"{path}"' in rays and probe["httpGet"]["port"] == 52365


def test_the_compose_files_health_checks_ask_for_what_is_served() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    checks = {
        name: " ".join(service["healthcheck"]["test"]) for name, service in services.items() if "healthcheck" in service
    }
    assert f"127.0.0.1:{PORT}/readyz" in checks["server"]
    assert "127.0.0.1:52365/api/healthz" in checks["node"]
    waited_for = {
        (other, wait["condition"])
        for service in services.values()
        for other, wait in service.get("depends_on", {}).items()
    }
    assert {name for name, condition in waited_for if condition == "service_healthy"} <= set(checks)
    assert {name for name, _ in waited_for} <= set(services)


def test_the_compose_files_node_has_the_charts_capabilities(default: list[Document]) -> None:
    node = yaml.safe_load(COMPOSE.read_text())["services"]["node"]
    worker = dict(pod_templates(default))["ray-worker"]["spec"]["containers"][0]
    assert node["cap_drop"] == ["ALL"]
    assert node["cap_add"] == worker["securityContext"]["capabilities"]["add"]


def test_the_compose_files_volumes_and_builds_exist() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    for service in compose["services"].values():
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= set(compose["volumes"])
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


# ------------------------------------------------------------------ Dockerfiles


def instructions(file: str) -> list[tuple[str, str]]:
    text = "\n".join(line for line in (DEPLOY / file).read_text().splitlines() if not line.startswith("#"))
    joined = text.replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def last(file: str, names: list[str]) -> list[str]:
    """The last instruction of each name; `[]` where there is none."""
    found = dict(instructions(file))
    return [found.get(name, "[]") for name in names]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_dockerfiles_copy_what_exists_and_what_the_context_lets_through(file: str) -> None:
    let_through = {line[1:] for line in (DEPLOY / f"{file}.dockerignore").read_text().splitlines() if line[:1] == "!"}
    sources = [
        source
        for name, rest in instructions(file)
        if name == "COPY" and "--from=" not in rest
        for source in rest.split()[:-1]
    ]
    assert set(sources) == let_through
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("file", DOCKERFILES)
def test_dockerfiles_use_only_instructions_and_arguments_that_exist(file: str) -> None:
    known = {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD"}
    steps = instructions(file)
    assert {name for name, _ in steps} <= known
    declared = {rest.partition("=")[0] for name, rest in steps if name == "ARG"}
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(rest for name, rest in steps if name in ("FROM", "RUN"))))
    assert used == declared


@pytest.mark.parametrize(("file", "extra"), [("server.Dockerfile", "server"), ("worker.Dockerfile", "worker")])
def test_images_install_the_locked_versions_of_their_extra(file: str, extra: str) -> None:
    runs = " ".join(rest for name, rest in instructions(file) if name == "RUN")
    assert f'--constraint requirements.lock ".[{extra}]"' in runs
    lock = (ROOT / "requirements.lock").read_text()
    assert len(re.findall(r"^torch==", lock, re.MULTILINE)) == 1  # what the worker's `grep` takes


def test_the_servers_image_is_not_root_and_the_chart_runs_as_its_user(default: list[Document]) -> None:
    uid = last("server.Dockerfile", ["USER"])[0].partition(":")[0]
    for file in DOCKERFILES:
        assert f"useradd --uid {uid} " in (DEPLOY / file).read_text()
    for component, template in pod_templates(default):
        if component != "ray-worker":
            assert str(template["spec"]["securityContext"]["runAsUser"]) == uid
