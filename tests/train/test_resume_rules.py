"""Every field of the configuration has a rule for resumes, and follows it."""

from __future__ import annotations

from typing import Any

import pytest

from mirai_ds.config import RunConfig, UserError
from mirai_ds.runs.records import flatten
from mirai_ds.train.resume_rules import RULES, changed, check_allowed, check_changes, is_allowed, rule_of

FIELDS = flatten(RunConfig(foresight={"method": "mirai-i"}, data={"source": "store", "path": "s", "images": "i"})
                 .model_dump(mode="json"))  # fmt: skip

# A second way to list what may change: by what it means to whoever resumes.
FREE = {
    "name", "output_dir", "launch.cpu_ranks", "guard.hang_seconds", "logging.every_steps", "checkpoint.keep_last",
    "eval.fid.every_epochs", "sampling.cfg_scale", "data.workers", "foresight.kernel", "train.compile",
    "train.micro_batch_size", "train.recompute.policy", "train.cuda_graph", "hooks",
}  # fmt: skip
TOLD = {
    "optimizer.lr", "optimizer.betas", "ema.decay", "train.epochs", "train.max_steps", "train.precision",
    "foresight.weights", "foresight.schedule.kind", "foresight.warmup_epochs", "data.path", "deepspeed",
}  # fmt: skip
KEPT = {
    "seed", "train.global_batch_size", "model.size", "model.rope_base", "model.norm_eps", "model.ffn_dropout",
    "data.source", "data.split_seed", "foresight.method", "foresight.layer", "foresight.num_heads",
    "foresight.projector_dim", "foresight.encoder.name", "foresight.encoder.layer", "foresight.layout",
}  # fmt: skip


@pytest.mark.parametrize(("rule", "names"), [("free", FREE), ("told", TOLD), ("kept", KEPT)])
def test_rules_are_what_they_mean(rule: str, names: set[str]) -> None:
    assert names <= FIELDS.keys()
    assert {name: rule_of(name) for name in names} == dict.fromkeys(names, rule)


def test_every_field_has_a_rule_and_every_rule_a_field() -> None:
    for name in FIELDS:
        assert rule_of(name) in ("free", "told", "kept"), name
    for name in RULES:
        assert any(field == name or field.startswith(f"{name}.") for field in FIELDS), name


class _Config:
    """Stands for a configuration: any one field other, whatever else it would need to be valid."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def model_dump(self, mode: str) -> dict[str, Any]:
        return self.values


def test_walk_over_all_fields() -> None:
    then: Any = _Config(dict(FIELDS))
    for name in sorted(FIELDS):
        now: Any = _Config({**FIELDS, name: "another"})
        assert list(changed(then, now)) == [name]
        if rule_of(name) == "kept":
            with pytest.raises(UserError, match=f"--allow-change {name}"):
                check_changes(then, now, "folder", [])
        told = check_changes(then, now, "folder", [name.partition(".")[0]])
        assert [line.partition(":")[0] for line in told] == ([] if rule_of(name) == "free" else [name])
    assert check_changes(then, then, "folder", []) == []


def test_allowed_names() -> None:
    check_allowed(["model", "model.rope_base", "foresight.schedule.kind"])
    for wrong in ("rope_base", "modle", "model.rope"):
        with pytest.raises(UserError, match="no such field"):
            check_allowed([wrong])
    assert is_allowed("model.dim", ["model"])
    assert not is_allowed("model.dim", ["model.di", "mode"])
