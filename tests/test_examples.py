"""The examples for clusters fan a small study out, each in its own way, and leave the same store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from armada_lib import experiment
from armada_lib.results import RunStore

pytestmark = pytest.mark.slow

CODE = Path(__file__).resolve().parents[1]
SMALL = {
    "name": "small", "profile": "smoke",
    "training": {"precision": "fp32", "train_size": 16, "eval_size": 8, "epochs": 1},
    "tasks": {"cola": {"seeds": [100, 101]}},
    "stages": [{
        "name": "primary", "tasks": ["cola"],
        "arms": [{"methods": ["armada", "shuffled"], "teacher": "text"}],
    }],
}  # fmt: skip


@pytest.fixture
def study(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def environment(**more: str) -> dict[str, str]:
    """Child processes use the Python of the tests, and this project."""
    here = str(Path(sys.executable).parent)
    path = f"{here}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1"} | more


def complete(study: Path, store: Path) -> bool:
    return all(RunStore(store).load(j.spec.key) for j in experiment.jobs(experiment.load(study)))


def test_a_slurm_array_runs_every_cell(study, tmp_path):
    store = tmp_path / "s"
    (store / "runs").mkdir(parents=True)
    first = experiment.jobs(experiment.load(study))[0].spec.key
    # this cell cannot be stored: the others are run all the same
    (store / "runs" / first).write_text("in the way")
    for task in ("0", "1"):
        env = environment(SLURM_ARRAY_TASK_ID=task, STUDY=str(study), STORE=str(store),
                          CELLS_PER_TASK="3")  # fmt: skip
        done = subprocess.run(
            ["bash", str(CODE / "examples/slurm/study.sbatch")], env=env, cwd=CODE, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == (1 if task == "0" else 0), done.stderr[-2000:]
        assert done.stdout.count(": stored") == (2 if task == "0" else 1)
    assert not complete(study, store)
    (store / "runs" / first).unlink()
    env = environment(
        SLURM_ARRAY_TASK_ID="0", STUDY=str(study), STORE=str(store), CELLS_PER_TASK="1"
    )
    subprocess.run(
        ["bash", str(CODE / "examples/slurm/study.sbatch")], env=env, cwd=CODE, check=True
    )
    assert complete(study, store)


def test_snakemake_runs_every_cell_and_nothing_twice(study, tmp_path):
    if (snakemake := shutil.which("snakemake")) is None:
        pytest.skip("snakemake is not installed; it is no dependency of this project")
    store = tmp_path / "s"
    command = [snakemake, "--snakefile", str(CODE / "examples/Snakefile"), "--cores", "2", "--keep-going",
               "--directory", str(tmp_path), "--config", f"python={sys.executable}",
               f"store={store}", f"study={study}"]  # fmt: skip
    go = lambda: subprocess.run(
        command, env=environment(), text=True, capture_output=True, check=False
    )
    done = go()
    assert done.returncode == 0, done.stderr[-3000:]
    assert complete(study, store)
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    again = go()
    assert again.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before
