"""Options of sbatch and srun that pass as they are; those that this package sets itself are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from mirai_ds.config.errors import ConfigError
from mirai_ds.submit.values import one_line

OptionValue = StrictBool | StrictInt | StrictFloat | StrictStr

_NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
_LOG = "the log is RUN/jobs/NAME-ID.log, --run-dir says where"
_TEMPLATE = "the template decides it"
_RANKS = "one rank a GPU: use gpus_per_node, without GPUs ranks_per_node"
_GPUS = "use gpus_per_node, gpu_request and gpu_type"
_COMMAND = "it is for sbatch's command line, not for a job"
_BOTH = {
    "job-name": "use `mirai-ds submit --name`",
    "nodes": "use `mirai-ds submit --nodes`",
    "ntasks": _RANKS, "ntasks-per-node": _RANKS, "ntasks-per-core": _RANKS, "ntasks-per-socket": _RANKS,
    "ntasks-per-gpu": _RANKS, "tasks-per-node": _RANKS,
    "cpus-per-task": "use cpus_per_rank", "cpus-per-gpu": "use cpus_per_rank",
    "time": "use time, or `mirai-ds submit --time`",
    "output": _LOG, "error": _LOG,
    "chdir": "the job runs where `mirai-ds submit` is given",
    "export": "use environment", "export-file": "use environment",
}  # fmt: skip
# What this package sets -> which field or option to use instead.
SBATCH_OWNED = _BOTH | {
    "gpus": _GPUS, "gpus-per-node": _GPUS, "gpus-per-task": _GPUS, "gpus-per-socket": _GPUS,
    "partition": "use partition", "account": "use account", "qos": "use qos", "constraint": "use constraint",
    "mem": "use memory", "mem-per-cpu": "use memory", "mem-per-gpu": "use memory",
    "signal": "use signal_seconds",
    "requeue": _TEMPLATE, "no-requeue": _TEMPLATE, "open-mode": _TEMPLATE,
    "array": "use `mirai-ds submit --template array`",
    "dependency": "use `mirai-ds submit --dependency` or --chain",
    "kill-on-invalid-dep": _TEMPLATE,
    "parsable": _COMMAND, "test-only": _COMMAND, "wrap": _COMMAND, "wait": _COMMAND, "help": _COMMAND,
    "usage": _COMMAND, "version": _COMMAND,
}  # fmt: skip
SRUN_OWNED = _BOTH | {
    "kill-on-bad-exit": _TEMPLATE, "signal": "use signal_seconds", "multi-prog": _TEMPLATE, "pty": _TEMPLATE,
    "jobid": _TEMPLATE, "test-only": _TEMPLATE, "help": _TEMPLATE, "usage": _TEMPLATE, "version": _TEMPLATE,
    "container-image": "use container", "container-mounts": "use mounts",
    "container-workdir": "the container works where `mirai-ds submit` is given",
}  # fmt: skip


def check_sbatch(options: Mapping[str, OptionValue]) -> None:
    """Raises ConfigError for an option that this package sets, one that is none, or a value of several lines."""
    for name, value in options.items():
        field = f"sbatch.{name}"
        if not re.fullmatch(_NAME, name, re.ASCII):
            raise ConfigError(field, value, "is no long option of sbatch; write it without --, such as mail-type")
        _refuse_owned(field, value, name, SBATCH_OWNED)
        if name == "gres" and re.search(r"(^|,)(gres[:/])?gpu\b", str(value)):
            raise ConfigError(field, value, f"asks for GPUs: {_GPUS}")
        if value is False:
            raise ConfigError(field, value, "a flag is given or not; remove it")
        one_line(str(value), field)


def check_srun(options: list[str]) -> None:
    """Raises ConfigError for an option that this package sets, and for one that is not written --NAME or --NAME=VALUE:
    of a short one, or of a word apart, it could not be known what it sets."""
    for number, option in enumerate(options):
        field = f"srun[{number}]"
        match = re.fullmatch(rf"--({_NAME})(=.*)?", option, re.ASCII)
        if match is None:
            raise ConfigError(field, option, "write each option as --NAME or --NAME=VALUE, such as --cpu-bind=none")
        _refuse_owned(field, option, match[1], SRUN_OWNED)


def _refuse_owned(field: str, value: OptionValue, name: str, owned: Mapping[str, str]) -> None:
    """Raises ConfigError for what this package sets, also where it is shortened: Slurm takes --part for --partition."""
    meant = name if name in owned else next((other for other in owned if other.startswith(name)), None)
    if meant is not None:
        short = f" (--{name} would be --{meant})" if meant != name else ""
        raise ConfigError(field, value, f"is set by mirai-ds: {owned[meant]}{short}")


def directive(name: str, value: OptionValue) -> str:
    """The option as sbatch reads it in a script: quoted where it holds more than letters, digits and a few marks.

    sbatch takes a backslash in double quotes as a shell does, and nothing else in them: no variable, no comment.
    """
    if value is True:
        return f"--{name}"
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9_.,:=@%+/\[\]&|*()-]+", text, re.ASCII):
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        text = f'"{escaped}"'
    return f"--{name}={text}"
