"""The small cases of recipes that tests share. What fast ones need is one start of a gang of 1 rank and one of 2."""

LM_MODEL = {"vocabulary": 64, "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 96}
VIT = {"kind": "vit", "vit": {"patch": 2, "layers": 2, "width": 32, "heads": 4}}
RESNET = {"kind": "resnet", "resnet": {"depths": [1, 1], "width": 8, "groups": 4}}
DLRM = {"rows": 11, "dim": 4, "bottom": [8], "top": [8]}
TRAIN = {"steps": 4, "global_batch": 16, "seed": 7}


def lm(**sections):
    data = {"paths": ["unread"], "seq_len": 32}
    return ["lm", {"data": data, "model": LM_MODEL, "train": TRAIN, "device": "cpu", **sections}]


def vision(model, **sections):
    data = {"format": "digits"}
    optim = {"lr": 3e-3}
    return ["vision", {"data": data, "model": model, "train": TRAIN, "optim": optim, "device": "cpu", **sections}]


def recsys(**sections):
    data = {"format": "criteo", "paths": ["unread"]}
    optim = {"lr": 3e-2, "weight_decay": 0.1}
    return ["recsys", {"data": data, "model": DLRM, "train": TRAIN, "optim": optim, "device": "cpu", **sections}]


PIPELINE = {"pipeline": 2, "microbatches": 4}
BF16 = {"compute": "bf16"}

ONE = {
    "vit": vision(VIT),
    "resnet": vision(RESNET),
    "recsys": recsys(),
}

ONE_SLOW = {
    "lm": lm(),
    "lm, selective": lm(parallel={"recompute": "selective"}),
    "lm, full": lm(parallel={"recompute": "full"}),
    "lm, bf16": lm(precision=BF16),
    "lm, bf16, full": lm(precision=BF16, parallel={"recompute": "full"}),
}

TWO = {
    "vit, DDP": vision(VIT, parallel={"data": 2}),
    "vit, FSDP2": vision(VIT, parallel={"shard": 2}),
    "vit, tensor": vision(VIT, parallel={"tensor": 2}),
    "resnet, DDP": vision(RESNET, parallel={"data": 2}),
    "resnet, FSDP2": vision(RESNET, parallel={"shard": 2}),
    "recsys": recsys(),
    "recsys, accumulated": recsys(train={**TRAIN, "accumulate": 2}),
}

TWO_SLOW = {
    "lm, DDP": lm(),
    "lm, tensor": lm(parallel={"tensor": 2}),
    "vit, tensor, recomputed": vision(VIT, parallel={"tensor": 2, "recompute": "full"}),
    "resnet, FSDP2, recomputed": vision(RESNET, parallel={"shard": 2, "recompute": "full"}),
    "vit, bf16": vision(VIT, precision=BF16),
    "resnet, bf16": vision(RESNET, precision=BF16),
    "recsys, bf16": recsys(precision=BF16),
    "lm, FSDP2": lm(parallel={"shard": 2}),
    "lm, FSDP2, bf16": lm(parallel={"shard": 2}, precision=BF16),
    "lm, context": lm(parallel={"context": 2}),
    "lm, 1F1B": lm(parallel=PIPELINE),
    "lm, GPipe": lm(parallel={**PIPELINE, "schedule": "gpipe"}),
    "lm, interleaved": lm(parallel={**PIPELINE, "schedule": "interleaved"}),
    "lm, sgd": lm(optim={"name": "sgd"}),
    "lm, adafactor": lm(optim={"name": "adafactor"}),
    "lm, FSDP2, adafactor": lm(parallel={"shard": 2}, optim={"name": "adafactor"}),
    "lm, FSDP2, fp8": lm(parallel={"shard": 2}, precision={"compute": "fp8", "emulate": True}),
}

FOUR = {
    "vit, hybrid sharding": vision(VIT, parallel={"data": 2, "shard": 2}),
    "vit, tensor": vision(VIT, parallel={"tensor": 4}),  # of 4 numbers of a patch each has one; 10 classes lie unevenly
    "vit, data × tensor": vision(VIT, parallel={"data": 2, "tensor": 2}),
    "vit, shard × tensor": vision(VIT, parallel={"shard": 2, "tensor": 2}),
    "resnet, hybrid sharding": vision(RESNET, parallel={"data": 2, "shard": 2}),
    "recsys": recsys(),
}

EIGHT = {
    "vit, DDP": vision(VIT, parallel={"data": 8}),
    "vit, hybrid sharding": vision(VIT, parallel={"data": 2, "shard": 4}),
    "vit, data × shard × tensor": vision(VIT, parallel={"data": 2, "shard": 2, "tensor": 2}),
    "resnet, hybrid sharding": vision(RESNET, parallel={"data": 2, "shard": 4}),
    "recsys": recsys(),
}
