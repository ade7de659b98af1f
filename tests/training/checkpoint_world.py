"""Real processes that save and restore: `python checkpoint_world.py SCENARIO DIRECTORY`, the answer as JSON.

torch is imported once; every gang is forked from the process that did it, which itself starts no thread.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 240


def run(scenario: str, directory: Path, *arguments: object) -> Any:
    """What the scenario answers; for use in tests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, scenario, str(directory), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def gang(ranks: int, body: Callable[[int], Any]) -> list[Any]:
    """`body(rank)` in a forked gang of its own: what each rank answered, None for one that was killed. Once one is
    killed the others are too, as a node runner would do."""
    with tempfile.TemporaryDirectory() as directory:
        children = {os.fork() or _rank(rank, ranks, body, Path(directory)): rank for rank in range(ranks)}
        codes: dict[int, int] = {}
        while children:
            pid, status = os.wait()
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            if codes and min(codes.values()) < 0:
                for other in children:
                    os.kill(other, signal.SIGKILL)
        assert min(codes.values()) < 0 or max(codes.values()) == 0, codes  # the peers of a killed one may fail
        paths = [Path(directory, f"{rank}.json") for rank in range(ranks)]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def _rank(rank: int, ranks: int, body: Callable[[int], Any], directory: Path) -> int:
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
        answer = body(rank)
        dist.barrier()
        (directory / f"{rank}.json").write_text(json.dumps(answer))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


class Number:
    """Tensors that say which step they are of, as every rank has them: each rank saves its share."""

    def __init__(self, step: int):
        import torch

        self.tensors = {f"tensor {k}": torch.full((3000,), float(step)) for k in range(4)}

    def is_of(self, step: int) -> bool:
        return all(bool((tensor == step).all()) for tensor in self.tensors.values())

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass  # loaded in place


class Training:
    """A small model with AdamW, in a layout: `fsdp`, `ddp` or `plain`, on the tokens beside its checkpoints."""

    def __init__(self, layout: str, url: str, **config: Any):
        import torch
        import torch.distributed as dist
        from phalanx.recipes.checkpoint import CheckpointConfig
        from phalanx.recipes.data import DataConfig
        from phalanx_worker.training.checkpoint import Checkpointer
        from phalanx_worker.training.data.stream import open_stream
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel

        torch.manual_seed(int(os.getpid()) if layout == "plain" else 0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 33), torch.nn.Tanh(), torch.nn.Linear(33, 10))
        if layout == "fsdp":
            fully_shard(model)
        self.model = DistributedDataParallel(model) if layout == "ddp" else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        world = {"dp_rank": dist.get_rank(), "dp_size": dist.get_world_size()}
        data = DataConfig(format="tokens", paths=(f"{url}-tokens.bin",), vocab_size=256, seq_len=64)
        self.stream = open_stream(data, **world, batch=16, seed=5)
        self.checkpointer = Checkpointer(CheckpointConfig(**config), url)
        self.losses: list[float] = []

    def step(self, count: int) -> "Training":
        import torch
        import torch.distributed as dist

        for _ in range(count):
            batch = next(self.stream)
            inputs, target = batch["tokens"][:, :-1] / 256, batch["tokens"][:, -1] % 10
            loss = torch.nn.functional.cross_entropy(self.model(inputs), target)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            self.losses.append(float(mean) / dist.get_world_size())
        return self

    def state(self) -> dict[str, Any]:
        return {"model": _Model(self), "optimizer": _Optimizer(self), "stream": self.stream}

    def sums(self) -> dict[str, float]:
        """A number for each tensor of the whole state that any other value would change."""
        from torch.distributed.tensor import DTensor

        whole = {**_Model(self).state_dict(), **_Optimizer(self).state_dict()}
        tensors = {
            n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in whole.items() if hasattr(v, "double")
        }
        return {name: tensor.double().pow(2).sum().item() for name, tensor in sorted(tensors.items())}


class _Model:
    def __init__(self, training: Training):
        self.training = training

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(self.training.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self.training.model, state)


class _Optimizer:
    def __init__(self, training: Training):
        self.training = training

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(self.training.model, self.training.optimizer, options=options)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_optimizer_state_dict(self.training.model, self.training.optimizer, state, options=options)


def layouts(directory: Path) -> Any:
    """FSDP2 on 2 ranks, then 1 rank, then DDP on 2, then FSDP2 again: each goes on from the one before, and is compared
    with a training that nothing disturbed."""

    for name in ("legs", "none"):
        (directory / f"{name}-tokens.bin").write_bytes(random.Random(1).randbytes(20_000))

    def leg(layout: str, first: int, steps: int) -> Callable[[int], Any]:
        def body(_: int) -> Any:
            training = Training(layout, f"file://{directory}/legs")
            restored = training.checkpointer.restore(training.state())
            found = training.sums() if restored else None
            training.step(steps)
            training.checkpointer.save(first + steps, training.state())
            training.checkpointer.finish()
            return {"restored": restored, "found": found, "left": training.sums(), "losses": training.losses}

        return body

    legs = [("fsdp", 2, 0, 3), ("plain", 1, 3, 2), ("ddp", 2, 5, 3), ("fsdp", 2, 8, 2)]
    answers = [gang(ranks, leg(layout, first, steps)) for layout, ranks, first, steps in legs]
    whole = gang(2, lambda _: Training("fsdp", f"{directory}/none").step(10).losses)
    return {"legs": answers, "undisturbed": whole[0]}


