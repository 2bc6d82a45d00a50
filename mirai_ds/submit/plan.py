"""From what the user asks for to a checked job: mistakes are heard of here, not hours later in a log."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.config.errors import UserError, from_validation
from mirai_ds.config.load import load
from mirai_ds.config.paths import named_paths, refuse_missing
from mirai_ds.config.run_config import RunConfig
from mirai_ds.submit.cluster import Runtime, SlurmCluster
from mirai_ds.submit.container import (
    PYTHON_INSIDE,
    Container,
    asked_for,
    check_image,
    mounts,
    prefix,
    srun_options,
)
from mirai_ds.submit.job import SlurmJob, SlurmTask, Template
from mirai_ds.submit.values import one_line

SMOKE = ("train.max_steps=20", "checkpoint.every_steps=5", "logging.every_steps=1", "foresight.warmup_epochs=0.1",
         "eval.loss.every_steps=null", "eval.loss.at_end=false", "sampling.at_end=false",
         "eval.classifier.enabled=false")  # fmt: skip


@dataclass(frozen=True)
class SubmitOptions:
    """The options of `mirai-ds submit`; None means the cluster file's value."""

    recipe: str
    template: Template = "train"
    nodes: int = 1
    gpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cluster: str = "a100"
    overrides: tuple[str, ...] = ()
    deepspeed: str | None = None
    run_dir: Path | None = None
    name: str | None = None
    chain: int = 1
    dependency: str | None = None
    at_once: int | None = None
    reference: Path | None = None
    inception: Path | None = None
    container: str | None = None
    container_runtime: Runtime | None = None
    check: bool = True
    arguments: tuple[str, ...] = field(default=())


# What a rank's Python is given first.
_PACKAGE = ["-m", "mirai_ds"]


def interpreter(cluster: SlurmCluster, container: Container | None) -> list[str]:
    """The words that start the ranks' Python: the cluster file's, else an image's own, else the one that runs now (with
    links kept: a venv's link is the venv)."""
    return cluster.python or [os.path.abspath(sys.executable) if container is None else PYTHON_INSIDE]


def plan(options: SubmitOptions, cluster: SlurmCluster) -> SlurmJob:
    """Check everything that can be checked before a job is sent; raises UserError."""
    paths = [str(path or "") for path in (options.run_dir, options.reference, options.inception)]
    for value in (options.recipe, *options.overrides, *options.arguments, options.deepspeed or "", *paths):
        one_line(value, "argument")
    _check_fit(options)
    gpus = cluster.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node
    if gpus > cluster.gpus_per_node:
        raise UserError(
            f"--gpus-per-node {gpus}: nodes of {options.cluster} have {cluster.gpus_per_node}; ask for as many or fewer"
        )
    ranks = gpus or cluster.ranks_per_node or 1
    many = _draws_many(options)
    if options.template == "sample_evaluate" and not many:
        ranks, gpus = 1, min(gpus, 1)
    container = asked_for(cluster, options.container, options.container_runtime)
    tasks, name, folder = _tasks(options, options.nodes * ranks)
    evaluate = _evaluation(options)
    _check_named_files(options)
    request = _start(options, cluster, container, tasks, gpus) | {
        "template": options.template, "name": options.name or name, "nodes": options.nodes, "gpus_per_node": gpus,
        "ranks_per_node": ranks, "cpus_per_rank": cluster.cpus_per_rank, "time": options.time or cluster.time,
        "signal_seconds": cluster.signal_seconds, "partition": options.partition or cluster.partition,
        "account": options.account or cluster.account, "qos": options.qos or cluster.qos,
        "constraint": options.constraint or cluster.constraint, "memory": cluster.memory,
        "exclusive": cluster.exclusive and gpus == cluster.gpus_per_node, "dependency": options.dependency,
        "chain": options.chain, "at_once": options.at_once, "folder": str(folder), "submit_dir": os.getcwd(),
        "cluster_file": options.cluster, "tasks": [task.model_dump() for task in tasks],
        "resumes": many, "evaluate": evaluate,
    }  # fmt: skip
    try:
        return SlurmJob.model_validate(request)
    except ValidationError as error:
        raise from_validation(error, SlurmJob) from None


def _start(
    options: SubmitOptions, cluster: SlurmCluster, container: Container | None, tasks: list[SlurmTask], gpus: int
) -> dict[str, Any]:
    """How the ranks are started: the job's `launcher`, `srun` and `in_image`.  Raises UserError."""
    python = interpreter(cluster, container)
    if container is None:
        return {"launcher": python, "srun": cluster.srun}
    if options.check:
        check_image(container)
    judged = [str(path) for path in (options.reference, options.inception) if path is not None]
    here = os.getcwd()
    seen = mounts(cluster, here, [path for task in tasks for path in (task.run_dir, *task.paths)] + judged)
    return {
        "launcher": [*prefix(container, seen, here, gpus > 0), *python],
        "srun": [*srun_options(container, seen, here), *cluster.srun],
        "in_image": container.runtime == "pyxis",
    }


