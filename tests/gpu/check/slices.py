"""The slices of `make gpu-check`, those that show most a second first: names, commands, time limits, where rows go.

A GPU is lent for minutes at a time, so that every slice fits one command of ten minutes.  Words in braces are filled in
by `running.py`: {python}, {rows} (a file for a benchmark's own rows), {folder} (of this step, removed afterwards).
"""

from __future__ import annotations

from dataclasses import dataclass

SLICE_SECONDS = 540.0  # a slice ends here, so that what it found comes back within a command of ten minutes
PYTEST = ("{python}", "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", "-m", "gpu", "--junitxml={rows}")
SIZES = ("GPT-B", 32), ("GPT-L", 32), ("GPT-XL", 16), ("GPT-B", 128)


@dataclass(frozen=True)
class Step:
    """One process.

    reader: how its rows are read (`native_rows.READERS`); None: it has none.  estimate, limit: seconds.  group: steps
    of one slice with the same group run side by side.  needs: a program without which it is skipped.  variable: an
    environment variable without which it is skipped.  environment: what it is started with besides.
    """

    name: str
    command: tuple[str, ...]
    estimate: float
    limit: float
    reader: str | None = None
    group: str | None = None
    needs: str | None = None
    variable: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Slice:
    """Steps that belong together; `make gpu-check SLICE=NUMBER`."""

    number: int
    name: str
    steps: tuple[Step, ...]

    @property
    def estimate(self) -> float:
        """Seconds: steps side by side take as long as the longest of them."""
        groups: dict[str, float] = {}
        for step in self.steps:
            key = step.group or step.name
            groups[key] = max(groups.get(key, 0.0), step.estimate)
        return sum(groups.values())


def module(name: str, *words: str) -> tuple[str, ...]:
    """A module of this project as a command."""
    return ("{python}", "-m", name, *words)


def gpu_tests(name: str, estimate: float, group: str | None = None) -> Step:
    """A file of GPU tests as a process of its own."""
    path = f"tests/gpu/test_{name}.py"
    return Step(f"test_{name}", (*PYTEST, path), estimate, min(2 * estimate + 120, 500), "junit", group)


def step_times(size: str, batch: int, what: str, methods: str, estimate: float, *more: str) -> Step:
    """`mirai-ds bench step`: both sides of each comparison take turns in one run."""
    words = (what, "--size", size, "--batch", str(batch), "--methods", methods, "--rounds", "10", *more)
    name = f"step {size} {batch} {what} {methods}"
    command = module("mirai_ds", "bench", "step", *words, "--out", "{rows}")
    return Step(name, command, estimate, min(2 * estimate + 60, 400), "step")


def sampling(size: str, batch: int, estimate: float) -> Step:
    """Images a second against loops with a plain cache and without one."""
    words = ("--device", "cuda", "--size", size, "--batch", str(batch), "--batches", "3", "--out", "{rows}")
    return Step(f"sampling {size} {batch}", module("mirai_ds.benchmarks.sampling", *words), estimate, 240, "sampling")


def sanitizer(tool: str, estimate: float) -> Step:
    """Every path of the alignment kernel under one of compute-sanitizer's tools."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *module("tests.gpu.sanitized"))
    # The caching allocator would hide an access out of bounds inside its larger blocks.
    caching = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    return Step(tool, command, estimate, 520, "verdict", "sanitizer", needs="compute-sanitizer", environment=(caching,))


def race(group: str, estimate: float) -> Step:
    """The authors' and LlamaGen's own loops and this trainer's, in turns; needs their checkouts."""
    command = module("tests.gpu.check.peers", "{peers}", group)
    return Step(f"race {group}", command, estimate, 400, "lines", variable="PEERS")


def peer_sampling(size: str, batch: int, estimate: float) -> Step:
    """LlamaGen's own sampler; `sampling` is ours."""
    command = module("tests.gpu.check.peer_sampling", "{peers}", "--size", size, "--batch", str(batch))
    return Step(f"peer sampling {size} {batch}", command, estimate, 240, "lines", variable="PEERS")


DEMO = ("train.max_steps=40", "logging.every_steps=5", "eval.loss.at_end=false", "sampling.at_end=false",
        "eval.classifier.enabled=false")  # fmt: skip
DEMO_WORDS = tuple(word for setting in DEMO for word in ("--set", setting))

