"""No value of a user becomes a command or an option of Slurm: it is refused, or reaches the rank as it was given."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirai_ds.cli.main import main
from mirai_ds.config import UserError
from mirai_ds.submit import SlurmCluster, SlurmJob, SubmitOptions, plan, read_cluster, render, write_script
from mirai_ds.submit.cluster import shipped_clusters
from mirai_ds.submit.job import TEMPLATES
from mirai_ds.submit.values import seconds
from tests.one_line import one_line
from tests.slurm.conftest import cluster_file
from tests.slurm.stubs import FakeSlurm

NASTY = ["a b", "it's", '"', "$(touch pwned)", "`touch pwned`", "; touch pwned", "|touch pwned", "&", "$HOME", "\\",
         "*", "~", "#x", "--help", "-", "a\\", "{{run_dir}}", "{{environment}}", "%j", "é", "漢字", "!x", "{a,b}", "=",
         ">pwned", "'$(touch pwned)'", "\u200b", "#SBATCH --nodes=9"]  # fmt: skip
BREAKS = ["\n", "\r", "\x00", "\x1b[2J", "\t", "\x7f", "\x85", "\u2028", "\u2029", "\ud800"]
# Everything that may stand in one line.
LINES = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=30)
ANYTHING = st.one_of(st.text(max_size=20), st.sampled_from(NASTY + BREAKS), st.text("a-z0;$`\n \"'#", max_size=20))
PATTERNED = ["name", "time", "partition", "account", "qos", "constraint", "dependency"]
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def script_of(cluster: SlurmCluster | None = None, **options: Any) -> str:
    cluster = cluster or SlurmCluster(gpus_per_node=4, python="python")
    job = plan(SubmitOptions(**{"recipe": "digits-baseline", "nodes": 2, "check": False, **options}), cluster)
    return render(job, cluster, Path("/runs/x/jobs/x.sbatch"))


def directives(script: str) -> list[str]:
    """What sbatch reads: lines that begin with #SBATCH, up to the first command."""
    found = []
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found.append(line.removeprefix("#SBATCH "))
    return found


def assert_is_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_directives() -> None:
    found = directives(script_of(nodes=4, gpus_per_node=4, time="1-12:00:00", partition="a,b", account="me", qos="high",
                                 constraint="a100&nvlink", name="my.run"))  # fmt: skip
    assert found == [
        "--job-name=my.run", "--nodes=4", "--ntasks-per-node=4", "--cpus-per-task=8", "--time=1-12:00:00",
        "--partition=a,b", "--account=me", "--qos=high", "--constraint=a100&nvlink", "--gpus-per-node=4", "--exclusive",
        "--mem=0", "--signal=B:USR1@300", "--requeue", "--open-mode=append",
    ]  # fmt: skip


