"""What a start imports: nothing that its first step does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys

CODE = """
import json, sys
from mirai_ds.train import __main__, nonfinite, preflight, run_folder, session
from mirai_ds.train.hooks import registry
import deepspeed
from deepspeed.runtime import compiler
from mirai_ds.engine import start
before = compiler.compile
start.leave_muon_uncompiled()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # as `is_zero_supported_optimizer` does
print(json.dumps([compiler.compile is before, list(sys.modules)]))
"""


def test_imports_of_a_start() -> None:
    """Before data: no plotting, tables, image models, TensorBoard or scikit-learn; after ZeRO has looked at its
    optimizers, Muon among them, no torch compiler."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=env)
    restored, modules = json.loads(done.stdout.splitlines()[-1])
    assert restored
    assert "deepspeed.runtime.zero.muon.original_muon" in modules
    unwanted = {"pandas", "matplotlib", "timm", "torchvision", "tensorboard", "sklearn", "torch._inductor.compile_fx"}
    assert unwanted & set(modules) == set()
