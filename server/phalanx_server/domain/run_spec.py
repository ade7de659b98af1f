"""The job file's `run`: what each rank runs, in which environment, on which files, and what is kept of it.

Owns these keys, their limits and their defaults.
"""

import itertools
import json
import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any

from phalanx.recipes import catalog
from phalanx.recipes.parse import RecipeError
from pydantic import Field, ValidationInfo, field_validator, model_validator

from phalanx_server.domain.environment import clean_requirements
from phalanx_server.domain.errors import FieldError
from phalanx_server.domain.field_errors import WrongFields
from phalanx_server.domain.field_types import Name, Part, Size, Switch, Text, Unsupported

SCRIPT = "script"  # the recipe of those who bring their own command
COMMAND_MAX_BYTES = 64 << 10
ENV_MAX_BYTES = 64 << 10
MOUNTS_MAX = 16
OUTPUTS_MAX = 64
PATTERN_MAX_CHARS = 512

# What the runner sets for every rank; a job that set them would only be overruled.
_SET_BY_US = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS",
        "TORCHELASTIC_USE_AGENT_STORE",
        "CUDA_VISIBLE_DEVICES",
    }
)
# What a job may say of itself: after a rank was done, one that does nothing for so many seconds is ended.
_STRAGGLER_S = "PHALANX_STRAGGLER_S"
# What a process trusts because only root writes there: nothing of a user is mounted over it.
_SYSTEM_DIRECTORIES = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "root", "run", "sbin", "sys", "tmp", "usr"}
    | {"var"}
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_POSITIVE = re.compile(r"(?=.*[1-9])[0-9]{1,9}(\.[0-9]{1,9})?")