def test_what_a_cluster_file_changes() -> None:
    cluster = SlurmCluster(
        gpus_per_node=8, gpu_request="gres", gpu_type="a100", exclusive=True, memory="400G", cpus_per_rank=6,
        network_interface="ib0", environment={"NCCL_IB_HCA": "mlx5; x"}, setup=["module load cuda/12.8"],
        signal_seconds=600, time="48:00:00", partition="big", python="/shared/venv/bin/python",
    )  # fmt: skip
    found = directives(script_of(cluster, gpus_per_node=2))
    assert "--gres=gpu:a100:2" in found
    assert "--exclusive" not in found  # only a part of the node
    assert "--mem=400G" in found
    assert {"--cpus-per-task=6", "--signal=B:USR1@600", "--time=48:00:00", "--partition=big"} < set(found)
    text = script_of(cluster)
    assert "\nmodule load cuda/12.8\nexport NCCL_IB_HCA='mlx5; x'\nexport NCCL_SOCKET_IFNAME=ib0\n" in text
    cpu = script_of(SlurmCluster(gpus_per_node=0, ranks_per_node=2, exclusive=False))
    assert "--ntasks-per-node=2" in directives(cpu)
    assert "gpu" not in "".join(directives(cpu))
    assert "export DS_ACCELERATOR=cpu" in cpu
    assert "PYTORCH_CUDA_ALLOC_CONF" not in cpu


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template(template: Any, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a finished run of the name in runs/ (the demo's) would be refused
    (tmp_path / "list.txt").write_text("digits-baseline\ndigits-mirai-e --set foresight.num_heads=2\n")
    recipe, arguments = {
        "array": (str(tmp_path / "list.txt"), ()),
        "extract": ("codes", ("--images", "in", "--out", "o")),
        "sample_evaluate": ("runs/x", ("--cfg", "1.5")),
    }.get(template, ("digits-mirai-e", ()))
    nodes = 1 if template == "sample_evaluate" else nodes
    text = script_of(read_cluster("a100"), template=template, nodes=nodes, recipe=recipe, arguments=arguments)
    assert_is_bash(text)
    assert "{{" not in text
    found = directives(text)
    assert f"--nodes={nodes}" in found
    assert f"--ntasks-per-node={1 if template == 'sample_evaluate' else 8}" in found
    assert len(found) == text.count("\n#SBATCH ")  # none comes too late to be read
    assert ("--requeue" in found) == (template in ("train", "array", "extract"))


@pytest.mark.parametrize("option", [("--num", "50000"), ("--num-images=50000",)])
def test_many_images_take_all_ranks_and_are_judged(option: tuple[str, ...]) -> None:
    options = {"template": "sample_evaluate", "recipe": "runs/my run", "nodes": 2}
    text = script_of(read_cluster("a100"), arguments=(*option, "--out", "a b.npz"), **options)
    assert_is_bash(text)
    found = directives(text)
    assert {"--nodes=2", "--ntasks-per-node=8", "--requeue", "--signal=B:USR1@300"} <= set(found)
    assert len(found) == text.count("\n#SBATCH ")
    assert f"mirai_ds sample 'runs/my run' {shlex.join(option)} --out 'a b.npz')" in text
    assert "evaluate=()" in text
    judged = {"reference": Path("VIRTUAL ref.npz"), "inception": Path("inception.pth")}
    text = script_of(read_cluster("a100"), arguments=(*option, "--out", "a b.npz"), **options, **judged)
    command = "-m mirai_ds evaluate 'a b.npz' 'VIRTUAL ref.npz' --weights inception.pth --json"
    assert f"{command} 'runs/my run/evaluations/a b.json')" in text  # where `table` and `report` look
    options["recipe"] = "my weights.pt"
    text = script_of(read_cluster("a100"), arguments=(*option, "--out", "a b.npz"), **options, **judged)
    assert f"{command} 'a b.scores.json')" in text


@pytest.mark.parametrize("field", PATTERNED)
@QUICK
@given(value=ANYTHING)
def test_values_of_sbatch_lines(field: str, value: str) -> None:
    """Either refused, or the line holds exactly the value and no line more is there."""
    plain = directives(script_of())
    try:
        text = script_of(**{field: value})
    except UserError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_.,:&|*()\[\]=^-]*", value)
    found = directives(text)
    option = {"name": "job-name"}.get(field, field)
    if value and field != "dependency":
        assert f"--{option}={value}" in found
    assert [line for line in found if not line.startswith(f"--{option}=")] == [
        line for line in plain if not line.startswith(f"--{option}=")
    ]


@pytest.mark.parametrize("character", BREAKS)
@pytest.mark.parametrize("field", ["recipe", "overrides", "deepspeed", "run_dir", "cluster", "name"])
def test_line_breaks_are_refused(field: str, character: str) -> None:
    value = f"x{character}touch pwned"
    options = {field: (value,) if field == "overrides" else Path(value) if field == "run_dir" else value}
    if field == "cluster":
        one_line(lambda: read_cluster(value), "U+")
    else:
        one_line(lambda: script_of(**options))


@QUICK
@given(run_dir=st.one_of(LINES, st.sampled_from(NASTY)), path=st.one_of(LINES, st.sampled_from(NASTY)))
def test_ranks_get_what_was_given(run_dir: str, path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Through the command line, the saved file and bash: the same strings."""
    folder = tmp_path_factory.mktemp("quoting")
    slurm = FakeSlurm(folder / "stub")
    overrides = ["data.source=npz", f"data.path={json.dumps('x' + path, ensure_ascii=False)}"]
    run = f"{folder}/r{run_dir}"
    options = [part for value in overrides for part in ("--set", value)]
    arguments = ["submit", "digits-baseline", "--nodes", "2", "--cluster",
                 cluster_file(folder, more="python: python\n"), "--dry-run", "--no-check", *options, "--run-dir",
                 run]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    if done.exit_code:
        assert done.exit_code == 2
        assert (
            "%" in run_dir or "\\" in run_dir or "not valid YAML" in done.output or "x" + path != ("x" + path).strip()
        )
        return
    text = done.stdout
    write_script(folder / "x.sbatch", text)  # UTF-8
    assert_is_bash(text)
    slurm.set('echo "finished at step 9" >"$MIRAI_DS_OUTCOME"')
    before = set(os.listdir())
    ran = slurm.run(text)
    assert ran.code == 0, ran.out
    run = os.path.abspath(run)
    assert ran.ranks == [["--kill-on-bad-exit=1", "python", "-m", "mirai_ds", "train", "digits-baseline", *options,
                          "--resume", "if-present", "--run-dir", run]]  # fmt: skip
    assert Path(run, "jobs", "outcome-7-0").exists()
    assert set(os.listdir()) == before


@QUICK
@given(value=st.text(max_size=20))
def test_a_cluster_files_variables_are_quoted(value: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        cluster = SlurmCluster(gpus_per_node=0, ranks_per_node=1, environment={"SITE_VALUE": value}, python="python")
    except ValueError:
        assert any(not character.isprintable() for character in value)
        return
    slurm = FakeSlurm(tmp_path_factory.mktemp("variables") / "stub")
    slurm.set('printf "%s" "$SITE_VALUE" >"$STUB/value"; echo finished >"$MIRAI_DS_OUTCOME"')
    assert slurm.run(script_of(cluster, run_dir=slurm.folder / "run")).code == 0
    assert (slurm.folder / "value").read_text(encoding="utf-8") == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('gpus_per_node: 0\nsetup: ["echo \'open"]\n', ["setup[0]", "no whole shell command"]),
        ('setup: ["if true; then"]\n', ["setup[0]", "no whole shell command"]),
        ('setup: ["module load x \\\\"]\n', ["setup[0]", "goes on in the next"]),
        ('setup: ["module load x\\n#SBATCH --nodes=9"]\n', ["U+000A"]),
        ("environment: {'A B': x}\n", ["A B"]),
        ("gpus_per_node: 8\nranks_per_node: 4\n", ["ranks_per_node = 4", "one rank a GPU"]),
        ("partition: 'a b'\n", ["partition = 'a b'"]),
        ("gpu_type: 'a100;x'\n", ["gpu_type"]),
        ("memory: lots\n", ["memory = 'lots'", "500G"]),
        ("time: 24:00\n", ["time"]),
        ("network_interface: 'ib0 x'\n", ["network_interface"]),
        ("gpu_per_node: 8\n", ["gpu_per_node", "did you mean 'gpus_per_node'?"]),
        ("- a\n", ["a cluster file is a mapping"]),
        ("", ["a cluster file is a mapping"]),
    ],
)
def test_mistakes_in_cluster_files(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)
    one_line(lambda: read_cluster(str(tmp_path / "site.yaml")), *parts)


def test_shipped_clusters_are_valid() -> None:
    assert shipped_clusters() == ["a100"]
    assert read_cluster("a100") == SlurmCluster()  # the file says what the defaults are
    one_line(lambda: read_cluster("b200"), "b200", "a100")
    one_line(lambda: read_cluster("/none.yaml"), "/none.yaml", "cannot be read")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"time": "24:00"}, ["time = '24:00'", "24 minutes"]),
        ({"time": "0:05:00"}, ["time = '0:05:00'", "330 s"]),
        ({"gpus_per_node": 9}, ["--gpus-per-node 9", "have 4"]),
        ({"dependency": "afterok:x"}, ["dependency", "afterok:JOB_ID"]),
        ({"run_dir": Path("a%j")}, ["Slurm's log path cannot hold %"]),
        ({"run_dir": Path("a\\n")}, ["Slurm's log path cannot hold \\"]),
        ({"recipe": "digits-basline"}, ["did you mean 'digits-baseline'?"]),
        ({"overrides": ("train.epoch=3",)}, ["train.epoch"]),
        ({"nodes": 3}, ["32", "12"]),  # the batch does not divide
        ({"template": "extract", "recipe": "pixels"}, ["codes or images"]),
        ({"template": "extract", "recipe": "codes"}, ["--out"]),
        ({"template": "extract", "recipe": "codes", "overrides": ("a=b",)}, ["--set", "extract"]),
        ({"template": "smoke", "chain": 2}, ["--chain", "smoke"]),
        ({"at_once": 2}, ["--at-once", "train"]),
        ({"arguments": ("--fresh",)}, ["--fresh", "takes one recipe"]),
        ({"template": "sample_evaluate", "recipe": "runs/x", "nodes": 2}, ["--nodes", "--num"]),
        (
            {"template": "sample_evaluate", "recipe": "x", "nodes": 1, "reference": Path("r.npz")},
            ["--reference", "--num"],
        ),
        (
            {"template": "sample_evaluate", "recipe": "x", "reference": Path("r"), "arguments": ("--num", "5")},
            ["--inception"],
        ),
        (
            {
                "template": "sample_evaluate",
                "recipe": "x",
                "reference": Path("r"),
                "inception": Path("i"),
                "arguments": ("--num=5",),
            },
            ["--out"],
        ),
        ({"template": "sample_evaluate", "recipe": "x", "time": "0:05:00", "arguments": ("--num", "5")}, ["330 s"]),
        ({"reference": Path("r.npz")}, ["--reference", "train"]),
        ({"template": "array", "recipe": "/none.txt"}, ["/none.txt"]),
    ],
)
def test_mistakes_before_anything_is_submitted(options: dict[str, Any], parts: list[str]) -> None:
    one_line(lambda: script_of(**options), *parts)


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("digits-baseline\ndigits-baseline\n", [":2: the run folder of line 1"]),
        ("digits-baseline 'x\n", [":1:", "quotation"]),
        ("\ndigits-baseline --fresh\n", [":2: --fresh", "--set"]),
        ("digits-baseline --set\n", [":1: --set"]),
        ("# nothing\n", ["no recipe in it"]),
        ("\ndigits-baseline --set train.epochs=0\n", [":2: digits-baseline: train.epochs"]),
    ],
)
def test_mistakes_in_lists(lines: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(lines)
    one_line(lambda: script_of(template="array", recipe=str(tmp_path / "list.txt")), *parts)


@pytest.mark.parametrize(("text", "value"), [("0:02:00", 120), ("24:00:00", 86400), ("1-12:30:05", 131405)])
def test_seconds(text: str, value: int) -> None:
    assert seconds(text) == value


def test_a_finished_run_is_not_submitted(tmp_path: Path) -> None:
    (tmp_path / "outcome").write_text("finished at step 9\n")
    one_line(lambda: script_of(run_dir=tmp_path), "this run is finished", "outcome")
    (tmp_path / "outcome").write_text("requeue SIGTERM\n")
    assert f"--run-dir {tmp_path})" in script_of(run_dir=tmp_path)


def test_a_job_needs_no_world_of_its_own() -> None:
    assert SlurmJob(nodes=4, ranks_per_node=8).world_size == 32
