"""Measures all-reduces as a preflight does, on a gang of real processes that are told what nodes they are on:
`python preflight_gang.py RANKS < cases.json`.

A case is how many ranks each node has (`nodes`), and who is `slow`: a rank, in all-reduces `within` its node or
`between` nodes. What comes back is what each rank measured.
"""

import json
import os
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from forked_ranks import answers, serve

BYTES = 64 << 10  # to reduce: it takes a small part of the delay
DELAY_S = 0.1


def measured(cases: dict[str, Any], *, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Of each case by its name, what every rank measured, as fields of `Figures`."""
    return dict(zip(cases, answers(__file__, list(cases.values()), ranks=ranks, timeout_s=60), strict=True))


def run_case(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from phalanx_worker.training import preflight

    rank, ends = dist.get_rank(), list(accumulate(case["nodes"]))
    node_of = [sum(end <= each for end in ends) for each in range(ends[-1])]
    os.environ["GROUP_RANK"] = str(node_of[rank])
    os.environ["LOCAL_RANK"] = str(node_of[:rank].count(node_of[rank]))
    original = dist.all_reduce

    def slowed(tensor: Any, *, group: Any) -> None:
        crosses = len({node_of[each] for each in dist.get_process_group_ranks(group)}) > 1
        if case.get("slow") == [rank, "between" if crosses else "within"]:
            time.sleep(DELAY_S)
        original(tensor, group=group)

    preflight._REDUCED_BYTES = BYTES
    dist.all_reduce = slowed
    try:
        intra, inter = preflight.all_reduces(torch.device("cpu"))
    finally:
        dist.all_reduce = original
    return {"rank": rank, "node": node_of[rank], "intra_bytes_s": intra, "inter_bytes_s": inter}


def main() -> None:
    import phalanx_worker.training.preflight  # before forking, once for all ranks  # noqa: F401

    cases, seen = serve(run_case)
    print(json.dumps([[one[i] for one in seen] for i in range(len(cases))]))


if __name__ == "__main__":
    main()