SLICES = (
    Slice(1, "smoke", (
        Step("doctor", module("mirai_ds", "doctor"), 90, 240, "verdict"),
        Step("demo", module("mirai_ds", "train", "digits-mirai-e", *DEMO_WORDS, "--run-dir", "{folder}/run"), 60, 200,
             "run"),
    )),
    Slice(2, "kernel", (
        Step("registers", module("mirai_ds.kernels.registers"), 60, 240, "verdict"),
        gpu_tests("foresight_cosine", 90, "kernel"),
        Step("reference vectors", module("mirai_ds", "verify", "tests/fixtures/*.npz"), 60, 240, "verdict", "kernel"),
    )),
    Slice(3, "ZeRO steps", (
        gpu_tests("captured", 120, "tests"), gpu_tests("gpu", 180, "tests"), gpu_tests("no_waiting", 90, "tests"),
        gpu_tests("resilience", 240, "tests"),
    )),
    Slice(4, "losses", tuple(
        Step(f"losses {precision}", module("tests.gpu.check.losses", "--precision", precision), 120, 300, "lines",
             "losses")
        for precision in ("fp32", "bf16-autocast")
    )),
    Slice(5, "step times", (
        Step("planned", module("tests.gpu.check.planned"), 20, 90, "lines"),
        step_times("GPT-B", 32, "plain", "E", 45), step_times("GPT-XL", 16, "overhead", "E", 70),
        step_times("GPT-L", 32, "overhead", "E", 60), step_times("GPT-B", 128, "overhead", "E", 45),
        step_times("GPT-B", 32, "switches", "E", 80, "--switches", "not captured,not compiled,ZeRO-2"),
        step_times("GPT-B", 32, "overhead", "E,I", 100), step_times("GPT-B", 32, "plain", "none", 40),
    )),
    Slice(6, "roofline", (
        Step("alignment kernel", module("mirai_ds.benchmarks.kernels", "--device", "cuda", "--out", "{rows}"), 200, 300,
             "kernels"),
        Step("traffic", module("mirai_ds.benchmarks.traffic", "--device", "cuda", "--out", "{rows}"), 120, 240,
             "kernels"),
    )),
    Slice(7, "sampling", (
        sampling("GPT-B", 32, 90), gpu_tests("sampling", 120), sampling("GPT-B", 256, 120), sampling("GPT-L", 32, 120),
    )),
    Slice(8, "extraction", (
        Step("extraction", module("mirai_ds.benchmarks.data", "--device", "cuda", "--quick", "--out", "{rows}"), 180,
             400, "extract"),
    )),
    Slice(9, "sanitizer", (sanitizer("memcheck", 240), sanitizer("racecheck", 400))),
    Slice(10, "memory and saves", (
        gpu_tests("memory", 150, "memory"),
        *(Step(f"memory {size}", module("mirai_ds.benchmarks.memory", "--size", size, "--ranks", "1", "--out",
                                        "{rows}"), 150, 300, "memory", "memory") for size in ("GPT-B", "GPT-XL")),
        Step("saves", module("mirai_ds.benchmarks.safety", "--ranks", "1", "--out", "{rows}"), 120, 220, "safety"),
    )),
    Slice(11, "study", (
        Step("study", module("mirai_ds", "study", "run", "digits", "--arms", "e-official", "--seeds", "1",
                             "--budget-hours", "0.12", "--folder", "{folder}/study"), 400, 530, "verdict"),
    )),
    Slice(12, "more step times", (
        step_times("GPT-XL", 16, "overhead", "I", 80), step_times("GPT-L", 32, "overhead", "I", 70),
        step_times("GPT-B", 128, "overhead", "I", 60), step_times("GPT-B", 32, "plain", "I", 60),
        step_times("GPT-XL", 16, "switches", "E", 200, "--switches", "recompute mlp,recompute full,bf16"),
    )),
    Slice(13, "peers", (race("B32", 150), race("B32-none", 120), race("XL16", 120), race("B128", 100))),
    Slice(14, "peers, more", (
        race("L32", 150), peer_sampling("GPT-B", 32, 70), peer_sampling("GPT-B", 256, 70),
        peer_sampling("GPT-L", 32, 90),
    )),
    Slice(15, "training as users start it", (
        Step("training", module("tests.gpu.check.peer_training", "{peers}"), 300, 520, "lines", variable="PEERS"),
    )),
)  # fmt: skip


def chosen(text: str | None, slices: tuple[Slice, ...] = SLICES) -> list[Slice]:
    """Of `2`, `1-3`, `1,4-6`; None or `all`: all.  Raises ValueError with what is there."""
    known = {piece.number: piece for piece in slices}
    if text is None or text in ("", "all"):
        return list(slices)
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise ValueError(f"slice {part!r}: not a number or a range; there are {min(known)} to {max(known)}")
        for number in range(int(first), int(last or first) + 1):
            if number not in known:
                raise ValueError(f"slice {number}: there are {min(known)} to {max(known)}")
            found.append(known[number])
    return found
