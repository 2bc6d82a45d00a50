"""Job scripts: a template with its `{{names}}` filled from a checked job, every free value quoted for the shell."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path

from mirai_ds.submit.cluster import SlurmCluster
from mirai_ds.submit.job import SlurmJob, SlurmTask
from mirai_ds.submit.passthrough import directive

_PLACEHOLDER = re.compile(r"\{\{([a-z_]+)\}\}")


def _read(name: str) -> str:
    """A file of `jobs/`, without the newline at its end."""
    text = (resources.files("mirai_ds.jobs") / name).read_text(encoding="utf-8")
    return text.rstrip("\n")


def _fill(text: str, values: dict[str, str]) -> str:
    """Fills the placeholders in one pass; what is filled in is not looked at again."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def log_pattern(job: SlurmJob) -> str:
    """Slurm's `--output`: %x is the job's name, %j its id, %A_%a those of an array's task."""
    return f"{job.folder}/jobs/%x-{'%A_%a' if job.template == 'array' else '%j'}.log"


def sbatch_command(job: SlurmJob, script: Path, after: str | None = None) -> list[str]:
    """The command that submits `script`; `after` is the id of the job before it in a chain."""
    command = ["sbatch", "--parsable", f"--output={log_pattern(job)}"]
    dependency = job.dependency if after is None else f"afterany:{after}"
    if dependency:  # a dependency that can no longer come true would wait in the queue for ever
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    return [*command, str(script)]


def render(job: SlurmJob, cluster: SlurmCluster, script: Path) -> str:
    """The whole script of `job`; `script` is the file it will be saved as."""
    first = job.tasks[0]
    values = {
        "title": f"{job.template}: {job.name}, {job.nodes} x {job.ranks_per_node} ranks",
        "template": job.template,
        "cluster": job.cluster_file,
        "sbatch": shlex.join(sbatch_command(job, script)),
        "job_name": job.name,
        "nodes": str(job.nodes),
        "ranks_per_node": str(job.ranks_per_node),
        "cpus_per_rank": str(job.cpus_per_rank),
        "time": job.time,
        "signal_seconds": str(job.signal_seconds),
        "site_options": "\n".join(f"#SBATCH {option}" for option in site_options(job, cluster)),
        # Only an array's script looks at an array's variables: sbatch hands those of its own shell on to any job.
        "job_id": "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.template == "array" else "$SLURM_JOB_ID",
        "submit_dir": shlex.quote(job.submit_dir),
        "setup": "\n".join(setup_lines(cluster)),
        "path": search_path(job),
        "srun_options": shlex.join(job.srun),
        "on_node": on_node(job, cluster),
        "run_dir": shlex.quote(first.run_dir),
        "command": shlex.join([*job.launcher, *first.command]),
        "resumes": f"#SBATCH --signal=B:USR1@{job.signal_seconds}\n#SBATCH --requeue" if job.resumes else "",
        "evaluate": shlex.join([*job.launcher, *job.evaluate] if job.evaluate else []),
        "compare": shlex.join([*job.launcher, "-m", "mirai_ds", "compare"]),
        "array": f"0-{len(job.tasks) - 1}" + (f"%{job.at_once}" if job.at_once else ""),
        "tasks": "\n".join(_case(number, job, task) for number, task in enumerate(job.tasks)),
        "device_environment": _read("parts/gpu.sh" if job.gpus_per_node else "parts/cpu.sh"),
    }
    parts = {name: _fill(_read(f"parts/{name}.sh"), values) for name in ("header", "environment", "step")}
    return _fill(_read(f"{job.template}.sbatch"), values | parts) + "\n"


def _case(number: int, job: SlurmJob, task: SlurmTask) -> str:
    command = shlex.join([*job.launcher, *task.command])
    return f"  {number}) RUN={shlex.quote(task.run_dir)}; command=({command}) ;;"


def search_path(job: SlurmJob) -> str:
    """Puts the folder of the ranks' Python before others in PATH; nothing where Python is started by other words."""
    python, *more = job.launcher
    return "" if more or "/" not in python else f"export PATH={shlex.quote(str(Path(python).parent))}:$PATH"


def on_node(job: SlurmJob, cluster: SlurmCluster) -> str:
    """The words before a rank's command that do the cluster file's setup in the rank's own shell, which then becomes
    the rank; none where there is no setup, or where that shell would be in the image already."""
    if not cluster.setup or job.in_image:
        return ""
    lines = [*setup_lines(cluster), *filter(None, [search_path(job)]), 'exec "$@"']
    return shlex.join(["bash", "-c", "\n".join(lines), "rank"])


def site_options(job: SlurmJob, cluster: SlurmCluster) -> list[str]:
    """Options of `#SBATCH` lines that not every job has; all values have matched their patterns."""
    passed = dict(cluster.sbatch)
    options = [
        f"--{name}={getattr(job, name)}"
        for name in ("partition", "account", "qos", "constraint")
        if getattr(job, name) is not None
    ]
    if job.gpus_per_node:
        what = f"{cluster.gpu_type}:{job.gpus_per_node}" if cluster.gpu_type else str(job.gpus_per_node)
        if cluster.gpu_request == "gpus-per-node":
            options.append(f"--gpus-per-node={what}")
        else:  # of two such lines Slurm takes the last alone
            others = f",{passed.pop('gres')}" if "gres" in passed else ""
            options.append(directive("gres", f"gpu:{what}{others}"))
    if job.exclusive:
        options += ["--exclusive"] * ("exclusive" not in passed)
        options.append("--mem=0")  # all of the node's memory
    elif job.memory:
        options.append(f"--mem={job.memory}")
    return options + [directive(name, value) for name, value in passed.items()]


def setup_lines(cluster: SlurmCluster) -> list[str]:
    """The cluster file's shell lines as they are, then its variables, quoted."""
    variables = dict(cluster.environment)
    if cluster.network_interface:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            variables.setdefault(name, cluster.network_interface)
    return [*cluster.setup, *(f"export {name}={shlex.quote(value)}" for name, value in variables.items())]
