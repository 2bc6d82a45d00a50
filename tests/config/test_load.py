"""Recipes: inheritance, overrides, the resolved form, presets and defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mirai_ds.config import RunConfig, build, dump, load, recipe_names, recipe_text
from mirai_ds.config.load import apply_override, merge, read_recipe
from mirai_ds.config.model_config import ModelConfig
from tests.one_line import one_line

METHODS = ("none", "mirai-e", "mirai-i", "mtp")


def written(path: Path, text: str) -> str:
    """A recipe file."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_bases_are_merged_section_by_section(tmp_path: Path) -> None:
    written(tmp_path / "low.yaml", "seed: 1\nname: low\noptimizer: {lr: 1e-3, betas: [0.8, 0.9], eps: 1e-6}\n")
    (tmp_path / "inner").mkdir()
    written(tmp_path / "inner" / "mid.yaml", "base: ../low.yaml\nname: mid\noptimizer: {lr: 2e-3, betas: [0.7, 0.6]}\n")
    top = written(tmp_path / "top.yaml", "base: inner/mid.yaml\noptimizer: {weight_decay: 0.5}\ntrain: {epochs: 2}\n")
    config = load(top)
    assert (config.seed, config.name, config.train.epochs) == (1, "mid", 2.0)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (2e-3, (0.7, 0.6), 1e-6, 0.5)
    assert optimizer.grad_clip == 1.0


def test_a_base_beside_the_recipe_wins_over_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    written(tmp_path / "recipes" / "low.yaml", "seed: 1")
    written(tmp_path / "work" / "low.yaml", "seed: 2")
    top = written(tmp_path / "recipes" / "top.yaml", "base: low.yaml")
    assert load(top).seed == 1
    (tmp_path / "recipes" / "low.yaml").unlink()
    assert load(top).seed == 2


def test_a_shipped_recipe_as_base(tmp_path: Path) -> None:
    top = written(tmp_path / "top.yaml", "base: digits-baseline\ntrain: {epochs: 3}\n")
    ours, base = load(top), load("digits-baseline")
    assert (ours.train.epochs, ours.model, ours.optimizer) == (3.0, base.model, base.optimizer)
    assert base.train.epochs != 3.0


def test_merge_replaces_lists_and_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": [1, 2], "c": 1}, "d": 1}
    over = {"a": {"b": [3]}, "d": {"e": 1}}
    assert merge(base, over) == {"a": {"b": [3], "c": 1}, "d": {"e": 1}}
    assert base == {"a": {"b": [1, 2], "c": 1}, "d": 1}
    assert over == {"a": {"b": [3]}, "d": {"e": 1}}


def test_null_in_a_recipe_takes_a_base_value_back(tmp_path: Path) -> None:
    written(tmp_path / "low.yaml", "train: {max_steps: 5}")
    assert load(written(tmp_path / "top.yaml", "base: low.yaml\ntrain: {max_steps: }")).train.max_steps is None


