"""The model card of an exported folder, filled from the run that trained it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mirai_ds.checkpoint.store import find
from mirai_ds.checkpoint.weights import LoadedWeights
from mirai_ds.config import ForesightConfig
from mirai_ds.config.sizes import parameter_count
from mirai_ds.paper.evaluations import Evaluation, read_evaluations
from mirai_ds.runs.records import METRICS, parse_curve, read_json
from mirai_ds.version import __version__

SHOWN = ("held_out/", "quality/", "score/", "loss/ntp", "cosine/")  # metrics, by how their names begin


def model_card(source: Path, loaded: LoadedWeights, tokenizer: str, codebook: bool, classes: Iterable[str]) -> str:
    """Markdown with the metadata that model hubs read.  tokenizer: what it is called; codebook: whether the folder
    holds what shows its tokens; classes: their names in label order, none where unknown."""
    from huggingface_hub import ModelCardData  # here: the command line starts without them
    from jinja2 import Environment, PackageLoader, StrictUndefined

    config = loaded.config
    of_a_run = source.is_dir() and loaded.data is not None
    tags = ["mirai_ds", "image-generation", "autoregressive", "llamagen", config.foresight.method]
    metadata = ModelCardData(library_name="mirai_ds", tags=tags, base_model=None).to_yaml()
    templates = Environment(loader=PackageLoader("mirai_ds.library", "."), undefined=StrictUndefined, autoescape=False)
    return templates.get_template("model_card.md.j2").render(
        metadata=f"---\n{metadata}\n---", name=config.name, model=config.model.model_dump(),
        size=f"{config.model.size} ({config.model.depth} blocks of width {config.model.width})",
        parameters=f"{parameter_count(config.model):,}", method=method_in_words(config.foresight), version=__version__,
        codebook=codebook, tokenizer=tokenizer, facts=list(_facts(source, loaded, of_a_run, tokenizer)),
        metrics=list(_metrics(source, loaded.step)) if of_a_run else [], classes=list(enumerate(classes)),
        evaluations=[_row(one) for one in read_evaluations(source)[0]] if of_a_run else [],
    )  # fmt: skip


def method_in_words(foresight: ForesightConfig) -> str:
    """The method with what a reader asks first."""
    if not foresight.active:
        return "next-token prediction alone"
    weights = ", ".join(f"{weight:g}" for weight in foresight.weights or [])
    heads = f"{foresight.heads} head{'s' * (foresight.heads > 1)} at block {foresight.layer}"
    return f"{foresight.method} ({foresight.convention} convention, {heads}, lambda {weights})"


def _facts(source: Path, loaded: LoadedWeights, of_a_run: bool, tokenizer: str) -> Iterable[tuple[str, str]]:
    config = loaded.config
    kind = "the average (EMA) of the" if loaded.kind == "ema" else "raw"
    yield "weights", f"{kind} weights, step {loaded.step}, fp32"
    yield "tokenizer", tokenizer
    if not of_a_run:
        return
    train, optimizer, rules = config.train, config.optimizer, config.sampling
    yield "training", f"{train.epochs:g} epochs, batches of {train.global_batch_size}, precision {train.precision}"
    rate = f"learning rate {optimizer.lr:g} ({optimizer.schedule})"
    yield "optimizer", f"AdamW, {rate}, weight decay {optimizer.weight_decay:g}"
    yield "average", f"decay {config.ema.decay:g}"
    yield "sampling", f"cfg {rules.cfg_scale:g}, top-k {rules.top_k}, top-p {rules.top_p:g}"
    info = find(source, str(loaded.step))[1]
    yield "data", f"sha256 of codes and labels {info.data or 'not recorded'}"
    yield "code", info.code or "not recorded"
    packages = (read_json(source / "environment.json") or {}).get("packages") or {}
    yield "versions", ", ".join(f"{name} {packages[name]}" for name in ("torch", "deepspeed") if name in packages)


def _metrics(source: Path, step: int) -> Iterable[tuple[str, str, int]]:
    """The newest value of each up to the weights' step."""
    try:
        curve = parse_curve((source / METRICS).read_bytes())
    except OSError:
        return
    for name, values in sorted(curve.values.items()):
        upto = [at for at in values if at <= step]
        if name.startswith(SHOWN) and upto:
            yield name, f"{values[max(upto)]:.4f}", max(upto)


def _row(one: Evaluation) -> list[str]:
    drawn = [f"{key} {one.sampling[key]}" for key in ("checkpoint_step", "weights", "cfg_scale", "policy", "seed")
             if key in one.sampling]  # fmt: skip
    scores = ", ".join(f"{name} {value:.4g}" for name, value in one.values.items())
    reference = str(one.reference.get("name", "not recorded"))
    return [one.path.name, str(one.num_samples or "not recorded"), reference, ", ".join(drawn), scores]
