"""A peer's training loop as an arm of a race: their model, loss, optimizer and average from their checkout, in the
order in which their script calls them.  Their data loading and their logs are left out."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mirai_ds.benchmarks.arms import obey

SCRIPTS = {"Mirai": "autoregressive.train.train_c2i_Mirai_E", "LlamaGen": "autoregressive.train.train_c2i"}
DROPOUT = {"resid_dropout_p": 0.1, "ffn_dropout_p": 0.1, "drop_path_rate": 0.0, "token_dropout_p": 0.1}
DEPTHS = {"GPT-B": 8, "GPT-L": 16, "GPT-XL": 24}  # block whose states are aligned
HEADS, COEFFICIENT, CLIP = 3, 2.0, 1.0
BATCHES = 64  # that are drawn and used in turn


class PeerLoop:
    """One step of `train_c2i_Mirai_E.py` (owner Mirai) or `train_c2i.py` (LlamaGen): bf16 autocast, dropout on."""

    def __init__(self, folder: Path, owner: str, size: str, batch: int, compiled: bool) -> None:
        sys.path.insert(0, str(folder / owner))
        sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # imported, and used for logs only
        self.script, self.device = importlib.import_module(SCRIPTS[owner]), torch.device("cuda", 0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as their scripts set them
        self.aligned = owner == "Mirai"
        build = self.script.GPT_models[size]
        settings: dict[str, Any] = {
            "vocab_size": 16384, "block_size": 256, "num_classes": 1000, "cls_token_num": 1, "model_type": "c2i",
            **DROPOUT,
        }  # fmt: skip
        self.teacher = None
        if self.aligned:
            width = {"GPT-B": 768, "GPT-L": 1024, "GPT-XL": 1280}[size]
            settings |= {"encoder_depth": DEPTHS[size], "z_dims": [width], "num_heads": HEADS}
            self.teacher = build(**settings).to(self.device).eval().requires_grad_(False)
        self.raw = build(**settings).to(self.device)
        self.ema = copy.deepcopy(self.raw).requires_grad_(False)
        self.optimizer = self.script.creat_optimizer(self.raw, 5e-2, 1e-4, (0.9, 0.95), logging.getLogger())
        self.script.update_ema(self.ema, self.raw, decay=0)
        self.model = DistributedDataParallel(torch.compile(self.raw) if compiled else self.raw, device_ids=[0])
        self.model.train()
        self.ema.eval()
        if self.teacher is not None:
            self.teacher.load_state_dict(self.raw.state_dict())
        self.scaler = torch.amp.GradScaler("cuda", enabled=False)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 16384, (BATCHES, batch, 256), generator=generator).pin_memory()
        self.labels = torch.randint(0, 1000, (BATCHES, batch), generator=generator).pin_memory()
        self.done = 0

    def step(self) -> float:
        """Their loop's body.  It reads every loss in every step."""
        number = self.done % BATCHES
        self.done += 1
        tokens = self.tokens[number].to(self.device, non_blocking=True)
        labels = self.labels[number].to(self.device, non_blocking=True)
        inputs = {"cond_idx": labels, "idx": tokens[:, :-1]}
        with torch.amp.autocast("cuda", dtype=torch.bfloat16):
            _, *projected, primary = self.model(**inputs, targets=tokens)
        loss, heads = primary, []
        if self.teacher is not None:
            with torch.no_grad():
                states = self.teacher.forward_ema(**inputs, targets=None)
            heads = self.script.calculate_foresight_loss([states], projected[0])
            loss = primary + sum(head * COEFFICIENT for head in heads)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.script.update_ema(self.ema, self.raw)
        if self.teacher is not None:
            self.teacher.load_state_dict(self.ema.state_dict())
        read = [float(value.item()) for value in (loss, *heads, primary)]
        return read[0]

    def launch(self) -> float:
        """The same: nothing of it can be left out."""
        return self.step()

    def parts(self) -> list[tuple[Any, str, str]]:
        """Not told apart."""
        return []


def main() -> None:
    """Build the loop that the job names and obey."""
    job = json.loads(sys.argv[1])["settings"]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1)
    torch.manual_seed(0)
    obey(PeerLoop(Path(job["folder"]), job["owner"], job["size"], job["batch"], job["compiled"]))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # without waiting for compilers' helpers
