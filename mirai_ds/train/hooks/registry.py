"""The hooks by their names in the configuration (`hooks:`), and how they are built."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mirai_ds.config import ConfigError
from mirai_ds.config.own import import_own
from mirai_ds.train.hooks.checkpoint import CheckpointHook
from mirai_ds.train.hooks.eval_fid import EvalFidHook
from mirai_ds.train.hooks.eval_loss import EvalLossHook
from mirai_ds.train.hooks.log import LogHook, Sinks
from mirai_ds.train.hooks.report import ReportHook
from mirai_ds.train.hooks.sample import SampleHook
from mirai_ds.train.hooks.spike import SpikeHook
from mirai_ds.train.hooks.stop import StopHook
from mirai_ds.train.loop import Hook

# The default order: log opens the sinks; a spike is judged before its state is measured or saved; of the measuring
# ones save comes last, then the request to stop; the report is the very end.
HOOKS: dict[str, Callable[[Sinks], Hook]] = {
    "log": LogHook, "spike": SpikeHook, "eval-loss": EvalLossHook, "sample": SampleHook, "eval-fid": EvalFidHook,
    "checkpoint": CheckpointHook, "stop": StopHook, "report": ReportHook,
}  # fmt: skip


def build_hooks(names: Sequence[str], sinks: Sinks) -> dict[str, Hook]:
    """Hooks in the order of `names`: of `HOOKS`, or `package.module:Class` of your own, called with the sinks.

    Raises ConfigError for what cannot be imported or is no hook.
    """
    return {name: (HOOKS.get(name) or _own(name))(sinks) for name in names}


def _own(name: str) -> Callable[[Sinks], Hook]:
    made = import_own(name, "hooks")
    if not (isinstance(made, type) and issubclass(made, Hook)):
        raise ConfigError("hooks", name, "is no subclass of mirai_ds.train.loop.Hook")
    return made
