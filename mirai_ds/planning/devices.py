"""Devices by what their makers print, and what of their memory tensors can have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mirai_ds.config import UserError
from mirai_ds.config.yaml_text import number_in

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """memory: GiB a process sees; bf16 and fp32: peak dense FLOP/s of a matrix product (fp32 without TF32, as training
    runs); link: bytes/s to a GPU of the same node, one way; network: bytes/s of a GPU's share of its node's network,
    one way.  0 = not known."""

    name: str
    memory: float
    bf16: float = 0.0
    fp32: float = 0.0
    link: float = 0.0
    network: float = 0.0

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return not self.name.startswith("cpu:")

    @property
    def kind(self) -> str:
        """PyTorch's name of it: cuda or cpu."""
        return "cuda" if self.gpu else "cpu"

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in a run's precision."""
        return self.fp32 if precision == "fp32" else self.bf16


# Memory as torch.cuda reports it.  Links: NVLink 3 and 4, PCIe 4.0 x16.  Networks are assumptions: one 200 Gb/s port a
# GPU for A100, one 400 Gb/s port for H100 and H200, 100 Gb/s a node of 8 for the others.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40g", 39.4, 312e12, 19.5e12, 300e9, 25e9),
        Device("a100-80g", 79.2, 312e12, 19.5e12, 300e9, 25e9),
        Device("h100-80g", 79.1, 989e12, 67e12, 450e9, 50e9),
        Device("h200-141g", 139.8, 989e12, 67e12, 450e9, 50e9),
        Device("l40s", 44.4, 362e12, 91.6e12, 32e9, 1.6e9),
        Device("rtx4090", 23.6, 165e12, 82.6e12, 32e9, 1.6e9),
    )
}
LINK_EFFICIENCY = 0.8  # of the printed rates, in a collective of large messages: an assumption


def find_device(name: str) -> Device:
    """A row of `DEVICES`, or `cpu:GIB`.  Raises UserError, listing them."""
    if name in DEVICES:
        return DEVICES[name]
    kind, colon, size = name.partition(":")
    memory = number_in(size)
    if kind == "cpu" and colon and memory is not None and 0 < memory < math.inf:
        return Device(f"cpu:{memory:g}", float(memory))
    raise UserError(f"--device {name}: not known; use one of {', '.join(DEVICES)}, or cpu:GIB (e.g. cpu:24)")


@dataclass(frozen=True)
class Allowance:
    """GiB beside tensors, by assumption: CUDA context and kernels, cuBLAS workspaces, NCCL's buffers; and the share of
    the peak that the caching allocator loses to rounding and fragmentation."""

    fixed: float
    share: float

    @classmethod
    def of(cls, device: Device, world: int) -> Allowance:
        """None on a CPU, where the allocator is malloc and Python's own 1 GiB is counted."""
        return cls(0.5 + 0.1 + (0.4 if world > 1 else 0.0), 0.05) if device.gpu else cls(1.0, 0.0)


MARGIN = 0.05  # of the device's memory stays free


def needed(peak: float, allowance: Allowance) -> float:
    """Bytes of device memory for tensors of `peak` bytes."""
    return peak * (1 + allowance.share) + allowance.fixed * GIB


def fits(peak: float, device: Device, world: int) -> bool:
    """Whether `peak` bytes of tensors fit the device with a margin."""
    return needed(peak, Allowance.of(device, world)) <= (1 - MARGIN) * device.memory * GIB
