"""What a GPU can do at most, as its maker says: FLOP/s by number format, and memory. It owns the table and how a device
is found by name; it refuses to know torch or drivers.

All figures are dense: data sheets often print twice as much, with structured sparsity. They count a multiply and an
add as two operations. A real matrix product reaches 60 to 80 % of them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from types import MappingProxyType

PRECISIONS = ("bf16", "fp16", "fp8", "fp32", "tf32")
TERA = 1e12
GIB = 1 << 30

H100 = "https://www.nvidia.com/en-us/data-center/h100/"
H100_PAPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"  # dense figures, H100 PCIe
H200 = "https://www.nvidia.com/en-us/data-center/h200/"
A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
A10 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"
A30 = "https://www.nvidia.com/content/dam/en-zz/Solutions/data-center/products/a30-gpu/pdf/a30-datasheet.pdf"
A40 = "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf"
L4 = "https://www.nvidia.com/en-us/data-center/l4/"
L40 = "https://www.nvidia.com/en-us/data-center/l40/"
L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
V100 = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
T4 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
HGX = "https://www.nvidia.com/en-us/data-center/hgx/"  # of eight GPUs, with sparsity
MI300X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
MI325X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html"
MI355X = "https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html"


@dataclass(frozen=True)
class Device:
    """One model of GPU. FLOP/s are dense peaks, None where the format has no hardware of its own; `memory_bytes` is
    what the data sheet says, of which the driver keeps up to 6 %."""

    name: str
    bf16_flops: float | None
    fp16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    memory_bytes: int
    source: str

    @property
    def tf32_flops(self) -> float | None:
        """NVIDIA's tensor cores take TF32 at half the rate of bf16, from Ampere on
        (https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf).
        ROCm's libraries compute fp32 as such unless they are told otherwise."""
        return self.bf16_flops / 2 if self.bf16_flops and not self.name.startswith("mi") else None

    def peak_flops(self, precision: str = "bf16") -> float:
        """Dense peak in FLOP/s. ValueError where the device has none for it, or nobody knows such a precision."""
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
        peak = getattr(self, f"{precision}_flops")
        if peak is None:
            has = [name for name in PRECISIONS if getattr(self, f"{name}_flops")]
            raise ValueError(f"{self.name} has no {precision}: use one of {', '.join(has)}")
        return peak


def _device(
    name: str, bf16: float | None, fp16: float, fp8: float | None, fp32: float, memory_gib: int, source: str
) -> Device:
    """A row of the table, in TFLOP/s and GiB."""
    scaled = [None if peak is None else peak * TERA for peak in (bf16, fp8)]
    return Device(name, scaled[0], fp16 * TERA, scaled[1], fp32 * TERA, memory_gib * GIB, source)


# fmt: off
_ROWS = (
    #        name             bf16     fp16     fp8     fp32   GiB  source
    _device("h100-80gb",      989.4,   989.4,  1978.9,   66.9,  80, H100),
    _device("h100-pcie-80gb", 756.0,   756.0,  1513.0,   51.2,  80, H100_PAPER),
    _device("h100-nvl-94gb",  835.5,   835.5,  1671.0,   60.0,  94, H100),
    _device("h200",           989.4,   989.4,  1978.9,   66.9, 141, H200),
    _device("h200-nvl",       835.5,   835.5,  1671.0,   60.0, 141, H200),
    _device("b200",          2250.0,  2250.0,  4500.0,   75.0, 180, HGX),
    _device("a100-40gb",      312.0,   312.0,    None,   19.5,  40, A100),
    _device("a100-80gb",      312.0,   312.0,    None,   19.5,  80, A100),
    _device("a10",            125.0,   125.0,    None,   31.2,  24, A10),
    _device("a30",            165.0,   165.0,    None,   10.3,  24, A30),
    _device("a40",            149.7,   149.7,    None,   37.4,  48, A40),
    _device("l4",             121.0,   121.0,   242.5,   30.3,  24, L4),
    _device("l40",            181.05,  181.05,  362.0,   90.5,  48, L40),
    _device("l40s",           362.05,  362.05,  733.0,   91.6,  48, L40S),
    _device("v100-16gb",       None,   125.0,    None,   15.7,  16, V100),
    _device("v100-32gb",       None,   125.0,    None,   15.7,  32, V100),
    _device("v100-pcie-16gb",  None,   112.0,    None,   14.0,  16, V100),
    _device("v100-pcie-32gb",  None,   112.0,    None,   14.0,  32, V100),
    _device("t4",              None,    65.0,    None,    8.1,  16, T4),
    _device("mi300x",        1307.4,  1307.4,  2614.9,  163.4, 192, MI300X),
    _device("mi325x",        1307.4,  1307.4,  2614.9,  163.4, 256, MI325X),
    _device("mi355x",        2516.6,  2516.6,  5033.2,  157.3, 288, MI355X),
)
# fmt: on

