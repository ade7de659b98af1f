"""The cases of 2 ranks that the fast tests share: one start of a gang for all of them."""

from training_gang import case

PIPELINE = {"pipeline": 2, "microbatches": 4}
INTERLEAVED = {**PIPELINE, "schedule": "interleaved"}
SGD = {"name": "sgd", "lr": 0.3, "momentum": 0.0, "clip": 0.0}
LOCAL_SGD = {"local": {"every": 1, "outer_lr": 1.0, "outer_momentum": 0.0}}

ONE = {"one rank": case()}

LAYOUTS = {
    "DDP": case(parallel={"data": 2}),
    "DDP, accumulated": case(parallel={"data": 2}, train={"accumulate": 2}),
    "FSDP2": case(parallel={"shard": 2}),
    "tensor": case(parallel={"tensor": 2}),
    "context": case(parallel={"context": 2}),
    "pipeline, GPipe": case(parallel={**PIPELINE, "schedule": "gpipe"}),
    "pipeline, 1F1B": case(parallel=PIPELINE),
    "pipeline, interleaved": case(parallel=INTERLEAVED),
}

FAST = {
    **LAYOUTS,
    "fp16 hook": case(parallel={"compress": "fp16"}),
    "DDP, SGD": case(optim=SGD),
    "local SGD": case(optim=SGD, parallel=LOCAL_SGD),
    "local SGD, grown": case(
        stop_at=4, optim=SGD, parallel={**LOCAL_SGD, "shard": 2}, then={"parallel": {**LOCAL_SGD, "data": 2}}
    ),
}
