"""What this machine can do: its devices, their memory, and how long a step takes on them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from mirai_ds.config import RunConfig
from mirai_ds.model import GPT, initialise, next_token_loss
from mirai_ds.planning.devices import GIB, Device, fits
from mirai_ds.planning.flops import training_flops
from mirai_ds.planning.memory import predict
from mirai_ds.runtime.launch import visible_gpus

TIMED_STEPS = 3  # after one that is not counted; the fastest counts, since others may work here too


@dataclass(frozen=True)
class Machine:
    """ranks: GPUs, or one without any.  memory: GiB that each may use."""

    ranks: int
    device: Device

    @property
    def gpu(self) -> bool:
        """Whether it trains on GPUs."""
        return self.device.gpu

    def sentence(self) -> str:
        """What there is, for people."""
        cores = f"no GPU, {self.device.memory:.0f} GiB of memory free"
        return f"{self.ranks} x {self.device.name}, {self.device.memory:.0f} GiB each" if self.gpu else cores


def this_machine() -> Machine:
    """The GPUs that this process may use; without any the CPU and the memory that is free now."""
    gpus = visible_gpus()
    if not gpus or not torch.cuda.is_available():
        memory = psutil.virtual_memory().available / GIB
        return Machine(1, Device(f"cpu:{memory:.1f}", memory))
    facts = torch.cuda.get_device_properties(0)
    return Machine(gpus, Device(facts.name, facts.total_memory / GIB))


def largest_micro_batch(config: RunConfig, machine: Machine) -> int | None:
    """The largest micro batch of the run, a divisor of a rank's share of its batch, whose step fits into a rank's
    memory by the planner's count; None: not even one image does."""
    ranks = min(machine.ranks, config.train.global_batch_size)  # of a single image one rank is started
    share = config.train.global_batch_size // ranks
    for micro in (n for n in range(share, 0, -1) if share % n == 0):
        one = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": micro})})
        peak = predict(one, ranks, device=machine.device.kind).peak.total
        if fits(peak, machine.device, ranks):
            return micro
    return None


def seconds_a_step(config: RunConfig, machine: Machine) -> float:
    """Measured here and now: the next-token step of the model at the run's micro batch on one device, eagerly, times
    what the method's FLOPs are more.  What compilation gains on a GPU and what ranks lose in talking is left out."""
    device = torch.device(machine.device.kind)
    micro = config.train.micro_batch_size or 1
    rounds = max(1, config.train.global_batch_size // (micro * machine.ranks))
    gpt = GPT(config.model)
    initialise(gpt, 0, config.model.init_std)
    gpt.to(device)
    optimizer = torch.optim.AdamW(gpt.parameters(), fused=True)
    tokens = torch.randint(config.model.vocab_size, (micro, config.model.block_size), device=device)
    labels = torch.zeros(micro, dtype=torch.int64, device=device)
    times = []
    for _ in range(1 + TIMED_STEPS):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision != "fp32"):
            loss = next_token_loss(gpt(tokens[:, :-1], labels).logits, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        times.append(time.perf_counter() - began)
    plain = min(times[1:]) * rounds
    whole, part = (training_flops(config.model, config.foresight, config.model.width, on) for on in (True, False))
    return plain * whole / part


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
