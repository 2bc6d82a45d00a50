"""The benchmark's numbers mean what their columns say; how long things take is not tested."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mirai_ds.benchmarks import harness, traffic
from mirai_ds.benchmarks import kernels as bench
from mirai_ds.cli.main import main
from mirai_ds.config import ForesightConfig
from mirai_ds.foresight import index_table
from mirai_ds.kernels.foresight_cosine import reference
from tests.benchmarks.pages import ROOT, check_page
from tests.marks import by_hand


def test_the_page_shows_the_measured_rows() -> None:
    rows = check_page("kernels.md", "kernels", bench.table)
    assert bench.table(rows).count("\n") >= 13
    assert traffic.table(rows) in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["E", by_hand("I")])
def test_all_variants_compute_the_same(method: str) -> None:
    t = bench.task(bench.METHODS[method], 48, 2, torch.float32, "cpu")
    runs = bench.variants(t)
    wanted = runs["eager"]()
    for name in ("fused", "compiled"):
        for mine, theirs in zip(runs[name](), wanted, strict=True):
            assert float((mine - theirs).abs().max()) < 1e-6 * float(theirs.abs().max()), name
    # Cosines of random vectors cancel, so the loss is compared on the scale of what was summed: each cosine carries a
    # few roundings of its own size, 1/sqrt(width) on average.
    exact = reference.foresight_cosine([p.detach().double() for p in t.projected], *t.constants)[0]
    scale = float(t.constants[2].sum()) * 48**-0.5
    for loss in (bench.masked(t.projected, *t.constants), reference.foresight_cosine(t.projected, *t.constants)[0]):
        assert abs(float(loss.detach()) - float(exact)) < 2.0**-24 * scale


def test_its_tasks_are_trainings() -> None:
    """The table of Mirai-I with official offsets and wrapped borders."""
    t = bench.task(3, 8, 1, torch.float32, "cpu")
    table = index_table(ForesightConfig(method="mirai-i", num_heads=3, convention="official", slots="predict"), 16)
    assert torch.equal(t.index, table.int())
    assert t.fewest_bytes == 4 * 8 * 256 * (3 + 3 + 1)


def test_the_copy_moves_the_fewest_bytes() -> None:
    t = bench.task(3, 64, 2, torch.bfloat16, "cpu")
    copied = bench.variants(t)["copy"]()
    assert 2 * copied.numel() * copied.element_size() == t.fewest_bytes


@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("heads", [1, 3])
def test_peak_memory_is_the_gradients_own(dtype: str, heads: int) -> None:
    t = bench.task(heads, 256, 4, bench.DTYPES[dtype], "cpu")
    runs = bench.variants(t)
    gradient = sum(p.numel() * p.element_size() for p in t.projected)
    assert gradient <= harness.peak_extra_bytes(runs["fused"], "cpu") <= gradient + 4096
    assert harness.peak_extra_bytes(runs["eager"], "cpu") > 2 * gradient


def row(variant: str, ms: float, size: str = "B") -> bench.Row:
    facts = {"date": "2026-01-02", "device": "a", "python": "3", "torch": "2", "cuda": "", "command": "c"}
    return bench.Row(
        **facts, op="foresight_cosine", size=size, method="E", batch=2, heads=3, width=8, dtype="bf16",
        variant=variant, median_ms=ms, ratio=ms / 2, extra_mib=1.0, gradient_mib=2.0, gb_per_s=1.0,
    )  # fmt: skip


def write(path: Path, rows: list[bench.Row]) -> None:
    harness.append(path, bench.COLUMNS, [asdict(row) for row in rows], bench.KEY)


def test_rows_replace_those_of_the_same_device_and_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path, [row("fused", 2.0), row("eager", 40.0), row("compiled", 5.0), row("copy", 1.0)])
    write(path, [row("fused", 4.0), row("fused", 8.0, "L")])
    write(path, [replace(row("fused", 16.0), device="b")])
    found = {(r["device"], r["size"], r["variant"]): float(r["median_ms"]) for r in harness.read(path)}
    assert found == {
        ("a", "B", "fused"): 4.0, ("a", "B", "eager"): 40.0, ("a", "B", "compiled"): 5.0, ("a", "B", "copy"): 1.0,
        ("a", "L", "fused"): 8.0, ("b", "B", "fused"): 16.0,
    }  # fmt: skip
    lines = bench.table([r for r in harness.read(path) if (r["device"], r["size"]) == ("a", "B")]).splitlines()
    assert lines[2] == "| a, torch 2, 2026-01-02 | GPT-B, Mirai-E, 2 | bf16 | 4 | 20.0x | 2.5x | 0.50x | 0.50 |"


def test_what_else_moves_memory_is_what_the_model_runs() -> None:
    """Uses a step, counted in a real forward pass."""
    from mirai_ds.config import ModelConfig
    from mirai_ds.model import GPT
    from mirai_ds.model.gpt import FeedForward, RMSNorm

    model = ModelConfig(size="GPT-B")
    with torch.device("meta"):
        gpt = GPT(model)
    kinds = [type(module) for module in gpt.modules()]
    found = traffic.operations(model, 1, torch.float32, "cpu")
    assert found["rmsnorm"].uses == kinds.count(RMSNorm)
    assert found["swiglu"].uses == kinds.count(FeedForward)
    assert found["rotary"].uses == 2 * model.depth
    assert found["swiglu"].inputs[0].shape == (1, 256, model.ffn_hidden)
    assert found["cross-entropy"].inputs[0].shape == (1, 256, 16384)
    assert all(op.liger is None for op in found.values())


BENCHMARKS = ("step", "sampling", "data", "safety", "startup", "memory", "kernels", "traffic")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_mistakes_are_told_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    for arguments, said in (
        (["--out", str(tmp_path / "none" / "rows.csv")], "is a folder, or in one that is missing or cannot be written"),
        (["--table", "--out", str(tmp_path / "none.csv")], "no such file"),
    ):
        done = CliRunner().invoke(main, ["bench", name, *arguments])
        assert done.exit_code == 2
        assert done.output.startswith(f"mirai-ds: error: --out {arguments[-1]}: ")
        assert said in done.output
        assert done.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    other = tmp_path / "rows.csv"
    other.write_text("a,b\n1,2\n", encoding="utf-8")
    done = CliRunner().invoke(main, ["bench", name, "--out", str(other)])
    assert (done.exit_code, done.output) == (
        2, f"mirai-ds: error: --out {other}: holds rows with other columns; give another name\n"
    )  # fmt: skip
    assert other.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_the_sizes_are_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--sizes", "XXL"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_the_reference_asks_the_device_nothing() -> None:
    """On the meta device there are no values, so whatever needs one (`nonzero`, `.item()`) fails."""
    t = bench.task(3, 48, 2, torch.float32, "cpu")
    heads, target, *constants = [p.detach().to("meta") for p in t.projected], *(c.to("meta") for c in t.constants)
    loss, cosine = reference.foresight_cosine([h.requires_grad_() for h in heads], target, *constants)
    loss.backward()
    assert (loss.shape, cosine.shape) == ((), (3,))
