"""Run a study: networks, costs, then run after run in folders of their own; then its rows.

Killed at any time, it goes on when started again: what is finished and measured is not repeated, a run that was under
way resumes from its checkpoint.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirai_ds.config import RunConfig, UserError
from mirai_ds.config.paths import absolute_paths
from mirai_ds.config.schedule import total_steps
from mirai_ds.data import load_dataset
from mirai_ds.runs.configuration import read_run_config
from mirai_ds.runs.outcome import NAME as OUTCOME
from mirai_ds.runs.outcome import read as read_outcome
from mirai_ds.runtime.disk import write_whole
from mirai_ds.runtime.distributed import unusable_because
from mirai_ds.runtime.environment import cpu_name, package_versions
from mirai_ds.runtime.launch import launch_environment, visible_gpus
from mirai_ds.runtime.processes import as_parent
from mirai_ds.study.arms import (
    ARMS,
    ENCODER_SET,
    STUDIES,
    Planned,
    Study,
    StudyArm,
    overrides,
    planned_runs,
    run_config,
    runs_folder,
)
from mirai_ds.study.costs import Costs, measure_costs, run_seconds
from mirai_ds.study.rows import FACTS as ROW_FACTS
from mirai_ds.study.rows import CostRow, Rows, RunRow, read_rows, write_rows

ROW = "study-row.json"  # in a run's folder: it is finished and measured
FACTS, COSTS = "facts.json", "costs.json"  # in the study's
# Beside the training steps of a run: start-up; the forward pass of a held-out image, in steps of a trained one.
START_SECONDS, FORWARD_SHARE = 10.0, 0.35
Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyPlan:
    """What will be run: runs in order with their expected seconds; `left_out` do not fit the budget."""

    chosen: list[tuple[Planned, float]]
    left_out: list[tuple[Planned, float]]
    done: list[Planned]

    @property
    def seconds(self) -> float:
        """Seconds of all chosen runs."""
        return sum(seconds for _, seconds in self.chosen)


def make_plan(
    study: Study, folder: Path, costs: Costs, arms: list[StudyArm], seeds: int | None, budget_seconds: float | None
) -> StudyPlan:
    """Runs in order until the budget is spent; on a CPU seconds are its time, and a shared machine takes longer."""
    config = run_config(study, arms[0], 0, folder)
    steps, held_out = length(config)
    points, batch = steps // (config.eval.loss.every_steps or steps) + 1, config.train.global_batch_size
    looked = points * min(held_out, config.eval.loss.max_samples or held_out) * 2
    overhead = START_SECONDS + FORWARD_SHARE * looked / batch * costs[arms[0].name]["step_ms"] / 1000
    plan, spent = StudyPlan([], [], []), 0.0
    for planned in planned_runs(study, arms, seeds):
        if (runs_folder(folder, planned) / ROW).is_file():
            plan.done.append(planned)
            continue
        seconds = overhead + run_seconds(costs, planned.arm.name, steps)
        fits = budget_seconds is None or (spent + seconds <= budget_seconds and not plan.left_out)
        (plan.chosen if fits else plan.left_out).append((planned, seconds))
        spent += seconds if fits else 0.0
    return plan


def length(config: RunConfig) -> tuple[int, int]:
    """Steps of a run, and its held-out images; the data must be there."""
    data = load_dataset(config.data, config.model)
    return total_steps(config.train, len(data.train) // config.train.global_batch_size), len(data.held_out)


def run_study(
    study: Study, folder: Path, arms: list[StudyArm], seeds: int | None, budget_seconds: float | None,
    source: Path | None, say: Say,
) -> StudyPlan:  # fmt: skip
    """Do whatever is not done; returns the plan it followed.  Raises UserError, also when a run fails."""
    from mirai_ds.study.measure import measure

    began = time.monotonic()
    ready(study, folder, arms, source, say)
    costs = known_costs(study, folder, arms, say)
    plan = make_plan(study, folder, costs, arms, seeds, budget_seconds)
    about = f"about {plan.seconds / 60:.0f} minutes of {device_kind()} time"
    say(f"{len(plan.done)} runs are done, {len(plan.chosen)} to do, {about}")
    for planned, seconds in plan.chosen:
        if budget_seconds is not None and time.monotonic() - began + seconds > budget_seconds:
            say(f"stopped before {planned.name}: the budget is spent; the same command goes on")
            break
        at = time.monotonic()
        train(study, planned, folder)
        trained, at = time.monotonic() - at, time.monotonic()
        run = runs_folder(folder, planned)
        row = measure(study, planned, run, folder)
        write_json(run / ROW, asdict(row))
        say(
            f"{planned.name}: held-out loss {row.ntp_ema:.4f} (EMA), Frechet distance {row.frechet:.2f}, recognised "
            f"{row.accuracy:.3f}, smoothness {row.smoothness:.3f}; {trained:.0f} s and {time.monotonic() - at:.0f} s"
        )
    return plan


def ready(study: Study, folder: Path, arms: list[StudyArm], source: Path | None, say: Say) -> dict[str, Any]:
    """Data and judge, and the encoder if one of the arms has one, made unless they are there; the facts about them."""
    from mirai_ds.study.images import prepare, real_images
    from mirai_ds.study.measure import reference_facts
    from mirai_ds.study.networks import pretrain_encoder, train_judge

    path = folder / FACTS
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = read_json(path) if path.is_file() else {}
    if facts.get("study", study.name) != study.name:
        raise UserError(f"{folder}: is of the study {facts['study']!r}; give another --folder")
    if not facts:
        say("preparing images and the judge")
        facts |= {
            "study": study.name,
            "date": str(datetime.date.today()),
            "device": device_name(),
            "versions": package_versions(),
        }
        facts |= prepare(study, folder, source)
        facts |= train_judge(study, folder, *real_images(study, folder, source))
        facts |= reference_facts(study, folder)
        write_json(path, facts)
    if "encoder" not in facts and any(ENCODER_SET in arm.sets for arm in arms):
        say("pretraining Mirai-I's encoder")
        facts |= pretrain_encoder(study, folder)
        write_json(path, facts)
    return facts


def device_kind() -> str:
    """Where runs train: on a GPU where there is one, else on the CPU."""
    return "GPU" if visible_gpus() else "CPU"


def device_name() -> str:
    """That device by name.  Raises UserError where torch cannot use the GPU."""
    if device_kind() == "CPU":
        return f"{cpu_name()}, {len(os.sched_getaffinity(0))} core(s) used"
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"torch cannot use this GPU: {unusable_because()}; to run on the CPU set DS_ACCELERATOR=cpu")
    return torch.cuda.get_device_name(0)


def known_costs(study: Study, folder: Path, arms: list[StudyArm], say: Say) -> Costs:
    """Costs of the arms, measured in a process of its own where one is not known yet."""
    path = folder / COSTS
    costs: Costs = read_json(path) if path.is_file() else {}
    if all(arm.name in costs for arm in arms):
        return costs
    say("measuring what a step of each arm costs")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        costs |= pool.submit(measure_costs, study, arms, folder).result()
    write_json(path, costs)
    return costs


def train(study: Study, planned: Planned, folder: Path) -> None:
    """One run to its end, as a process of its own: the trainer, as any other run.  Raises UserError when it fails or
    its folder holds another."""
    run = runs_folder(folder, planned)
    wanted = run_config(study, planned.arm, planned.seed, folder)
    if (run / "config.yaml").is_file() and absolute_paths(read_run_config(run)) != absolute_paths(wanted):
        raise UserError(f"{run}: holds a run with other settings; move it away or give another --folder")
    outcome = read_outcome(run / OUTCOME)
    if outcome is not None and outcome[0] == "finished":
        return
    command = [sys.executable, "-m", "mirai_ds.train", study.recipe, "--run-dir", str(run), "--resume", "if-present"]
    command += [part for one in overrides(study, planned.arm, planned.seed, folder) for part in ("--set", one)]
    env = {**launch_environment(1, min(1, visible_gpus())), **as_parent()}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("ab") as log:
        code = _wait(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    outcome = read_outcome(run / OUTCOME)
    if code or outcome is None or outcome[0] != "finished":
        why = f"{outcome[0]} {outcome[1]}" if outcome else f"exit code {code}"
        raise UserError(f"{run}: did not finish ({why}); see {folder / 'log.txt'}, then give the command again")


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code.  A study that is asked to end asks its run first, which saves after its step."""
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, old)


