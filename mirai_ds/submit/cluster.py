"""Cluster files: what one site has otherwise than another, as a strict schema."""

from __future__ import annotations

import shlex
import subprocess
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from mirai_ds.config.errors import ConfigError, UserError, from_validation
from mirai_ds.config.model_config import Section
from mirai_ds.config.yaml_text import parse
from mirai_ds.submit.passthrough import OptionValue, check_sbatch, check_srun
from mirai_ds.submit.values import (
    Constraint,
    Interface,
    Memory,
    Plain,
    SiteName,
    SiteNames,
    Time,
    VariableName,
    one_line,
)

Runtime = Literal["apptainer", "singularity", "pyxis"]


class SlurmCluster(Section):
    """A site's nodes and habits.  Without GPUs, `ranks_per_node` says how many ranks a node gets."""

    model_config = ConfigDict(str_strip_whitespace=False)

    gpus_per_node: int = Field(8, ge=0, le=64)
    ranks_per_node: int | None = Field(None, ge=1, le=512, description="only for nodes without GPUs")
    cpus_per_rank: int = Field(8, ge=1, le=512)
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    gpu_type: SiteName | None = None
    exclusive: bool = True
    memory: Memory | None = None
    time: Time = "24:00:00"
    signal_seconds: int = Field(300, ge=1, le=65535)
    partition: SiteNames | None = None
    account: SiteName | None = None
    qos: SiteName | None = None
    constraint: Constraint | None = None
    network_interface: Interface | None = None
    python: list[Plain] | None = Field(None, description="the words that start Python; a string is split as in a shell")
    container: Plain | None = Field(None, description="image that the ranks run in: a file or docker://NAME")
    container_runtime: Runtime = "apptainer"
    mounts: list[Plain] = Field([], description="further folders or files that the container sees, as PATH or FROM:TO")
    sbatch: dict[str, OptionValue] = Field({}, description="any other option of sbatch, a flag as NAME: true")
    srun: list[Plain] = Field([], description="any other option of srun, each as --NAME or --NAME=VALUE")
    environment: dict[VariableName, Plain] = {}  # noqa: RUF012  (pydantic copies it)
    setup: list[Plain] = []  # noqa: RUF012

    @field_validator("python", mode="before")
    @classmethod
    def _words(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        try:
            return shlex.split(given)
        except ValueError as error:
            raise ConfigError("python", given, f"{error}; quote it as in a shell, or give a list of words") from None

    @model_validator(mode="after")
    def _check(self) -> SlurmCluster:
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            problem = f"there is one rank a GPU, and gpus_per_node = {self.gpus_per_node}; remove it"
            raise ConfigError("ranks_per_node", self.ranks_per_node, problem)
        if self.python == []:
            raise ConfigError("python", self.python, "holds no word; give the command, or null")
        check_sbatch(self.sbatch)
        check_srun(self.srun)
        for number, line in enumerate(self.setup):
            _check_shell(line, f"setup[{number}]")
        return self


def _check_shell(line: str, field: str) -> None:
    """A setup line is the user's own shell, but a whole command: what it leaves open would swallow the script."""
    one_line(line, field)
    if line.rstrip().endswith("\\"):
        raise ConfigError(field, line, "a line that goes on in the next; write it as one")
    try:
        checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, check=False)
    except OSError:  # no bash here; the cluster has one
        return
    if checked.returncode or checked.stderr:
        raise ConfigError(field, line, "is no whole shell command; close its quotes and brackets")


def shipped_clusters() -> list[str]:
    """Names of the cluster files that ship in `jobs/clusters/`."""
    folder = resources.files("mirai_ds.jobs") / "clusters"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_cluster(source: str) -> SlurmCluster:
    """A cluster by file or by the name of a shipped one; raises UserError with the field, the value and the fix."""
    one_line(source, "--cluster")
    if source.endswith((".yaml", ".yml")):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--cluster {source}: cannot be read: {error}") from None
    elif source in shipped_clusters():
        text = (resources.files("mirai_ds.jobs") / "clusters" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(f"--cluster {source}: give a .yaml file or one of: {', '.join(shipped_clusters())}")
    data = parse(text, source)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{source}: a cluster file is a mapping such as `gpus_per_node: 8`")
    try:
        return SlurmCluster.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, SlurmCluster, source) from None
