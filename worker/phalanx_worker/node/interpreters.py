"""Which Python the ranks of a group run in, and from which warm process they are forked.

Owns the base's warm process together with those of environments, of which only a few are kept. Where ranks have the
runner's own user, each environment has a warm process of its own. Where they run as their tenant's user there is none:
guardians are forked as root, and what an environment brings (its `.pth` files alone) must never run as root. Then a
rank is forked from the base's warm process and enters the environment once it is its tenant's user; if the environment
brings a module of its own that is loaded there already, the rank starts cold.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from phalanx_worker import protocol
from phalanx_worker.node import environment
from phalanx_worker.node.environments import Built, Environments, Tell, Wanted
from phalanx_worker.node.isolation import Isolation
from phalanx_worker.node.orders import GroupOrder
from phalanx_worker.node.pip_build import OPERATORS_VARIABLES, PipBuild
from phalanx_worker.node.warm import WarmProcess, WarmState

MOST_WARM = 4  # beside the base's
IDLE_S = 1_800.0
_LOOK_EVERY_S = 60.0


@dataclass(frozen=True)
class Interpreter:
    """`python` is what the user's `python` means, `node_env` what ranks get of the node's environment. `venv`: what a
    fork of `warm` has to enter, "" where the warm process is in it already. `brings`: its own modules, to be entered.
    """

    warm: WarmProcess
    python: str
    node_env: Mapping[str, str]
    venv: str = ""
    brings: frozenset[str] = frozenset()

    async def ready(self) -> WarmState:
        """The state of its warm process, once that is there. Raises StartFailed."""
        state = await self.warm.ready()
        own = sorted(self.brings & state.loaded)
        return replace(state, unfit=state.unfit or f"its environment brings its own {own[0]}") if own else state


@dataclass
class _Kept:
    warm: WarmProcess
    used_s: float  # monotonic


@dataclass
class Interpreters:
    """`warm_env` is what warm processes get of the node's environment, scrubbed already."""

    base: Interpreter
    environments: Environments
    warm_env: Mapping[str, str]
    _kept: dict[str, _Kept] = field(default_factory=dict)
    _closing: set[asyncio.Future[None]] = field(default_factory=set)

    @asynccontextmanager
    async def hold(self, asked: protocol.Environment | None, uid: int | None, tell: Tell) -> AsyncIterator[Interpreter]:
        """The interpreter of an order, built and warm; it stays for as long as it is held. Raises StartFailed."""
        if asked is None:
            yield self.base
            return
        async with self.environments.hold(Wanted(tuple(asked.requirements), uid), tell) as built:
            interpreter = self._interpreter(built, uid)
            await interpreter.ready()
            yield interpreter
        self.close_idle(time.monotonic())  # nothing is awaited here: ranks may run, and nobody knows of them yet

    @property
    def warm_keys(self) -> frozenset[str]:
        return frozenset(self._kept)

    @property
    def warm_processes(self) -> int:
        """The base's included."""
        return 1 + len(self._kept)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            self.close_idle(time.monotonic())

    def close_idle(self, now_s: float, *, most: int = MOST_WARM) -> None:
        """Close warm processes that nothing was forked from for long, and the least recently used beyond `most`.
        Ranks that were forked from one go on: their guardian does not depend on it."""
        free = sorted(self._kept.keys() - self.environments.held, key=lambda key: self._kept[key].used_s)
        surplus = len(self._kept) - most
        gone = [key for index, key in enumerate(free) if index < surplus or now_s - self._kept[key].used_s > IDLE_S]
        for key in gone:
            closing = asyncio.ensure_future(self._kept.pop(key).warm.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """The base's warm process too."""
        await self.environments.close()
        await asyncio.gather(*self._closing, *(kept.warm.close() for kept in self._kept.values()))
        await self.base.warm.close()

    def _interpreter(self, built: Built, uid: int | None) -> Interpreter:
        node_env = _of_environment(self.base.node_env, built)
        if uid is not None:
            return Interpreter(self.base.warm, built.python, node_env, venv=built.venv, brings=built.provides)
        return Interpreter(self._warm(built), built.python, node_env)

    def _warm(self, built: Built) -> WarmProcess:
        now_s = time.monotonic()
        kept = self._kept.get(built.key)
        if kept is None:
            env = _of_environment(self.warm_env, built)
            warm = WarmProcess(python=built.python, env=env, log_path=self.environments.warm_log_path(built.key))
            kept = self._kept[built.key] = _Kept(warm, now_s)
            kept.warm.start(on_ready=lambda: None)
            self.close_idle(now_s)
        kept.used_s = now_s
        return kept.warm


def open_interpreters(
    warm: WarmProcess,
    environ: Mapping[str, str],
    isolation: Isolation,
    *,
    python: str,
    warm_env: Mapping[str, str],
    directory: Path,
    limit_bytes: int,
    live: Callable[[], Iterable[tuple[GroupOrder, int | None]]],
) -> Interpreters:
    """On top of `python`, whose warm process is `warm`. `live` are the orders whose ranks run, or may soon, and
    their users."""
    node_env = environment.node_environment(environ, python=python)
    operators = {name: value for name, value in environ.items() if name in OPERATORS_VARIABLES}
    build_env = {**node_env, **operators, **warm_env}
    builder = PipBuild(python, build_env, isolation.cgroups)
    environments = Environments(directory, builder, limit_bytes, used=lambda: {*interpreters.warm_keys, *of_groups()})

    def of_groups() -> Iterable[str]:
        asked = ((order.desired.launch.environment, uid) for order, uid in live())
        return [environments.key(Wanted(tuple(env.requirements), uid)) for env, uid in asked if env is not None]

    all_warm_env = {**environment.warm_environment(environ, python=python), **warm_env}
    interpreters = Interpreters(Interpreter(warm, python, node_env), environments, all_warm_env)
    return interpreters


def _of_environment(env: Mapping[str, str], built: Built) -> dict[str, str]:
    """With the environment's programs first on PATH, before those of the node's Python."""
    path = environment.node_environment(env, python=built.python)["PATH"]
    return {**env, "PATH": path, "VIRTUAL_ENV": built.venv}