def crashes(directory: Path, ranks: str, stride: str) -> Any:
    """Kill a rank (each in turn) at the k-th change to the storage of its second save, for every `stride`-th k, until
    the save outlives it; then what a new gang restores."""
    answers = []
    for victim in range(int(ranks)):
        k = 1
        while True:
            place = directory / f"{victim}-{k}"
            killed = None in gang(int(ranks), lambda rank, k=k, place=place, v=victim: _save_twice(rank, v, k, place))
            [[found, after]] = gang(1, lambda _, place=place: _what_is_left(place))
            answers.append({"victim": victim, "k": k, "killed": killed, "restored": found, "after": after})
            if not killed:
                break
            k += int(stride)
    return answers


def one_fails(directory: Path) -> Any:
    """What each of two ranks says when rank 1 alone cannot write its share of the last save, and then, in a new gang,
    cannot read its share of the one before; and what a gang finds once the storage is back."""
    place = directory / "kept"
    return [gang(2, lambda rank, part=part: part(rank, place)) for part in (_cannot_write, _cannot_read, _restored)]


def _cannot_write(rank: int, place: Path) -> str | None:
    checkpointer = _checkpointer(place)
    checkpointer.save(10, {"number": Number(10)})
    checkpointer.save(20, {"number": Number(20)})
    if rank == 1:
        _fail_at("wb")
    checkpointer.save(30, {"number": Number(30)})
    return _said(checkpointer.finish)


def _cannot_read(rank: int, place: Path) -> str | None:
    if rank == 1:
        _fail_at("rb")
    return _said(lambda: _checkpointer(place).restore({"number": Number(0)}))


def _restored(_: int, place: Path) -> int | None:
    return _checkpointer(place).restore({"number": Number(0)})


def _checkpointer(place: Path) -> Any:
    from phalanx.recipes.checkpoint import CheckpointConfig
    from phalanx_worker.training import checkpoint_store
    from phalanx_worker.training.checkpoint import Checkpointer

    checkpoint_store.READ_PAUSES_S = (0.0, 0.0)
    return Checkpointer(CheckpointConfig(asynchronous=False), str(place))


def _said(act: Callable[[], Any]) -> str | None:
    from phalanx_worker.training.checkpoint_store import CheckpointError

    try:
        act()
    except CheckpointError as error:
        return str(error)
    return None


def _fail_at(mode: str) -> None:
    """From now on no file is opened in this mode."""
    from fsspec.implementations.local import LocalFileSystem

    opened = LocalFileSystem.open

    def call(self: Any, path: str, how: str = "rb", **named: Any) -> Any:
        if how == mode:
            raise OSError(5, "Input/output error")
        return opened(self, path, how, **named)

    LocalFileSystem.open = call


def _save_twice(rank: int, victim: int, k: int, place: Path) -> int:
    from phalanx.recipes.checkpoint import CheckpointConfig
    from phalanx_worker.training.checkpoint import Checkpointer

    checkpointer = Checkpointer(CheckpointConfig(keep_last=1, asynchronous=False), str(place))
    checkpointer.save(10, {"number": Number(10)})
    if rank == victim:
        _die_at(k)
    checkpointer.save(20, {"number": Number(20)})
    checkpointer.finish()
    return checkpointer.failures


def _what_is_left(place: Path) -> Any:
    from phalanx.recipes.checkpoint import CheckpointConfig
    from phalanx_worker.training.checkpoint import Checkpointer

    checkpointer, number = Checkpointer(CheckpointConfig(), str(place)), Number(0)
    step = checkpointer.restore({"number": number})
    assert number.is_of(step)
    checkpointer.save(20 if step == 10 else 30, {"number": Number(30)})
    checkpointer.finish()
    return step, Checkpointer(CheckpointConfig(), str(place)).restore({"number": number})


def _die_at(k: int) -> None:
    """SIGKILL to this process at its k-th change from now on: half of what was to be written is, or nothing is done."""
    from fsspec.implementations.local import LocalFileSystem
    from phalanx_worker.training.checkpoint_writer import SummingStream

    changes = 0

    def dies(before: Callable[[Any], None] | None, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *given: Any, **named: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == k:
                if before:
                    before((self, *given))
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(self, *given, **named)

        return call

    def write_half(given: Any) -> None:
        stream, data = given
        stream._stream.write(bytes(data)[: len(data) // 2])
        stream._stream.flush()

    SummingStream.write = dies(write_half, SummingStream.write)
    for name in ("open", "mv", "rm", "rm_file", "makedirs"):
        setattr(LocalFileSystem, name, dies(None, getattr(LocalFileSystem, name)))


def main() -> None:
    # Before forking, once for all gangs; nothing of it starts a thread.
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp  # noqa: F401
    from phalanx_worker.training import checkpoint  # noqa: F401
    from phalanx_worker.training.data import stream  # noqa: F401

    scenarios = {"layouts": layouts, "crashes": crashes, "one_fails": one_fails}
    name, directory, *arguments = sys.argv[1:]
    print(json.dumps(scenarios[name](Path(directory), *arguments)))


if __name__ == "__main__":
    main()
