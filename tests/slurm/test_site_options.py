"""What a cluster file hands on to sbatch, srun and a container: as it was given, nothing that the tool itself sets."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

from mirai_ds.cli.main import main
from mirai_ds.submit import SlurmCluster, SubmitOptions, plan, read_cluster, render
from mirai_ds.submit.container import Container, srun_options
from mirai_ds.submit.passthrough import SBATCH_OWNED, SRUN_OWNED, directive
from tests.one_line import one_line
from tests.slurm.conftest import CLUSTER
from tests.slurm.stubs import FakeSlurm
from tests.slurm.test_render import LINES, NASTY, assert_is_bash, directives, script_of

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cluster_of(tmp_path: Path, more: str) -> SlurmCluster:
    path = tmp_path / "site.yaml"
    path.write_text(CLUSTER.format(ranks=1, signal_seconds=20) + more, encoding="utf-8")
    return read_cluster(str(path))


def as_sbatch(line: str) -> list[str]:
    """Words of a #SBATCH line as sbatch 22.05 reads them: in double quotes a backslash keeps what follows it, and # is
    no comment there (`test_cluster.py` asks the real one)."""
    words = shlex.shlex(line, posix=True, punctuation_chars=False)
    words.whitespace_split, words.commenters = True, "#"
    return list(words)


def test_options_reach_sbatch_and_srun(tmp_path: Path) -> None:
    more = (
        "sbatch: {reservation: maint, mail-type: 'END,FAIL', comment: 'a b #c', nice: 100, hold: true, "
        "licenses: 'x:2'}\n"
        "srun: [--cpu-bind=none, '--network=a b']\npython: python\n"
    )
    text = script_of(cluster_of(tmp_path, more), run_dir=tmp_path / "run")
    assert directives(text)[6:12] == [
        "--reservation=maint", "--mail-type=END,FAIL", '--comment="a b #c"', "--nice=100", "--hold", "--licenses=x:2",
    ]  # fmt: skip
    slurm = FakeSlurm(tmp_path / "stub")
    slurm.set('echo "finished at step 9" >"$MIRAI_DS_OUTCOME"')
    ran = slurm.run(text)
    assert ran.ranks[0][:4] == ["--kill-on-bad-exit=1", "--cpu-bind=none", "--network=a b", "python"]


@pytest.mark.parametrize(("field", "count"), [(True, 1), (False, 1)])
def test_exclusive_is_asked_for_once(field: bool, count: int) -> None:
    cluster = SlurmCluster(gpus_per_node=4, exclusive=field, sbatch={"exclusive": True}, python=["python"])
    assert directives(script_of(cluster)).count("--exclusive") == count
    user = SlurmCluster(gpus_per_node=4, exclusive=field, sbatch={"exclusive": "user"}, python=["python"])
    assert [line for line in directives(script_of(user)) if "exclusive" in line] == ["--exclusive=user"]


def test_one_line_asks_for_gpus_and_other_resources() -> None:
    """Of two --gres lines Slurm takes the last."""
    cluster = SlurmCluster(gpus_per_node=4, gpu_request="gres", sbatch={"gres": "nvme:1"}, python=["python"])
    assert [line for line in directives(script_of(cluster)) if "gres" in line] == ["--gres=gpu:4,nvme:1"]
    cluster = SlurmCluster(gpus_per_node=4, gpu_request="gres", sbatch={"gres": "x --nodes=9"}, python=["python"])
    assert '--gres="gpu:4,x --nodes=9"' in directives(script_of(cluster))
    cluster = SlurmCluster(gpus_per_node=4, sbatch={"gres": "nvme:1", "time-min": "1:00:00"}, python=["python"])
    found = directives(script_of(cluster))
    assert {"--gpus-per-node=4", "--gres=nvme:1", "--time-min=1:00:00"} < set(found)


@pytest.mark.parametrize(
    ("image", "written"),
    [
        ("docker://me/mirai:1", "me/mirai:1"),
        ("docker://registry.site.org/me/mirai:1", "registry.site.org#me/mirai:1"),
        ("docker://localhost:5000/mirai", "localhost:5000#mirai"),
        ("docker://ubuntu", "ubuntu"),
        ("/shared/mirai.sqsh", "/shared/mirai.sqsh"),
    ],
)
def test_images_as_pyxis_writes_them(image: str, written: str) -> None:
    options = srun_options(Container(image, "pyxis"), ["/a:/a", "/b:/c"], "/here")
    assert options == [
        f"--container-image={written}", "--container-mounts=/a:/a,/b:/c", "--container-workdir=/here",
    ]  # fmt: skip


@pytest.mark.parametrize("value", NASTY)
def test_a_value_is_one_word_to_sbatch(value: str) -> None:
    plain, text = directives(script_of()), script_of(
        SlurmCluster(gpus_per_node=4, python=["python"], sbatch={"comment": value})
    )  # fmt: skip
    assert_is_bash(text)
    added = [line for line in directives(text) if line not in plain]
    assert [as_sbatch(line) for line in added] == [[f"--comment={value}"]]


@QUICK
@given(value=LINES)
def test_any_line_is_one_word_to_sbatch(value: str) -> None:
    assert as_sbatch(directive("comment", value)) == [f"--comment={value}"]


@pytest.mark.parametrize("name", sorted(SBATCH_OWNED))
def test_what_the_tool_sets_is_refused(name: str) -> None:
    one_line(lambda: read(f"sbatch: {{{name}: x}}"), f"sbatch.{name} = 'x'", SBATCH_OWNED[name])


@pytest.mark.parametrize("name", sorted(SRUN_OWNED))
def test_what_the_tool_tells_srun_is_refused(name: str) -> None:
    one_line(lambda: read(f"srun: ['--{name}=x']"), "srun[0]", SRUN_OWNED[name])


def read(text: str) -> SlurmCluster:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.yaml"
        path.write_text(f"gpus_per_node: 4\n{text}\n", encoding="utf-8")
        return read_cluster(str(path))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sbatch: {--comment: x}", ["sbatch.--comment", "without --"]),
        ("sbatch: {C: x}", ["sbatch.C", "no long option"]),
        ("sbatch: {part: x}", ["sbatch.part", "use partition (--part would be --partition)"]),
        ("srun: [--nod=3]", ["srun[0]", "--nod would be --nodes"]),
        ("sbatch: {hold: false}", ["sbatch.hold", "remove it"]),
        ("sbatch: {gres: 'gpu:8'}", ["sbatch.gres", "gpus_per_node"]),
        ("sbatch: {gres: 'nvme:1,gpu:a100:8'}", ["sbatch.gres", "gpus_per_node"]),
        ('sbatch: {comment: "x\\n#SBATCH --nodes=9"}', ["sbatch.comment", "U+000A"]),
        ("srun: [-n4]", ["srun[0]", "--NAME=VALUE"]),
        ("srun: [--cpu-bind, none]", ["srun[1]", "--NAME=VALUE"]),
        ('srun: ["--network=x\\ny"]', ["U+000A"]),
        ("python: 'apptainer \"x'", ["python", "quotation"]),
        ("python: ''", ["python", "holds no word"]),
        ("container_runtime: docker", ["container_runtime", "apptainer"]),
    ],
)
def test_mistakes(text: str, parts: list[str]) -> None:
    one_line(lambda: read(text), *parts)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("apptainer exec --nv 'my image.sif' python3", ["apptainer", "exec", "--nv", "my image.sif", "python3"]),
        ('["/my python/bin/python"]', ["/my python/bin/python"]),
        ("/opt/of/the/site/python3", ["/opt/of/the/site/python3"]),
    ],
)
def test_python_may_be_several_words(given: str, words: list[str], tmp_path: Path) -> None:
    text = script_of(cluster_of(tmp_path, f"python: {given}\n"), run_dir=tmp_path / "run")
    slurm = FakeSlurm(tmp_path / "stub")
    slurm.set('echo "finished at step 9" >"$MIRAI_DS_OUTCOME"')
    assert slurm.run(text).ranks[0][1 : len(words) + 4] == [*words, "-m", "mirai_ds", "train"]
    assert ("export PATH=" in text) == (len(words) == 1)


def test_setup_is_done_in_every_rank_s_shell(tmp_path: Path) -> None:
    """Twice: in the job's script and, by srun's stand-in, in a shell of the rank's own that becomes the rank."""
    log = tmp_path / "log"
    rank = tmp_path / "my python"
    rank.write_text(f'#!/bin/bash\necho "rank $SITE $MADE $$" >>{log}\necho finished >"$MIRAI_DS_OUTCOME"\n')
    rank.chmod(0o755)
    more = (
        f"setup: ['export MADE=\"it is\"', 'echo \"setup $$\" >>{log}']\n"
        f"environment: {{SITE: \"a b;'c\"}}\npython: ['{rank}']\n"
    )
    slurm = FakeSlurm(tmp_path / "stub")
    slurm.set('while [[ $1 == --* ]]; do shift; done; exec env -u MADE -u SITE "$@"')  # another node, another shell
    assert slurm.run(script_of(cluster_of(tmp_path, more), run_dir=tmp_path / "run")).code == 0
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["setup", "setup", "rank"]
    assert lines[2] == f"rank a b;'c it is {lines[1].split()[1]}"  # the same process: signals reach the rank


