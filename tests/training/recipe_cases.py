"""The small cases of recipes that the tests share: one start of a gang for all of 1 rank, and one for all of 2."""

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


ONE = {
    "vit": vision(VIT),
    "resnet": vision(RESNET),
    "recsys": recsys(),
    "lm": lm(),
}

TWO = {
    "vit, DDP": vision(VIT, parallel={"data": 2}),
    "vit, FSDP2": vision(VIT, parallel={"shard": 2}),
    "vit, tensor": vision(VIT, parallel={"tensor": 2}),
    "vit, tensor, recompute": vision(VIT, parallel={"tensor": 2, "recompute": "full"}),
    "resnet, DDP": vision(RESNET, parallel={"data": 2}),
    "resnet, FSDP2": vision(RESNET, parallel={"shard": 2, "recompute": "full"}),
    "recsys": recsys(),
    "recsys, accumulated": recsys(train={**TRAIN, "accumulate": 2}),
    "lm, DDP": lm(),
}
