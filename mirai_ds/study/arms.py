"""What is compared: studies (a recipe, its data, its judges) and arms (what changes of the recipe)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mirai_ds.config import RunConfig, UserError
from mirai_ds.config.errors import nearest
from mirai_ds.config.load import load

WARMUP = 15 / 80  # of a run: the paper's 15 of 80 epochs
DESYNCHRONISED_RANKS = 8  # the paper's machine
ENCODER = "test_vit"  # timm: 6 blocks of width 64, patches of 16 x 16


@dataclass(frozen=True)
class StudyArm:
    """name: also of its run folders.  sets: overrides of the recipe, `WARMUP` in them becomes the study's epochs.
    main: compared first, with more seeds."""

    name: str
    title: str
    sets: tuple[str, ...] = ()
    main: bool = False


def _e(*sets: str, convention: str = "official", warmup: str = "WARMUP") -> tuple[str, ...]:
    own = (
        "method=mirai-e", f"convention={convention}", "projector_dim=128", f"warmup_epochs={warmup}",
        "heads_in_warmup=sleep", *sets,  # as the committed rows were made
    )  # fmt: skip
    return tuple(f"foresight.{one}" for one in own)


_DESYNCHRONISED = f"desynchronised_ranks={DESYNCHRONISED_RANKS}"
BASELINE = "baseline"
ENCODER_SET = "foresight.encoder.weights=ENCODER"
ARMS = (
    StudyArm(BASELINE, "baseline", (), main=True),
    StudyArm("e-official", "Mirai-E, official", _e(), main=True),
    StudyArm("e-paper", "Mirai-E, paper", _e(convention="paper"), main=True),
    StudyArm("i", "Mirai-I", (
        "foresight.method=mirai-i", "foresight.projector_dim=128", f"foresight.encoder.name={ENCODER}",
        ENCODER_SET,
    ), main=True),
    StudyArm("e-cold", "E official, no warm-up", _e(warmup="0")),
    StudyArm("e-cold-desync", "E official, no warm-up, desynchronised teachers", _e(_DESYNCHRONISED, warmup="0")),
    StudyArm("mtp", "multi-token prediction, K = 3", ("foresight.method=mtp",)),
    StudyArm("e-1d", "E official, 1D offsets", _e("layout=1d")),
    StudyArm("e-k1", "E official, K = 1", _e("num_heads=1")),
    StudyArm("e-k9", "E official, K = 9", _e("num_heads=9")),
    StudyArm("e-desync", "E official, desynchronised teachers", _e(_DESYNCHRONISED)),
    StudyArm("e-paper-sum", "Mirai-E, paper, total weight of official", _e("weights=[6,6,6]", convention="paper")),
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """recipe: of the baseline.  main_seeds, side_seeds: runs of each arm.  samples: drawn from each run.  train_images:
    None: the recipe's data as they are."""

    name: str
    title: str
    recipe: str
    main_seeds: int
    side_seeds: int
    samples: int
    reference: int  # real images that samples are compared with, at most
    train_images: int | None = None
    held_out_images: int | None = None
    patch: int = 1
    codes: int = 17
    encoder_steps: int = 600
    judge_epochs: int = 30


STUDIES = {
    "digits": Study(
        "digits", "handwritten digits, 8x8 tokens", "study-digits", main_seeds=5, side_seeds=2, samples=1000,
        reference=1797,
    ),
    "fashion": Study(
        "fashion", "Fashion-MNIST, 7x7 tokens", "study-fashion", main_seeds=3, side_seeds=2, samples=2000,
        reference=5000, train_images=12_800, held_out_images=5000, patch=4, codes=512, judge_epochs=3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One run: an arm with a seed."""

    arm: StudyArm
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.arm.name}-s{self.seed}"


def runs_folder(folder: Path, planned: Planned) -> Path:
    """The folder of one run within a study's."""
    return folder / "runs" / planned.name


def find_study(name: str) -> Study:
    """The study of that name; raises UserError for an unknown one."""
    if name not in STUDIES:
        raise UserError(f"study {name!r}: {nearest(name, list(STUDIES))}")
    return STUDIES[name]


def choose_arms(names: str | None) -> list[StudyArm]:
    """`--arms`: names with commas, `main`, or None for all; the baseline is always among them.  Raises UserError."""
    if names is None:
        return list(ARMS)
    wanted = {one.strip() for one in names.split(",") if one.strip()} | {BASELINE}
    if "main" in wanted:
        wanted = (wanted - {"main"}) | {arm.name for arm in ARMS if arm.main}
    known = [arm.name for arm in ARMS]
    for name in sorted(wanted - set(known)):
        raise UserError(f"--arms {name}: {nearest(name, ['main', *known])}")
    return [arm for arm in ARMS if arm.name in wanted]


def planned_runs(study: Study, arms: list[StudyArm], seeds: int | None) -> list[Planned]:
    """In the order they are run: seed by seed the main arms, then seed by seed the others.  So whatever ends the study
    leaves pairs."""
    planned = [Planned(arm, seed) for seed in range(seeds or study.main_seeds) for arm in arms if arm.main]
    return planned + [Planned(arm, seed) for seed in range(seeds or study.side_seeds) for arm in arms if not arm.main]


def overrides(study: Study, arm: StudyArm, seed: int, folder: Path) -> list[str]:
    """What `mirai-ds train RECIPE --set ...` is given for a run in the study's `folder`."""
    settings = [
        f"name={arm.name}-s{seed}",
        f"seed={seed}",
        f"output_dir={folder / 'runs'}",
        *data_overrides(study, folder),
    ]
    warmup = WARMUP * load(study.recipe).train.epochs
    words = {"WARMUP": f"{warmup:g}", "ENCODER": str(encoder_file(folder))}
    for one in arm.sets:
        key, _, value = one.partition("=")
        settings.append(f"{key}={words.get(value, value)}")
    return settings


def data_overrides(study: Study, folder: Path) -> list[str]:
    """`--set` options that name the study's own data, if it has any."""
    if study.train_images is None:
        return []
    return [f"data.path={data_file(folder)}", f"data.held_out_path={held_out_file(folder)}"]


def run_config(study: Study, arm: StudyArm, seed: int, folder: Path) -> RunConfig:
    """The resolved configuration of a run."""
    return load(study.recipe, overrides(study, arm, seed, folder))


def data_file(folder: Path) -> Path:
    """Training samples of a study that makes its own."""
    return folder / "data" / "train.npz"


def held_out_file(folder: Path) -> Path:
    """Its held-out samples."""
    return folder / "data" / "held-out.npz"


def encoder_file(folder: Path) -> Path:
    """Mirai-I's encoder, pretrained on the training images."""
    return folder / "encoder.safetensors"


def judge_file(folder: Path) -> Path:
    """The classifier that judges samples."""
    return folder / "judge.safetensors"
