"""What happens to torch's process groups when a rank is done with them."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

SCRIPT = """
    import gc, weakref
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def train():
        dist.init_process_group("gloo")
        subgroup = dist.new_group([0, 1])
        model = DistributedDataParallel(torch.nn.Linear(8, 1), process_group=subgroup)
        model(torch.randn(4, 8)).sum().backward()
        groups = [weakref.ref(dist.group.WORLD), weakref.ref(subgroup)]
        dist.destroy_process_group()
        return groups

    groups = train()
    gc.collect()
    print("destroyed while Python ran:", sum(group() is None for group in groups))
"""


@pytest.mark.parametrize("env", [{}, {"PYTHONHASHSEED": "1"}], ids=["warm", "cold"])
async def test_no_gloo_group_is_destroyed_before_the_rank_ends(workbench: Any, env: dict[str, str]) -> None:
    attempt = workbench.attempt(f"python {workbench.script(SCRIPT)}", ranks=2, env=env)
    exits = await attempt.run()
    assert {start["warm"] for start in attempt.starts} == {not env}
    assert [end["exit_code"] for end in exits] == [0, 0], exits
    for rank in range(2):
        assert workbench.server.text(attempt.id, rank=rank) == "destroyed while Python ran: 0\n"