class JobEnvironment(Part):
    """Packages on top of the node's own Python: `requirements`, as pip has them, or the `name` of a registered
    environment, whose requirements the server fills in."""

    name: Name | None = None
    requirements: Annotated[tuple[str, ...], Field(max_length=10_000)] = ()
    image: Unsupported = None

    @field_validator("requirements", mode="before")
    @classmethod
    def _are_lines(cls, given: object) -> object:
        if isinstance(given, str):
            raise ValueError("expected a list of lines; `phalanx submit` reads a requirements file and sends its lines")
        return given if given is not None else ()

    @field_validator("requirements")
    @classmethod
    def _are_clean(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        return clean_requirements(lines)

    @model_validator(mode="after")
    def _says_something(self) -> "JobEnvironment":
        if self.name is None and not self.requirements:
            raise ValueError("say requirements, or the name of a registered environment")
        return self


class JobMount(Part):
    """A directory of the node, under another path for the ranks. The operator says which may be mounted."""

    source: Annotated[str, Field(min_length=1, max_length=1024)]
    target: Annotated[str, Field(min_length=1, max_length=1024)]
    read_only: Switch = True

    @field_validator("source")
    @classmethod
    def _is_host_path(cls, source: str) -> str:
        scheme, colon, _ = source.partition("://")
        if colon and scheme != "host":
            raise ValueError(
                f"{source[:80]!r}: only directories of the node can be mounted (host:///path); a volume is mounted "
                "into the workers first, see docs/kubernetes.md"
            )
        return _absolute(source.removeprefix("host://"))

    @field_validator("target")
    @classmethod
    def _is_free(cls, target: str) -> str:
        path = _absolute(target)
        if path.split("/")[1] in _SYSTEM_DIRECTORIES:
            raise ValueError(f"{target[:80]!r} lies in a directory of the system; choose one like /data")
        return path


def _absolute(path: str) -> str:
    """The path as it is written without detours. Raises ValueError unless it is absolute, and more than the root."""
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{path[:80]!r} is not an absolute path without '..'")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise ValueError("is the root directory; name one below it")
    return "/" + "/".join(parts)


def program_of(run: Mapping[str, Any]) -> str:
    """The command of each rank; `run` as it is stored."""
    if (recipe := run.get("recipe")) is None:
        return run["command"]
    return shlex.join(["python", "-m", catalog.MODULE, recipe, json.dumps(run["args"])])


def wrong_arguments(error: RecipeError, *, within: str = "") -> WrongFields:
    """What is wrong with a recipe's arguments, each field named from `within` (the arguments, or what holds them)."""
    return WrongFields(
        [
            FieldError(".".join(filter(None, (within, each.field))), each.problem.removeprefix("= "))
            for each in error.all
        ]
    )


class Run(Part):
    """What each rank runs: a command, or a recipe with its arguments.

    `workdir` is for the client, which uploads it and says its hash in `bundle`."""

    command: Annotated[str, Field(min_length=1)] | None = None
    recipe: Annotated[str, Field(description="lm, vision, recsys; or script, which is the command.")] | None = None
    args: Annotated[dict[str, Any], Field(description="Of the recipe: docs/training.md.")] = Field(default_factory=dict)
    workdir: str | None = None
    bundle: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    env: dict[str, Text] = Field(default_factory=dict)
    environment: JobEnvironment | None = None
    mounts: Annotated[tuple[JobMount, ...], Field(max_length=MOUNTS_MAX)] = ()
    outputs: Annotated[tuple[str, ...], Field(max_length=OUTPUTS_MAX)] = ()
    shm: Annotated[Size, Field(gt=0)] | None = None
    secrets: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _script_is_a_command(cls, given: object) -> object:
        """`{recipe: script, command: …}` is the same as the command alone."""
        if not isinstance(given, dict) or given.get("recipe") != SCRIPT:
            return given
        if given.get("args"):
            said = f"the recipe {SCRIPT} has none: write them into command, as in python train.py --lr 3e-4"
            raise WrongFields([FieldError("args", said)])
        if given.get("command") is None:
            said = f"is missing: the recipe {SCRIPT} runs what it says, such as python train.py"
            raise WrongFields([FieldError("command", said)])
        return {key: value for key, value in given.items() if key not in ("recipe", "args")}

    @field_validator("command")
    @classmethod
    def _has_words(cls, command: str | None) -> str | None:
        if command is None:
            return None
        size = len(command.encode())
        if not command.strip():
            raise ValueError("is blank: say what each rank runs")
        if size > COMMAND_MAX_BYTES:
            raise ValueError(f"is {size} bytes long, at most {COMMAND_MAX_BYTES}; put it into a script in the workdir")
        return command

    @field_validator("recipe")
    @classmethod
    def _is_known(cls, recipe: str | None) -> str | None:
        if recipe is not None and recipe not in catalog.CONFIGS:
            names = ", ".join([*catalog.CONFIGS, SCRIPT])
            raise ValueError(f"is none of {names}; {SCRIPT} is a program of your own, which command says")
        return recipe

    @field_validator("args")
    @classmethod
    def _make_a_recipe(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        recipe = info.data.get("recipe")
        if (size := len(json.dumps(args))) > COMMAND_MAX_BYTES:
            raise ValueError(f"are {size} bytes long, at most {COMMAND_MAX_BYTES}")
        if args and recipe is None:
            raise ValueError("are those of a recipe, and none is named")
        if recipe is not None:
            try:
                catalog.read(recipe, args)
            except RecipeError as error:
                raise wrong_arguments(error) from None
        return args

    @model_validator(mode="after")
    def _says_what_runs(self) -> "Run":
        if (self.command is None) == (self.recipe is None):
            raise ValueError("say either command, or recipe with args")
        return self

    @field_validator("mounts")
    @classmethod
    def _apart(cls, mounts: tuple[JobMount, ...]) -> tuple[JobMount, ...]:
        targets = sorted(mount.target for mount in mounts)
        for upper, lower in itertools.combinations(targets, 2):
            if lower == upper or lower.startswith(f"{upper}/"):
                raise ValueError(f"{lower!r} would be mounted over {upper!r}")
        return mounts

    @field_validator("outputs")
    @classmethod
    def _inside_workdir(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not 0 < len(pattern) <= PATTERN_MAX_CHARS or pattern.startswith("/") or ".." in pattern.split("/"):
                raise ValueError(f"{pattern[:80]!r} is no pattern of files in the working directory, like out/**")
        return patterns

    @field_validator("env")
    @classmethod
    def _names_and_size(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is no name of an environment variable")
            if name in _SET_BY_US or (name.startswith("PHALANX_") and name != _STRAGGLER_S):
                raise ValueError(f"{name} is set by Phalanx for every rank")
        if _STRAGGLER_S in env and not _POSITIVE.fullmatch(env[_STRAGGLER_S]):
            raise ValueError(f"{_STRAGGLER_S} is {env[_STRAGGLER_S]!r:.40}, not a number of seconds, such as 300")
        size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items())
        if size > ENV_MAX_BYTES:
            raise ValueError(f"is {size} bytes in all, at most {ENV_MAX_BYTES}")
        return env
