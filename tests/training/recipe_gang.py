"""Trains small cases of any recipe on a gang of real processes (gloo, CPU) and weighs what each rank holds:
`python recipe_gang.py RANKS < cases.json`, each case `[recipe, arguments]`. A single rank also weighs all its tensors.

One start serves many cases: torch is imported once, the ranks are forked, and each case gets its own mesh.
"""

import functools
import json
from typing import Any

from forked_ranks import answers, serve


@functools.cache
def _trained(cases: str, ranks: int) -> list[Any]:
    return answers(__file__, json.loads(cases), ranks=ranks, timeout_s=180 + 60 * ranks)


def trained(cases: dict[str, list[Any]], *, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """What became of each case, by its name and rank. Computed once per session."""
    return dict(zip(cases, _trained(json.dumps(list(cases.values())), ranks), strict=True))


class Batches:
    """Batches that depend on the step alone, or those of the recipe's own data: a rank gets its part of each."""

    def __init__(self, recipe: str, config: Any, *, rank: int, ways: int) -> None:
        part = config.train.global_batch // ways
        self.recipe, self.config, self.step = recipe, config, 0
        self.own = slice(rank * part, (rank + 1) * part)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        import torch

        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        return {name: whole[self.own] for name, whole in batch_of(self.recipe, self.config, generator).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def batch_of(recipe: str, config: Any, generator: Any) -> dict[str, Any]:
    """A global batch from the generator."""
    import torch

    count = config.train.global_batch
    if recipe == "lm":
        shape = (count, config.data.seq_len + 1)
        return {"tokens": torch.randint(config.model.vocabulary, shape, generator=generator)}
    if recipe == "vision":
        shape = (count, config.picture.channels, config.picture.size, config.picture.size)
        labels = torch.randint(config.model.classes, (count,), generator=generator)
        return {"image": torch.randn(shape, generator=generator), "label": labels}
    words = torch.randint(1 << 32, (count, 26), generator=generator)
    labels = (torch.rand(count, generator=generator) < 0.3).float()
    return {"dense": torch.randn(count, 13, generator=generator), "categories": words, "label": labels}


class Scales:
    """Watches a training: the losses, and after the backward of the last step what gradients weigh."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.loss, self.grad_norm, self.gradients = trainer, [], [], 0
        self.ends_step = lambda: None

    def after_backward(self, step: int, loss: float, grad_norm: Any) -> bool:
        self.gradients = bytes_of(p.grad for p in self.trainer.layout.parameters() if p.grad is not None)
        return True

    def after_step(self, facts: Any) -> None:
        self.loss.append(facts.loss)
        self.grad_norm.append(facts.grad_norm)
        self.ends_step()


def bytes_of(tensors: Any) -> int:
    """Of this rank's parts."""
    return sum(own(tensor).numel() * own(tensor).element_size() for tensor in tensors)


def own(tensor: Any) -> Any:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.elem if isinstance(local, AsyncCollectiveTensor) else local


class Saved:
    """While entered, weighs what autograd keeps, each storage once and while it is alive: `peak` bytes."""

    def __init__(self, without: Any) -> None:
        self.without, self.alive, self.now, self.peak = without, {}, 0, 0

    def __enter__(self) -> "Saved":
        import torch

        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept[1])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: Any) -> Any:
        storage = own(tensor).untyped_storage()
        where = storage.data_ptr()
        if where in self.without or not where:
            return None, tensor
        holder = self.alive.get(where, lambda: None)()
        if holder is None:
            import weakref

            holder = Holder(self, where, storage.nbytes())
            self.alive[where] = weakref.ref(holder)
        return holder, tensor


class AllTensors:
    """While entered, weighs all tensors by torch's own tracker: `peak` bytes. It knows no DTensors."""

    def __init__(self, trainer: Any, scales: Scales) -> None:
        from torch.distributed._tools.mem_tracker import MemTracker

        self.tracker, self.peak = MemTracker(), 0
        self.tracker.track_external(*trainer.layout.modules, *trainer.optimizers)
        scales.ends_step = self.tracker.reset_mod_stats

    def __enter__(self) -> "AllTensors":
        self.tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.tracker.__exit__(*error)
        by_device = self.tracker.get_tracker_snapshot("peak").items()
        (of_device,) = (sizes for device, sizes in by_device if device.type == "cpu")  # the other is meta
        self.peak = next(size for kind, size in of_device.items() if str(getattr(kind, "value", kind)) == "Total")


class Holder:
    """Stands for a storage that autograd keeps; whoever keeps it, keeps this."""

    def __init__(self, saved: Saved, where: int, size: int) -> None:
        self.saved, self.where, self.size = saved, where, size
        saved.now += size
        saved.peak = max(saved.peak, saved.now)

    def __del__(self) -> None:
        self.saved.now -= self.size
        self.saved.alive.pop(self.where, None)


def run_case(recipe: str, args: dict[str, Any]) -> dict[str, Any]:
    from importlib import import_module

    import torch.distributed as dist
    from phalanx.recipes.catalog import read
    from phalanx.recipes.parse import RecipeError
    from phalanx_worker.training import monitor
    from phalanx_worker.training.loop import train
    from phalanx_worker.training.mesh import make_world, own_device

    try:
        config = read(recipe, args).placed(dist.get_world_size())
    except RecipeError as error:
        return {"error": str(error), "loss": []}
    world = make_world(config.parallel, own_device(config.device))
    batches = Batches(recipe, config, rank=world.batch_rank, ways=config.parallel.batch_ways)
    trainer = import_module(f"phalanx_worker.training.recipes.{recipe}").make(config, world, batches=batches)
    scales = Scales(trainer)
    trainer.watchers = [scales]
    monitor.peak_flops = lambda *_: None  # it multiplies matrices, which would be weighed too
    parameters = list(trainer.layout.parameters())
    saved = Saved({own(parameter).untyped_storage().data_ptr() for parameter in parameters})
    with saved if dist.get_world_size() > 1 else AllTensors(trainer, scales) as weighed:
        train(trainer)
    states = [value for o in trainer.optimizers for state in o.state.values() for value in state.values()]
    return {
        "loss": scales.loss,
        "grad_norm": scales.grad_norm,
        "parameters": bytes_of(parameters),
        "gradients": scales.gradients,
        "optimizer": bytes_of(value for value in states if hasattr(value, "ndim") and value.ndim),
        "peak": weighed.peak,
    }


def main() -> None:
    import phalanx_worker.training.recipes.lm
    import phalanx_worker.training.recipes.recsys
    import phalanx_worker.training.recipes.vision  # before forking, once for all ranks  # noqa: F401

    _, seen = serve(lambda case, _: run_case(*case))
    print(json.dumps([list(of_ranks) for of_ranks in zip(*seen, strict=True)]))


if __name__ == "__main__":
    main()