def finished_rows(folder: Path) -> list[RunRow]:
    """The rows of the finished runs in a study's folder."""
    return [RunRow(**read_json(path)) for path in sorted(folder.glob(f"runs/*/{ROW}"))]


def cost_rows(study: str, folder: Path) -> list[CostRow]:
    """Rows of what is known about costs."""
    return [CostRow(study, arm, **values) for arm, values in read_json(folder / COSTS).items()]


def study_of(folder: Path) -> Study:
    """Which study a folder holds, by its rows.  Raises UserError when it holds none that is finished."""
    names = {row.study for row in finished_rows(folder)}
    if len(names) != 1 or not names <= set(STUDIES):
        raise UserError(
            f"{folder}: holds no measured run of a study; `mirai-ds study run NAME --folder {folder}` first"
        )
    return STUDIES[names.pop()]


def rows_of(folder: Path) -> Rows:
    """Rows of one folder: measured runs of its study's arms in their order."""
    from mirai_ds.study.measure import curve

    study = study_of(folder)
    finished = {(row.arm, row.seed): row for row in finished_rows(folder)}
    most = 1 + max(seed for _, seed in finished)
    order = [p for p in planned_runs(study, list(ARMS), most) if (p.arm.name, p.seed) in finished]
    curves = [point for p in order for point in curve(study, p, runs_folder(folder, p))]
    facts = {study.name: read_json(folder / FACTS)}
    return Rows([finished[p.arm.name, p.seed] for p in order], curves, cost_rows(study.name, folder), facts)


def collect(folders: list[Path], out: Path, pictures: bool) -> list[str]:
    """Write the rows of `folders` into `out`, in place of what is there of the same studies; with pictures also samples
    and maps of the main arms.  Returns lines about it."""
    from mirai_ds.study.figures import draw_maps, draw_samples

    said = []
    known = read_rows(out) if (out / ROW_FACTS).is_file() else Rows([], [], [], {})
    for folder in folders:
        rows, study = rows_of(folder), study_of(folder)
        known = known.replaced(rows, study.name)
        said.append(f"{study.name}: {len(rows.runs)} runs, {len(rows.curves)} points of curves")
        arms = [arm for arm in ARMS if arm.main and any((row.arm, row.seed) == (arm.name, 0) for row in rows.runs)]
        if pictures and arms:
            out.mkdir(parents=True, exist_ok=True)
            draw_samples(study, folder, arms, out / f"study-{study.name}-samples.png")
            draw_maps(folder, arms, out / f"study-{study.name}-maps.png")
    write_rows(known, out)
    return said


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.  Raises UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); `mirai-ds study run` writes it") from None