NUMBERS = {
    "1e-4": 1e-4,
    "'1e-4'": 1e-4,
    "1.0e-4": 1e-4,
    "1E-4": 1e-4,
    "+.5": 0.5,
    "'0.5'": 0.5,
    "2": 2.0,
    " 3e0 ": 3.0,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them(text: str, tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", f"optimizer: {{lr: {text}, betas: [{text}, 0], final_lr: 0}}")
    expected = NUMBERS[text]
    if expected < 1:
        config = load(path)
        assert config.optimizer.lr == expected
        assert config.optimizer.betas == (expected, 0.0)
    assert load("digits-baseline", [f"optimizer.lr={text}"]).optimizer.lr == expected


def test_off_is_a_word_where_it_is_a_choice(tmp_path: Path) -> None:
    """To YAML it is false; elsewhere it stays that, and true is no choice of these."""
    path = tmp_path / "off.yaml"
    path.write_text("train: {cuda_graph: off, deterministic: off}\nguard: {spike: {action: off}}\n", encoding="utf-8")
    config = load(str(path), ["train.cuda_graph=off"])
    assert (config.train.cuda_graph, config.train.deterministic, config.guard.spike.action) == ("off", False, "off")
    one_line(lambda: load(str(path), ["train.cuda_graph=on"]), "train.cuda_graph = true", "use one of: auto, off")


def test_whole_numbers_in_floating_notation() -> None:
    config = build({"train": {"max_steps": "1e5", "global_batch_size": 8.0}, "sampling": {"top_k": "2e1"}})
    values = (config.train.max_steps, config.train.global_batch_size, config.sampling.top_k)
    assert values == (100_000, 8, 20)
    assert all(type(value) is int for value in values)


def test_text_that_looks_like_a_number_or_a_date_stays_text(tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", "name: 1e5\noutput_dir: 2026-01-31\n")
    config = load(path)
    assert (config.name, config.output_dir) == ("1e5", "2026-01-31")
    assert load(written(tmp_path / "again.yaml", dump(config))) == config
    assert load("digits-baseline", ["name=1e5"]).name == "1e5"


OVERRIDES = {
    "number": ("optimizer.lr=3e-4", lambda c: c.optimizer.lr, 3e-4),
    "spaces": (" optimizer.lr = 3e-4 ", lambda c: c.optimizer.lr, 3e-4),
    "null": ("train.max_steps=null", lambda c: c.train.max_steps, None),
    "list": ("optimizer.betas=[0.5, 0.6]", lambda c: c.optimizer.betas, (0.5, 0.6)),
    "flag": ("logging.progress=false", lambda c: c.logging.progress, False),
    "section": ("foresight={method: mirai-e, warmup_epochs: 0}", lambda c: c.foresight.method, "mirai-e"),
    "deep": ("train.recompute.policy=none", lambda c: c.train.recompute.policy, "none"),
    "new-section": ("foresight.encoder.name=vit", lambda c: c.foresight.encoder.name, "vit"),
    "equals-sign-in-value": ("output_dir=a=b", lambda c: c.output_dir, "a=b"),
    "top": ("seed=7", lambda c: c.seed, 7),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(name: str) -> None:
    override, read, expected = OVERRIDES[name]
    assert read(load("digits-baseline", [override])) == expected


def test_the_last_override_wins_and_others_stay() -> None:
    config = load("digits-baseline", ["seed=7", "optimizer.lr=1", "seed=8"])
    untouched = load("digits-baseline").optimizer.warmup_steps
    assert (config.seed, config.optimizer.lr, config.optimizer.warmup_steps) == (8, 1.0, untouched)
    assert untouched > 0


def test_overrides_inside_the_deepspeed_file_change_a_copy_of_it() -> None:
    config = load("digits-baseline", ["deepspeed.zero_optimization.stage=1"], deepspeed="zero3")
    assert isinstance(config.deepspeed, dict)
    assert config.deepspeed["zero_optimization"]["stage"] == 1
    assert config.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000
    assert config.deepspeed["gradient_clipping"] == "auto"
    bucket = load("digits-baseline", ["deepspeed.zero_optimization.reduce_bucket_size=5e8"]).deepspeed
    assert isinstance(bucket, dict)
    assert bucket["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert bucket["zero_optimization"]["stage"] == 2
    assert load("digits-baseline", deepspeed="zero3").deepspeed == "zero3"


def test_apply_override_works_in_place() -> None:
    data = {"a": {"b": 1}}
    apply_override(data, "a.c.d=2")
    assert data == {"a": {"b": 1, "c": {"d": 2}}}


def test_anchors_and_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = "foresight:\n  encoder: &e {name: a, image_size: 7}\n"
    path = written(tmp_path / "recipe.yaml", text + "deepspeed: {x: {<<: *e, name: b}, y: {<<: *e}, z: *e}\n")
    deepspeed = load(path).deepspeed
    one = {"name": "a", "image_size": 7}
    assert deepspeed == {"x": {"name": "b", "image_size": 7}, "y": one, "z": one}


def again(config: RunConfig, folder: Path) -> None:
    """What was dumped loads back to the same run, and is dumped the same."""
    text = dump(config)
    loaded = load(written(folder / "resolved.yaml", text))
    assert loaded == config
    assert dump(loaded) == text
    assert set(yaml.safe_load(text)) == set(RunConfig.model_fields)


def test_some_recipes_are_shipped() -> None:
    assert {"digits-baseline", "digits-mirai-e"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_their_resolved_form_again(name: str, tmp_path: Path) -> None:
    if "par_tokens" in read_recipe(name)["model"] and "par_tokens" not in ModelConfig.model_fields:
        pytest.skip("model.par_tokens is not there yet")
    config = load(name)
    assert config.name == name
    assert recipe_text(name).startswith("#")
    again(config, tmp_path)


@pytest.mark.parametrize("convention", ["official", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_convention_loads_again(method: str, convention: str, tmp_path: Path) -> None:
    config = build({"foresight": {"method": method, "convention": convention}, "model": {"num_classes": 5}})
    assert config.sampling.classes == 5
    again(config, tmp_path)


@pytest.mark.parametrize("kind", ["const", "step", "cosine"])
def test_every_schedule_loads_again(kind: str, tmp_path: Path) -> None:
    schedule = {"kind": kind} | ({"at_epochs": [80, 160]} if kind == "step" else {})
    config = build({"foresight": {"method": "mirai-e", "schedule": schedule}})
    assert config.foresight.schedule.multipliers == ([1.0, 0.5, 0.25] if kind == "step" else None)
    again(config, tmp_path)


def test_an_inline_deepspeed_section_loads_again(tmp_path: Path) -> None:
    config = build({"deepspeed": {"zero_optimization": {"stage": 1, "reduce_bucket_size": "5e8"}, "bf16": {}}})
    assert config.deepspeed == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500_000_000}, "bf16": {}}
    again(config, tmp_path)


def test_a_recipe_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load(written(tmp_path / "recipe.yaml", "\ufeffseed: 3\n")).seed == 3


def test_an_empty_recipe_is_the_default_run(tmp_path: Path) -> None:
    assert load(written(tmp_path / "recipe.yaml", "# nothing\n")) == RunConfig()


def test_runs_share_no_section_and_no_list() -> None:
    first, second = RunConfig(), RunConfig()
    for name, field in RunConfig.model_fields.items():
        value = getattr(first, name)
        if hasattr(value, "model_fields_set"):
            assert value is not getattr(second, name), name
            assert value is not field.default, name
    assert first.eval.loss.weights is not second.eval.loss.weights
    assert first.train.recompute is not second.train.recompute
    assert first.foresight.schedule is not second.foresight.schedule


def test_what_validation_fills_in_does_not_reach_the_defaults() -> None:
    before = dump(RunConfig())
    few = build({"model": {"num_classes": 3}, "foresight": {"method": "mirai-i"}, "train": {"epochs": 1}})
    assert (few.sampling.classes, few.foresight.layer, few.foresight.num_heads) == (3, 8, 1)
    few.train.recompute.policy = "full"
    few.eval.loss.weights.append("raw")
    assert dump(RunConfig()) == before
    assert RunConfig().sampling.classes == 10


OFFICIAL = {
    "head_order": "official",
    "slots": "input",
    "border": "wrap",
    "heads_reduction": "sum",
    "teacher_sees_last_token": False,
    "normalizer": "valid",
    "heads_in_warmup": "decay",
}
PAPER = {
    "head_order": "nearest",
    "slots": "predict",
    "border": "mask",
    "heads_reduction": "mean",
    "teacher_sees_last_token": True,
    "normalizer": "valid",
    "heads_in_warmup": "sleep",
}
E_FIELDS = {
    "num_heads": 3,
    "warmup_epochs": 15.0,
    "weights": [2.0] * 3,
    "layer": 8,
    "teacher_layer": 8,
    "encoder": None,
    "head": "mlp",
}
I_FIELDS = {
    "num_heads": 1,
    "warmup_epochs": 0.0,
    "weights": [2.0],
    "layer": 8,
    "teacher_layer": None,
    "class_slot": False,
    "head": "mlp",
}
MTP_FIELDS = {
    "num_heads": 3,
    "warmup_epochs": 0.0,
    "weights": [1.0] * 2,
    "layer": 12,
    "teacher_layer": None,
    "class_slot": False,
    "head": "transformer",
    "head_attention": "causal",
    "slots": "predict",
    "teacher_sees_last_token": None,
}
PRESETS = {
    ("mirai-e", "official"): {**OFFICIAL, **E_FIELDS, "class_slot": True},
    ("mirai-e", "paper"): {**PAPER, **E_FIELDS, "class_slot": False},
    ("mirai-i", "official"): {**OFFICIAL, **I_FIELDS},
    ("mirai-i", "paper"): {**PAPER, **I_FIELDS},
    ("mtp", "official"): {**OFFICIAL, **MTP_FIELDS},
    ("mtp", "paper"): {**PAPER, **MTP_FIELDS},
}


@pytest.mark.parametrize(("method", "convention"), PRESETS)
def test_a_convention_fills_exactly_its_fields(method: str, convention: str) -> None:
    filled = build({"foresight": {"method": method, "convention": convention}}).foresight.model_dump()
    plain = build({}).foresight.model_dump()
    expected = PRESETS[method, convention]
    assert {name: filled[name] for name in expected} == expected
    changed = {name for name in plain if filled[name] != plain[name]}
    given = {"method", *({"convention"} if convention == "paper" else ())}
    extra = {"encoder"} if method == "mirai-i" else set()
    assert changed == {name for name, value in expected.items() if value is not None} | given | extra


def test_without_a_method_nothing_is_filled() -> None:
    foresight = build({"foresight": {"convention": "paper"}}).foresight
    names = {*OFFICIAL, *E_FIELDS, "class_slot", "flat_stride"}
    assert {name: getattr(foresight, name) for name in names} == dict.fromkeys(names)
    assert (foresight.active, foresight.heads) == (False, 0)


OTHER_VALUES = {
    "head_order": "nearest",
    "slots": "predict",
    "border": "clamp",
    "heads_reduction": "mean",
    "teacher_sees_last_token": True,
    "normalizer": "constant",
    "num_heads": 2,
    "warmup_epochs": 3.0,
    "class_slot": False,
    "layer": 5,
    "teacher_layer": 7,
    "weights": [1.0, 3.0, 2.0],
    "head": "transformer",
    "teacher_weights": "runs/other",
}


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_explicit_fields_beat_the_preset_and_leave_the_rest(field: str) -> None:
    given = {field: OTHER_VALUES[field]} | ({"class_slot": False} if field == "slots" else {})
    foresight = build({"foresight": {"method": "mirai-e", **given}}).foresight.model_dump()
    preset = build({"foresight": {"method": "mirai-e"}}).foresight.model_dump()
    assert foresight[field] == OTHER_VALUES[field] != preset[field]
    follow = {
        "num_heads": {"weights"}, "layer": {"teacher_layer"}, "head": {"head_attention"},
        "teacher_weights": {"warmup_epochs"},
    }.get(field, set())  # fmt: skip
    assert {name for name in preset if foresight[name] != preset[name]} == {*given, *follow}


@pytest.mark.parametrize(
    ("size", "layer"), [("GPT-B", 8), ("GPT-L", 16), ("GPT-XL", 24), ("GPT-XXL", 32), ("GPT-1B", 15)]
)
def test_default_layer_is_two_thirds_of_the_depth(size: str, layer: int) -> None:
    foresight = build({"model": {"size": size}, "foresight": {"method": "mirai-e"}}).foresight
    assert (foresight.layer, foresight.teacher_layer) == (layer, layer)
    follows = build({"model": {"size": size}, "foresight": {"method": "mirai-e", "layer": 3}}).foresight
    assert (follows.layer, follows.teacher_layer) == (3, 3)


def test_one_block_still_has_a_layer() -> None:
    tiny = {"size": "custom", "dim": 8, "n_layer": 1, "n_head": 2, "block_size": 4}
    assert build({"model": tiny, "foresight": {"method": "mirai-e"}}).foresight.layer == 1


SIZES = {
    "GPT-B": (768, 12, 12, 2048),
    "GPT-L": (1024, 24, 16, 2816),
    "GPT-XL": (1280, 36, 20, 3584),
    "GPT-3B": (3200, 24, 32, 8704),
}


@pytest.mark.parametrize("size", SIZES)
def test_named_sizes(size: str) -> None:
    model = ModelConfig(size=size, block_size=576)
    assert (model.width, model.depth, model.heads, model.ffn_hidden) == SIZES[size]
    assert (model.grid, model.grid_size) == (24, 24)
    assert model == ModelConfig(size=size, block_size=576, dim=model.dim, n_layer=model.n_layer, grid_size=24)


def test_reference_names() -> None:
    names = {"dim": 8, "n_layer": 2, "n_head": 2, "vocab_size": 5, "block_size": 4, "num_classes": 3}
    model = ModelConfig.from_reference({**names, "unused": 1})
    assert {name: getattr(model, name) for name in names} == names
    assert (model.par_tokens, model.slots) == (None, 4)
    par = ModelConfig.from_reference({**names, "block_size": 16, "ar_token_num": 4, "spe_token_num": 3})
    assert (par.par_tokens, par.slots) == (4, 19)
