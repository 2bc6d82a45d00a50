"""One job as a strict schema: everything a template is rendered from."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from mirai_ds.config.errors import ConfigError
from mirai_ds.config.model_config import Section
from mirai_ds.submit.values import (
    Constraint,
    Dependency,
    JobName,
    Memory,
    Plain,
    RunFolder,
    SiteName,
    SiteNames,
    Time,
    seconds,
)

Template = Literal["train", "array", "extract", "sample_evaluate", "smoke"]
TEMPLATES: tuple[Template, ...] = ("train", "array", "extract", "sample_evaluate", "smoke")


class SlurmTask(Section):
    """What the ranks run: the run's folder, and the arguments of `python` in each rank, one by one."""

    model_config = ConfigDict(str_strip_whitespace=False)

    run_dir: Plain = ""
    command: list[Plain] = []  # noqa: RUF012
    paths: list[Plain] = Field([], description="files and folders that the ranks use, for a container to see")


class SlurmJob(Section):
    """A job.  Values of `#SBATCH` lines match strict patterns; everything else is one line and quoted in the script."""

    model_config = ConfigDict(str_strip_whitespace=False)

    template: Template = "train"
    name: JobName = "run"
    nodes: int = Field(1, ge=1, le=65536)
    gpus_per_node: int = Field(8, ge=0, le=64)
    ranks_per_node: int = Field(8, ge=1, le=512)
    cpus_per_rank: int = Field(8, ge=1, le=512)
    time: Time = "24:00:00"
    signal_seconds: int = Field(300, ge=1, le=65535)
    partition: SiteNames | None = None
    account: SiteName | None = None
    qos: SiteName | None = None
    constraint: Constraint | None = None
    exclusive: bool = False
    memory: Memory | None = None
    dependency: Dependency | None = None
    chain: int = Field(1, ge=1, le=1000)
    at_once: int | None = Field(None, ge=1, le=10000, description="array tasks that run at the same time")
    folder: RunFolder = "runs/run"
    submit_dir: Plain = "/"
    cluster_file: Plain = "a100"
    tasks: list[SlurmTask] = []  # noqa: RUF012
    launcher: list[Plain] = Field(
        ["python3"], description="the words that start Python, in a container where one is used"
    )
    srun: list[Plain] = Field([], description="options of every srun")
    in_image: bool = Field(
        False, description="srun itself starts the container: no shell of the node's before the ranks"
    )
    resumes: bool = Field(False, description="sample_evaluate: many images, gone on with after a requeue")
    evaluate: list[Plain] = Field([], description="sample_evaluate: what one process's `python` runs afterwards")

    @model_validator(mode="after")
    def _check(self) -> SlurmJob:
        warned = self.template in ("train", "array", "extract") or self.resumes
        if warned and seconds(self.time) <= self.signal_seconds + 30:
            problem = (
                f"must be more than {self.signal_seconds + 30} s (the cluster file's signal_seconds + 30): Slurm warns "
                "early, and the job would be requeued at once; ask for more, or lower signal_seconds"
            )
            raise ConfigError("time", self.time, problem)
        return self

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node