def _check_fit(options: SubmitOptions) -> None:
    """Options that the template has no use for are mistakes, not ignored."""
    trains = options.template in ("train", "array", "smoke")
    given = {
        "--set": options.overrides and not trains,
        "--deepspeed": options.deepspeed is not None and not trains,
        "--chain": options.chain > 1 and options.template != "train",
        "--at-once": options.at_once is not None and options.template != "array",
        "--reference": options.reference is not None and options.template != "sample_evaluate",
        "--inception": options.inception is not None and options.template != "sample_evaluate",
    }
    for option, wrong in given.items():
        if wrong:
            raise UserError(f"{option}: has no meaning with --template {options.template}; remove it")
    if options.template == "sample_evaluate" and not _draws_many(options):
        of_many = {
            "--nodes": options.nodes > 1,
            "--reference": bool(options.reference),
            "--inception": bool(options.inception),
        }
        for option, used in of_many.items():
            if used:
                raise UserError(f"{option}: a grid is drawn by one rank and not judged; give -- --num N, or remove it")
    if options.arguments and options.template not in ("extract", "sample_evaluate"):
        more = shlex.join(options.arguments)
        raise UserError(f"{more}: --template {options.template} takes one recipe; change fields with --set")


HINT = "the job would wait in the queue and fail; if only compute nodes see it, or an earlier job makes it: --no-check"


def _check_config(options: SubmitOptions, config: RunConfig, run: Path) -> None:
    """Raises UserError for files of the configuration that are not there and that a start in `run` reads."""
    if options.check:
        try:
            refuse_missing(config, started=any(run.glob("checkpoints/step-*/manifest.json")))
        except UserError as error:
            raise UserError(f"{error}; {HINT}") from None


def _check_named_files(options: SubmitOptions) -> None:
    """The same for files of the command line, where the template only hands them on."""
    named: dict[str, str | Path | None] = {option: _argument(options, option) for option in ("--images", "--tokenizer")}
    named |= {"--reference": options.reference, "--inception": options.inception}
    if options.template == "sample_evaluate" and options.dependency is None:  # else that job trains it
        named["RECIPE"] = options.recipe
    for option, path in named.items():
        if options.check and path is not None and not os.path.exists(path):
            raise UserError(f"{option} {path}: no such file or folder; {HINT}")


def _draws_many(options: SubmitOptions) -> bool:
    asked = any(_argument(options, option) is not None for option in ("--num", "--num-images"))
    return options.template == "sample_evaluate" and asked


