"""Mistakes in a recipe's YAML and in `--set`, before any field is looked at."""

from __future__ import annotations

from tests.config.mistake import given, recipe

YAML = {
    "tab": recipe("model:\n\tsize: GPT-B", ":2:1:", "a tab; indent with spaces"),
    "two-colons": recipe("name: a: b", ":1:8:", "unexpected ':'", "check the indentation"),
    "indentation": recipe("model:\n  size: GPT-B\n dim: 3", ":3:2:", "does not line up with the lines above"),
    "open-bracket": recipe("optimizer: {lr: 1\n", ":2:1:", "a bracket is not closed"),
    "open-quote": recipe("name: 'x", ":1:9:", "a quote is not closed"),
    "bad-character": recipe("name: @x", ":1:7:", "character '@' cannot start a value; quote the text"),
    "alias": recipe("name: *x", ":1:7:", "found undefined alias 'x'"),
    "alias-of-itself": recipe(
        "deepspeed: &x {bf16: [*x]}", "deepspeed.bf16: an alias of the section it is in; remove it"
    ),
    "python-tag": recipe("name: !!python/object:os.system x", ":1:7:", "tags such as !!python are not allowed"),
    "two-documents": recipe("seed: 1\n---\nseed: 2", ":2:1:", "one recipe a file; remove the '---'"),
    "control-character": recipe("name: \x01", "a control character; remove it"),
    "bad-binary": recipe("seed: 0b_", "not valid YAML", "invalid literal", "quote text"),
    "list": recipe("- model\n- train", "a recipe is a mapping, not a list", "write `section:`"),
    "text": recipe("just words", "a recipe is a mapping, not text", "write `section:`"),
    "no-space": recipe("seed:1", "a recipe is a mapping, not text", "write `section:`"),
    "key-is-a-number": recipe("1: 2", "keys must be names, not 1", "quote it"),
    "duplicate-section": recipe(
        "model: {}\ntrain: {}\nmodel: {}", ":3: model: given twice (first in line 1); keep one"
    ),
    "duplicate-field": recipe(
        "optimizer:\n  lr: 1\n  eps: 1\n  lr: 2\n", ":4: optimizer.lr: given twice (first in line 2); keep one"
    ),
    "duplicate-in-one-line": recipe("optimizer: {lr: 1, lr: 1}", ":1: optimizer.lr: given twice", "keep one"),
    "base-is-a-list": recipe("base: [a, b]", "base = ['a', 'b']", "must be the name or file of one recipe"),
    "base-unknown": recipe("base: digits-mirai", "base = 'digits-mirai'", "no such recipe", "did you mean 'digits-"),
    "base-no-file": recipe(
        "base: none.yaml", "base = 'none.yaml'", "no such recipe file; give a .yaml file; `mirai-ds recipes"
    ),
    "base-itself": recipe("base: recipe.yaml", "recipe.yaml: base: goes round in a circle", "remove one `base:`"),
    "set-no-sign": given("optimizer.lr", "--set 'optimizer.lr'", "write it as section.field=value"),
    "set-empty-part": given("optimizer..lr=1", "--set 'optimizer..lr=1'", "write it as section.field=value"),
    "set-no-key": given("=1", "--set '=1'", "write it as section.field=value"),
    "set-bad-yaml": given("foresight.weights=[1, 2", "foresight.weights=[1, 2'", "a bracket is not closed"),
    "set-base": given("base=digits-baseline", "base=digits-baseline", "base belongs into the recipe file"),
    "set-into-value": given("name.x=1", "name = 'a'", "is a value, not a section", text="name: a"),
    "set-duplicate": given("optimizer={lr: 1, lr: 2}", "lr: given twice", "keep one"),
    "set-two-lines": given("name=a\nb", "name = 'a b'", "use e.g. 'a-b'"),
}