DEVICES = MappingProxyType({device.name: device for device in _ROWS})

ALIASES = MappingProxyType(
    {
        "h100": "h100-80gb",
        "h100-sxm": "h100-80gb",
        "h100-80gb-sxm": "h100-80gb",
        "h100-pcie": "h100-pcie-80gb",
        "h100-nvl": "h100-nvl-94gb",
        "h200-141gb": "h200",
        "h200-sxm": "h200",
        "b200-180gb": "b200",
        "a100": "a100-80gb",
        "v100": "v100-32gb",
        "v100-pcie": "v100-pcie-32gb",
    }
)

_PRODUCTS = (  # a pattern of what drivers call it → its name, the first that fits
    (r"\bH100 NVL", "h100-nvl-94gb"),
    (r"\bH100 PCIe", "h100-pcie-80gb"),
    (r"\bH100\b", "h100-80gb"),
    (r"\bH200 NVL", "h200-nvl"),
    (r"\bH200\b", "h200"),
    (r"\bB200\b", "b200"),
    (r"\bA100.*40GB", "a100-40gb"),
    (r"\bA100\b", "a100-80gb"),
    (r"\bA10\b", "a10"),
    (r"\bA30\b", "a30"),
    (r"\bA40\b", "a40"),
    (r"\bL40S\b", "l40s"),
    (r"\bL40\b", "l40"),
    (r"\bL4\b", "l4"),
    (r"\bV100.*PCIE.*16GB", "v100-pcie-16gb"),
    (r"\bV100.*PCIE", "v100-pcie-32gb"),
    (r"\bV100.*16GB", "v100-16gb"),
    (r"\bV100\b", "v100-32gb"),
    (r"\bT4\b", "t4"),
    (r"\bMI300X\b", "mi300x"),
    (r"\bMI325X\b", "mi325x"),
    (r"\bMI355X\b", "mi355x"),
)


def find(name: str) -> Device:
    """The device of a name such as `h100`, `H100-80GB` or `a100_40gb`. ValueError names the nearest ones."""
    word = re.sub(r"[\s_]+", "-", name.strip().lower())
    word = ALIASES.get(word, word)
    if word in DEVICES:
        return DEVICES[word]
    known = [*DEVICES, *ALIASES]
    near = difflib.get_close_matches(word, known, n=3) or list(DEVICES)
    raise ValueError(f"unknown GPU {name!r}: did you mean {' or '.join(near)}?")


def of_product(product: str) -> Device | None:
    """The device by what its driver calls it (`torch.cuda.get_device_name()`), such as `NVIDIA H100 80GB HBM3`; None
    where the table has none, and for a slice of a GPU (MIG), whose peak is a part of it."""
    if re.search(r"\bMIG\b", product):
        return None
    found = next((name for pattern, name in _PRODUCTS if re.search(pattern, product, re.IGNORECASE)), None)
    return None if found is None else DEVICES[found]