def _argument(options: SubmitOptions, option: str) -> str | None:
    """The value of an option after --; None where it is not given."""
    words = [*options.arguments, ""]
    for number, word in enumerate(options.arguments):
        if word == option:
            return words[number + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _evaluation(options: SubmitOptions) -> list[str]:
    """What compares what was drawn with a reference; raises UserError where a file's name is missing."""
    if options.reference is None and options.inception is None:
        return []
    if options.reference is None or options.inception is None:
        raise UserError("--reference, --inception: an evaluation needs both, what to compare with and the network")
    drawn = _argument(options, "--out")
    if drawn is None:
        raise UserError("--reference: say where the images go, -- --num N --out FILE.npz, so that they are found")
    start = [*_PACKAGE, "evaluate", drawn, str(options.reference)]
    source, name = Path(options.recipe), Path(drawn).with_suffix("").name
    weights = source.is_file() or source.suffix in (".pt", ".pth", ".safetensors")  # of which there is no run to tell
    scores = Path(drawn).with_suffix(".scores.json") if weights else source / "evaluations" / f"{name}.json"
    return [*start, "--weights", str(options.inception), "--json", str(scores)]


def _tasks(options: SubmitOptions, world_size: int) -> tuple[list[SlurmTask], str, Path]:
    """The commands, the job's name, and the folder of its script and log."""
    if options.template == "array":
        return _array(options, world_size)
    if options.template in ("extract", "sample_evaluate"):
        return _tool(options)
    smoke = options.template == "smoke"
    overrides = (*SMOKE, *options.overrides) if smoke else options.overrides
    config = load(options.recipe, overrides, options.deepspeed)
    resolve(config, world_size)
    name = f"smoke-{config.name}" if smoke else config.name
    run = _absolute(options.run_dir or Path(config.output_dir) / name)
    _check_config(options, config, run)
    command = [*_PACKAGE, "train", *training(options.recipe, overrides, options.deepspeed), "--resume", "if-present"]
    if not smoke:  # the smoke test trains in two folders below it
        command += ["--run-dir", str(run)]
        refuse_finished(run)
    paths = _paths(options.recipe, config)
    return [SlurmTask(run_dir=str(run), command=command, paths=paths)], name, run


def _paths(recipe: str, config: RunConfig) -> list[str]:
    """What a training run reads and writes beside its folder."""
    return [*([recipe] if recipe.endswith((".yaml", ".yml")) else []), *named_paths(config)]


def training(recipe: str, overrides: tuple[str, ...], deepspeed: str | None) -> list[str]:
    """The arguments of `mirai-ds train` as the user gave them."""
    passed = [recipe, *[part for override in overrides for part in ("--set", override)]]
    return passed + (["--deepspeed", deepspeed] if deepspeed else [])


def refuse_finished(run: Path) -> None:
    """Raises UserError for a finished run, whose job would end at once."""
    try:
        word = (run / "outcome").read_text(encoding="utf-8").split()[:1]
    except (OSError, UnicodeDecodeError):
        return
    if word == ["finished"]:
        raise UserError(
            f"{run}: this run is finished, its job would end at once; remove {run / 'outcome'} to train it further, or "
            "choose another --run-dir"
        )


def _tool(options: SubmitOptions) -> tuple[list[SlurmTask], str, Path]:
    if options.template == "extract":
        if options.recipe not in ("codes", "images"):
            raise UserError(f"{options.recipe}: --template extract takes codes or images, then -- and their options")
        if "--out" not in options.arguments and not any(part.startswith("--out=") for part in options.arguments):
            raise UserError("--template extract: give the options of `mirai-ds extract` after --, --out among them")
        paths: list[str] = []
        name, command = f"extract-{options.recipe}", [*_PACKAGE, "extract", options.recipe, *options.arguments]
    else:
        name, command = "sample", [*_PACKAGE, "sample", options.recipe, *options.arguments]
        paths = [options.recipe, *_of_run(Path(options.recipe))]
    run = _absolute(options.run_dir or Path("runs") / name)
    # Of words that are no paths (numbers, names) a container sees the working folder, which it does anyway.
    paths += [word.rpartition("=")[2] for word in options.arguments]
    return [SlurmTask(run_dir=str(run), command=command, paths=paths)], name, run


def _of_run(run: Path) -> list[str]:
    """What a run's own configuration names; nothing where there is none (yet)."""
    try:
        return named_paths(load(str(run / "config.yaml"), (), None))
    except UserError:
        return []


def _array(options: SubmitOptions, world_size: int) -> tuple[list[SlurmTask], str, Path]:
    """One task a line: `RECIPE [--set SECTION.FIELD=VALUE]... [--run-dir DIR]`, quoted as in a shell, # comments."""
    path = Path(options.recipe)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: --template array takes a list with a recipe a line: {error}") from None
    tasks: list[SlurmTask] = []
    seen: dict[Path, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{where}: {error}; quote it as in a shell") from None
        if not words:
            continue
        recipe, overrides, run_dir = _line(words, where)
        overrides = (*overrides, *options.overrides)
        try:
            config = load(recipe, overrides, options.deepspeed)
            resolve(config, world_size)
            run = _absolute(Path(run_dir) if run_dir else Path(config.output_dir) / config.name)
            _check_config(options, config, run)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if run in seen:
            raise UserError(f"{where}: the run folder of line {seen[run]} ({run}); add --set name=... or --run-dir")
        seen[run] = number
        passed = training(recipe, overrides, options.deepspeed)
        command = [*_PACKAGE, "train", *passed, "--resume", "if-present", "--run-dir", str(run)]
        tasks.append(SlurmTask(run_dir=str(run), command=command, paths=_paths(recipe, config)))
    if not tasks:
        raise UserError(f"{path}: no recipe in it; write one a line")
    name = "array-" + "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.stem)
    return tasks, name[:100], _absolute(options.run_dir or Path("runs") / name)


def _line(words: list[str], where: str) -> tuple[str, tuple[str, ...], str | None]:
    recipe, overrides, run_dir = words[0], [], None
    rest = words[1:]
    while rest:
        option, sign, value = rest.pop(0).partition("=")
        if option not in ("--set", "--run-dir") or (not sign and not rest):
            raise UserError(f"{where}: {option}: write RECIPE [--set SECTION.FIELD=VALUE]... [--run-dir DIR]")
        value = value if sign else rest.pop(0)
        if option == "--set":
            overrides.append(value)
        else:
            run_dir = value
    for value in words:
        one_line(value, where)
    return recipe, tuple(overrides), run_dir


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