def submitted(template: str, tmp_path: Path, *more: str) -> str:
    """The script of a template in a container, through the command line."""
    (tmp_path / "list.txt").write_text(f"digits-baseline --run-dir {tmp_path}/runs/a\n")
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "image.sif").touch()
    words = {
        "array": [str(tmp_path / "list.txt")],
        "extract": ["codes", "--", "--images", str(tmp_path / "store"), "--out", str(tmp_path / "out/codes")],
        "sample_evaluate": [str(tmp_path / "runs/x"), "--", "--num", "50", "--out", "a.npz"],
        "smoke": ["digits-mirai-e"],
        "train": ["digits-mirai-e"],
    }[template]
    own = [] if template == "array" else ["--run-dir", str(tmp_path / "runs" / template)]
    done = CliRunner().invoke(
        main, ["submit", "--template", template, "--dry-run", "--no-check", *own, *more, *words], catch_exceptions=False
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("template", ["train", "smoke", "extract", "sample_evaluate", "array"])
def test_every_template_in_a_container(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    image = tmp_path / "image.sif"
    text = submitted(template, tmp_path, "--container", str(image))
    assert_is_bash(text)
    line = next(line for line in text.splitlines() if "command=(" in line)
    words = shlex.split(line.partition("command=(")[2].partition(")")[0])
    assert words[:3] == ["apptainer", "exec", "--nv"]
    end = words.index("--pwd")
    assert words[end : end + 6] == ["--pwd", str(tmp_path / "work"), str(image), "python3", "-m", "mirai_ds"]
    binds = words[3:end][1::2]
    assert words[3:end][::2] == ["--bind"] * len(binds)
    assert {f"{tmp_path}/work:{tmp_path}/work", f"{tmp_path}:{tmp_path}"} <= set(binds)  # runs/ is not there yet
    assert (f"{tmp_path}/store:{tmp_path}/store" in binds) == (template == "extract")
    if template == "smoke":
        assert f"{image} python3 -m mirai_ds compare" in text
    text = submitted(template, tmp_path, "--container", "docker://me/mirai:1", "--container-runtime", "pyxis")
    line = next(line for line in text.splitlines() if line.startswith("srun_options="))
    options = shlex.split(line.removeprefix("srun_options=(").removesuffix(")"))
    assert options == [
        "--container-image=me/mirai:1", f"--container-mounts={','.join(binds)}", f"--container-workdir={tmp_path}/work",
    ]  # fmt: skip
    assert "command=(python3 -m mirai_ds" in text
    assert "on_node=()" in text


def test_a_cluster_file_s_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = (
        "container: docker://a/b\nmounts: [/scratch, '/x:/y']\nsetup: ['module load apptainer']\n"
        "python: /opt/bin/python\n"
    )
    cluster = cluster_of(tmp_path, more)
    text = script_of(cluster, run_dir=tmp_path / "run")
    here = str(tmp_path)
    checkout = str(Path(__file__).resolve().parents[2])
    binds = [f"{here}:{here}", f"{checkout}:{checkout}", "/scratch:/scratch", "/x:/y"]
    wanted = ["apptainer", "exec", *[word for bind in binds for word in ("--bind", bind)], "--pwd", here, "docker://a/b",
              "/opt/bin/python", "-m", "mirai_ds"]  # fmt: skip
    assert f"command=({shlex.join(wanted)} train" in text  # no GPU: no --nv
    assert "on_node=(bash -c 'module load apptainer\nexec \"$@\"' rank)" in text
    missing = SubmitOptions("digits-baseline", cluster=str(tmp_path / "site.yaml"), container="x.sif")
    one_line(lambda: plan(missing, cluster), "x.sif", "no such file")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"container_runtime": "pyxis"}, ["--container-runtime pyxis", "no --container"]),
        ({"container": "a.sif", "container_runtime": "pyxis"}, ["a.sif", ".sqsh"]),
        ({"container": "a.sqsh"}, ["a.sqsh", "pyxis"]),
        ({"container": "--nv"}, ["is no image"]),
        ({"container": "docker://x", "run_dir": Path("/tmp/a,b/c:d")}, ["/tmp", "mounts"]),
    ],
)
def test_mistakes_with_containers(options: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    if "run_dir" in options:
        options["run_dir"] = tmp_path / "a,b"
        options["run_dir"].mkdir()
        parts = [f"{tmp_path}/a,b"]
    one_line(lambda: script_of(**options), *parts)


def test_render_takes_what_plan_gives(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "")
    job = plan(SubmitOptions("digits-baseline", cluster="x", run_dir=tmp_path / "run"), cluster)
    assert "srun_options=()\non_node=()\n" in render(job, cluster, tmp_path / "x.sbatch")
    assert os.path.isabs(job.launcher[0])
