"""A study: what its file says, in which order it runs, and that workers share it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from armada_lib import __main__ as cli
from armada_lib import evaluation, experiment, profiles, results, runs, teachers, working
from armada_lib.results import RunStore
from armada_lib.state import Diverged

CODE = Path(__file__).resolve().parents[1]
TINY = {
    "name": "small", "profile": "tiny", "training": {"train_size": 16, "eval_size": 10, "epochs": 1},
    "tasks": {"cola": {"seeds": [100, 101], "bound": 3.0}, "copa": {"seeds": [100]}},
    "stages": [{
        "name": "primary", "tasks": ["cola", "copa"],
        "arms": [{"methods": ["undistilled"]}, {"methods": ["armada", "shuffled"], "teacher": "sd14"}],
    }],
}  # fmt: skip


def write(folder: Path, **changes) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


@pytest.fixture
def own(project, tmp_path) -> Path:
    return write(tmp_path)


# ---------------------------------------------------------------------------- the committed study


def committed() -> experiment.Study:
    return experiment.load(CODE / "params/study.yaml")


def test_the_committed_study_has_the_cells_that_the_protocol_names():
    study, text = committed(), (CODE / "book/protocol.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]+)\]\{\.name\}", r"\1", text)
    found = experiment.cells(study)
    names = [s.name for s in study.stages]
    assert re.findall(r"^\d\. \*\*([a-z-]+)\*\*:", text, flags=re.M) == names
    # 10, 10 and 5 seeds of: undistilled, and two teachers with three losses each
    primary = [c for c in found if c.stage == "primary"]
    assert len(primary) == 25 * 7 and {c.teacher for c in primary} == {"sd14", None}
    assert {t: sum(c.task == t for c in primary) for t in ("stsb", "cola", "mrpc")} == {
        "stsb": 70, "cola": 70, "mrpc": 35}  # fmt: skip
    assert all(min(t.seeds) >= 100 for t in study.tasks.values())
    rows = dict(re.findall(r"^\| (STS-B|CoLA|MRPC) \| [\d.]+ \| ([\d.]+) \|", text, flags=re.M))
    bounds = {"STS-B": "stsb", "CoLA": "cola", "MRPC": "mrpc"}
    assert {k: study.tasks[v].bound for k, v in bounds.items()} == {
        k: float(v) for k, v in rows.items()
    }


def test_the_profile_still_has_the_settings_that_the_protocol_names():
    p = profiles.load(committed().profile)
    assert (p.armada["paper"].beta, p.armada["released"].beta) == (0.1, 1.0)
    assert {(w.alpha, w.gamma, w.tau) for w in p.armada.values()} == {(0.5, 1.0, 5.0)}
    sizes = {"cola": (2048, 3), "stsb": (1536, 2), "mrpc": (1536, 2), "rte": (1024, 2),
             "wic": (1536, 1), "cb": (None, 4), "copa": (None, 3)}  # fmt: skip
    for task, expected in sizes.items():
        group = "super_glue" if task in ("wic", "cb", "copa") else "glue"
        t = p.recipe(group, task, p.nlu.student)
        assert (t.train_size, t.epochs) == expected and t.student_lr == 1e-4, task
        assert t.aligner_lr == (1e-3 if group == "super_glue" else 3e-3), task
    assert committed().training == {"precision": "bf16"}


def test_every_beginning_of_a_stage_is_balanced():
    study = committed()
    for stage in study.stages:
        found = [c for c in experiment.cells(study) if c.stage == stage.name]
        met: dict[str, list[int]] = {t: [] for t in stage.tasks}
        for c in found:
            if c.seed not in met[c.task]:
                met[c.task].append(c.seed)
            for (
                task,
                seeds,
            ) in met.items():  # no task is a whole seed ahead of another that has more
                assert len(met[c.task]) - len(seeds) <= 1 or len(seeds) == len(
                    study.tasks[task].seeds
                )
        assert all(met[t] == study.tasks[t].seeds for t in stage.tasks)


def test_one_entry_adds_a_teacher_and_leaves_the_rest_as_it_is(own, tmp_path):
    raw = yaml.safe_load((profiles.ROOT / "params/profiles/tiny.yaml").read_text())
    raw["teachers"]["other"] = raw["teachers"]["sd14"] | {"steps": 3}
    (profiles.ROOT / "params/profiles/two.yaml").write_text(yaml.safe_dump(raw))
    arm = {"methods": ["armada", "constant"], "teacher": "other", "manifolds": ["cosine"]}
    stage = {"name": "more", "tasks": ["cola"], "arms": [arm]}
    before = experiment.jobs(experiment.load(write(tmp_path, profile="two")))
    path = write(tmp_path, profile="two", stages=[*TINY["stages"], stage])
    after = experiment.jobs(experiment.load(path))
    assert [j.spec.key for j in after[: len(before)]] == [j.spec.key for j in before]
    new = after[len(before) :]
    assert [(j.spec.method, j.spec.teacher, j.spec.manifold, j.spec.seed) for j in new] == [
        (m, "other", "cosine", s) for s in (100, 101) for m in ("armada", "constant")]  # fmt: skip


def test_a_cell_says_no_more_than_its_run_uses(own):
    for j in experiment.jobs(experiment.load(own)):
        s = j.spec
        assert j.cell.identity == (s.task, s.method, s.teacher, s.manifold, s.reading, s.seed)
        assert s.training.train_size == 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"profile": "tinny"}, "unknown profile 'tinny'; did you mean 'tiny'?"),
        ({"stages": []}, "stages: "),
        ({"stages": TINY["stages"] * 2}, "each stage needs a name of its own"),
        ({"stages": [TINY["stages"][0] | {"tasks": ["rte"]}]}, "'rte'"),
        ({"tasks": TINY["tasks"] | {"colla": {"seeds": [1]}}}, "unknown task of a study 'colla'"),
        ({"tasks": TINY["tasks"] | {"mmimdb": {"seeds": [1]}}}, "unknown task of a study 'mmimdb'"),
        ({"tasks": {"cola": {"seeds": []}, "copa": {"seeds": [1]}}}, "tasks.cola.seeds"),
        ({"seeds": [1]}, "seeds: Extra inputs"),
        ({"stages": [TINY["stages"][0] | {"arms": [{"methods": ["armda"]}]}]}, "method 'armda'"),
        ({"stages": [TINY["stages"][0] | {"arms": [{"methods": ["armada"], "teacher": "sd41"}]}]},
         "'sd41'; did you mean 'sd14'?"),
        ({"stages": [TINY["stages"][0] | {"arms": [{"methods": ["armada"], "manifolds": ["cos"]}]}]},
         "manifolds"),
        ({"stages": [TINY["stages"][0] | {"arms": [{"methods": ["kd"]}]}]},
         "unknown method 'kd'. Valid: armada, constant, "),
        ({"stages": [TINY["stages"][0] | {"arms": [{"methods": ["undistilled", "armada", "random"]}]}]},
         "stage 'primary' holds the primary contrasts: it needs the methods armada and shuffled"),
        ({"stages": [TINY["stages"][0] | {"arms": [{"methods": ["armada"]},
                                                   {"methods": ["shuffled"], "readings": ["released"]}]}]},
         "with the same teacher, manifold loss and reading"),
        ({"stages": [TINY["stages"][0] | {"tasks": ["cola", "copa", "cola"]}]},
         "task of stage 'primary' 'cola' is given twice"),
        ({"tasks": TINY["tasks"] | {"cola": {"seeds": [100, 101, 100]}}}, "seed of cola 100 is given twice"),
        ({"training": {"seed": 3}}, "unknown training setting 'seed'"),
        ({"tasks": TINY["tasks"] | {"cola": {"seeds": [1], "training": {"teacher": "text"}}}},
         "unknown training setting 'teacher'"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_before_any_work(project, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(runs, "run", lambda *a, **k: pytest.fail("a run was begun"))
    path = write(tmp_path, **change)
    with pytest.raises(SystemExit) as e:
        cli.main(["study", str(path), "--store", str(tmp_path / "s")])
    assert message in str(e.value.code) and "\n" not in str(e.value.code)


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("stages: [a, {b")
    with pytest.raises(ValueError, match=r"small\.yaml: this is no YAML"):
        experiment.load(path)


def test_a_method_without_a_teacher_has_no_manifold_loss(own):
    arms = [{"methods": ["layers_only", "armada", "shuffled"], "manifolds": ["cosine"]}]
    study = experiment.Study(**TINY | {"stages": [TINY["stages"][0] | {"arms": arms}]})
    found = {c.method: (c.manifold, c.teacher, c.reading) for c in experiment.cells(study)}
    assert found["layers_only"] == (None, None, "paper")
    assert found["armada"] == ("cosine", "sd14", "paper")


# ---------------------------------------------------------------------------- again


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_cells_computed_again_give_the_stored_metrics(tmp_path, capsys, precision):
    arms = [{"methods": ["undistilled", "armada", "shuffled"], "teacher": "text"}]
    training = {"precision": precision, "train_size": 16, "eval_size": 12}
    small = {"name": "small", "profile": "smoke", "training": training,
             "tasks": {"stsb": {"seeds": [100]}},
             "stages": [{"name": "primary", "tasks": ["stsb"], "arms": arms}]}  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(small))
    run(path, tmp_path / "s")
    jobs = experiment.jobs(experiment.load(path))
    assert len(jobs) == 3
    for job in jobs:
        table, same = working.repeat(job, experiment.load(path), RunStore(tmp_path / "s"))
        assert same and len(table) == (1 if job.spec.method == "undistilled" else 4)
        assert table["stored"].nunique() == len(table)  # Pearson's: a number of many digits
        if precision == "fp32":
            assert table["stored"].tolist() == table["again"].tolist()


def test_the_page_states_the_tolerance_of_bf16():
    text = (CODE / "book" / "11_study.ipynb").read_text(encoding="utf-8")
    assert working.TOLERANCE["bf16"] == 0.5 and "in bf16 to half a point" in text


def test_a_cell_that_comes_out_otherwise_is_told(own, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="neither in .* nor in book/results/small.jsonl"):
        run(own, tmp_path / "s", "--repeat", "1")
    run(own, tmp_path / "s", "--cell", "1")
    run(own, tmp_path / "s", "--repeat", "1")
    assert "student_aux" in capsys.readouterr().out
    monkeypatch.setitem(working.TOLERANCE, "fp32", -1.0)
    with pytest.raises(SystemExit, match="further apart than the tolerance of fp32"):
        run(own, tmp_path / "s", "--repeat", "1")


# ---------------------------------------------------------------------------- running


def run(path: Path, store: Path, *options: str) -> None:
    cli.main(["study", str(path), "--store", str(store), *options])


def test_the_command_runs_what_is_missing_and_shows_no_score(own, tmp_path, capsys):
    run(own, tmp_path / "s", "--cell", "1")
    assert "cola armada euclid paper seed 100 sd14: stored" in capsys.readouterr().out
    run(own, tmp_path / "s", "--list")
    rows = [x.split("\t") for x in capsys.readouterr().out.splitlines()]
    assert [r[0] for r in rows] == [str(i) for i in range(9)]
    assert [r[2] for r in rows] == ["missing", "stored"] + ["missing"] * 7
    run(own, tmp_path / "s")
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith("9 cells, 1 stored, ") and "min left with 1 worker" in lines[0]
    assert lines[-1] == "8 computed, 0 diverged, 0 elsewhere"
    assert [re.match(r" *(\d) of 9 \|", x).group(1) for x in lines[1:-1]] == list("23456789")
    assert "left" not in lines[-2]
    scores = [r.scores["student"] for k in rows if (r := RunStore(tmp_path / "s").load(k[1]))]
    assert len(scores) == 9 and not any(f"{s:.1f}" in said for s in scores if s)
    monkey = RunStore(tmp_path / "s").runs
    before = {p: p.stat().st_mtime_ns for p in monkey.rglob("*")}
    run(own, tmp_path / "s", "--cell", rows[3][1])  # by key, stored: left alone
    run(own, tmp_path / "s")
    assert "0 computed, 0 diverged, 0 elsewhere" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in monkey.rglob("*")} == before


def test_what_is_committed_is_left_alone_unless_all_is_asked_for(own, tmp_path, project, capsys):
    run(own, tmp_path / "a", "--cell", "0")
    run(own, tmp_path / "a", "--cell", "2")
    run(own, tmp_path / "a", "--export")
    try:
        capsys.readouterr()
        run(own, tmp_path / "b", "--list")
        states = [x.split("\t")[2] for x in capsys.readouterr().out.splitlines()]
        assert states == ["committed", "missing", "committed"] + ["missing"] * 6
        run(own, tmp_path / "b", "--cell", "0")
        assert "committed, left alone without --all" in capsys.readouterr().out
        run(own, tmp_path / "b")
        said = capsys.readouterr().out
        assert said.startswith(
            "2 cells committed in book/results; --all computes them, too\n7 cells, 0 st"
        )
        assert "7 computed" in said
        run(own, tmp_path / "b", "--all")
        assert "2 computed" in capsys.readouterr().out
        run(own, tmp_path / "b", "--list")  # what is stored as well is called so
        states = [x.split("\t")[2] for x in capsys.readouterr().out.splitlines()]
        assert set(states) == {"stored"}
    finally:
        for path in (project / "book/results").glob("small*"):
            path.unlink()


def test_a_study_goes_on_on_another_kind_of_machine(own, tmp_path, project, capsys, monkeypatch):
    """There the same teacher has another fingerprint, as its precision is another one."""
    run(own, tmp_path / "a", "--cell", "0")
    run(own, tmp_path / "a", "--cell", "2")
    run(own, tmp_path / "a", "--export")
    evidence = project / "book/results/small.jsonl"
    try:
        before = {r["key"] for r in results.read(evidence)}
        key = experiment.jobs(experiment.load(own))[2].spec.key
        fingerprint = teachers.fingerprint
        monkeypatch.setattr(teachers, "fingerprint", lambda *a: f"other_{fingerprint(*a)}")
        assert experiment.jobs(experiment.load(own))[2].spec.key != key
        capsys.readouterr()
        run(own, tmp_path / "b", "--list")
        states = [x.split("\t")[2] for x in capsys.readouterr().out.splitlines()]
        assert states == ["committed", "missing", "committed"] + ["missing"] * 6
        run(own, tmp_path / "b", "--cell", "2", "--all")  # computed again: replaced, not doubled
        run(own, tmp_path / "b", "--export")
        after = {r["key"] for r in results.read(evidence)}
        assert len(after) == len(before) == 2 and len(after - before) == 1
    finally:
        for path in (project / "book/results").glob("small*"):
            path.unlink()


def test_kinds_of_machines_on_one_store_share_cells_and_export_them_all(
    own, tmp_path, project, capsys, monkeypatch
):
    """A teacher has another fingerprint on each kind, and its cells have other keys."""
    store, study = RunStore(tmp_path / "s"), experiment.load(own)
    run(own, store.root, "--cell", "1")
    (first,) = [j.spec.key for j in experiment.jobs(study)[1:2]]
    fingerprint = teachers.fingerprint
    monkeypatch.setattr(teachers, "fingerprint", lambda *a: f"other_{fingerprint(*a)}")
    jobs = experiment.jobs(study)[:4]
    one, two = jobs[1].spec, jobs[2].spec
    assert one.key != first == experiment.stored(one, store) and one not in store
    with monkeypatch.context() as stored_already:
        stored_already.setattr(runs, "run", lambda *a, **k: pytest.fail("it is stored already"))
        run(own, store.root, "--cell", "1")
    with store.lock(f"cell-{experiment.anywhere(two)}"):  # a worker's of the first kind
        count = working.work(jobs, store, 1, lambda said: None)
    assert count == {"computed": 2, "diverged": 0, "elsewhere": 1}
    assert [bool(experiment.stored(j.spec, store)) for j in jobs] == [True, True, False, True]
    capsys.readouterr()
    run(own, store.root, "--list")
    states = [x.split("\t")[2] for x in capsys.readouterr().out.splitlines()]
    assert states == ["stored", "stored", "missing"] + ["stored"] + ["missing"] * 5
    _, n = experiment.export(study, store, tmp_path / "results")
    assert n == 3 and len(results.read(tmp_path / "results/small.jsonl")) == 3
    shutil.rmtree(store.runs / first)  # what was noted of it does not count
    assert experiment.stored(one, store) is None


def test_cells_of_another_profile_are_not_added(own, tmp_path):
    run(own, tmp_path / "s", "--cell", "0")
    study = experiment.load(own)
    path, _ = experiment.export(study, RunStore(tmp_path / "s"), tmp_path / "results")
    before = path.read_text()
    with pytest.raises(
        ValueError, match="holds cells of profile 'tiny': give a study of profile 'smoke'"
    ):
        other = study.model_copy(update={"profile": "smoke"})
        experiment.export(other, RunStore(tmp_path / "s"), tmp_path / "results")
    assert path.read_text() == before


@pytest.mark.parametrize("cell, message", [("9", "has cells 0 to 8"), ("beef", "neither a number")])
def test_a_cell_that_is_not_there_is_named(own, tmp_path, cell, message):
    with pytest.raises(SystemExit, match=message):
        run(own, tmp_path / "s", "--cell", cell)


def test_a_locked_cell_is_left_to_its_worker(own, tmp_path):
    store, jobs = RunStore(tmp_path / "s"), experiment.jobs(experiment.load(own))[:4]
    store.check()
    said: list[str] = []
    with store.lock(jobs[0].spec.key):  # another worker's
        count = working.work(jobs, store, 1, said.append)
        assert count == {"computed": 3, "diverged": 0, "elsewhere": 1}
        assert jobs[0].spec not in store and all(j.spec in store for j in jobs[1:])
    count = working.work(jobs, store, 1, said.append)  # it died: the lock is free again
    assert count == {"computed": 1, "diverged": 0, "elsewhere": 0} and jobs[0].spec in store


def test_a_cell_that_diverges_does_not_stop_the_others(own, tmp_path, monkeypatch):
    store, jobs = RunStore(tmp_path / "s"), experiment.jobs(experiment.load(own))[:3]
    real = runs.run

    def sometimes(s, *a, **k):
        if s.key == jobs[1].spec.key:
            raise Diverged("the loss is not finite")
        return real(s, *a, **k)

    monkeypatch.setattr(runs, "run", sometimes)
    said: list[str] = []
    count = working.work(jobs, store, 1, said.append)
    assert count == {"computed": 2, "diverged": 1, "elsewhere": 0}
    assert any("cola armada" in x and "the loss is not finite" in x for x in said)
    monkeypatch.setattr(runs, "run", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):  # what would hit every cell stops the study
        working.work(jobs, store, 1, said.append)


@pytest.mark.slow
def test_two_machines_on_one_store_share_the_cells(own, tmp_path, project):
    env = os.environ | {"ARMADA_ROOT": str(project), "PYTHONPATH": str(CODE)}
    command = [
        sys.executable,
        "-m",
        "armada_lib",
        "study",
        str(own),
        "--store",
        str(tmp_path / "s"),
    ]
    both = [
        subprocess.Popen([*command, "--workers", n], env=env, text=True, stdout=subprocess.PIPE)
        for n in ("1", "2")
    ]
    said = [p.communicate(timeout=600)[0] for p in both]
    assert all(p.returncode == 0 for p in both)
    done = [re.findall(r" of 9 \| ([^|]+) \|", out) for out in said]
    assert sorted(done[0] + done[1]) == sorted({*done[0], *done[1]}), "a cell was computed twice"
    jobs = experiment.jobs(experiment.load(own))
    assert sorted(done[0] + done[1]) == sorted(j.name for j in jobs)


def test_what_is_exported_can_be_scored_again_without_the_data(own, tmp_path):
    run(own, tmp_path / "s", "--cell", "0")
    run(own, tmp_path / "s", "--cell", "2")
    folder = tmp_path / "book" / "results"
    study = experiment.load(own)
    path, n = experiment.export(study, RunStore(tmp_path / "s"), folder)
    assert (path, n) == (folder / "small.jsonl", 2)
    labels = json.loads((folder / "small_labels.json").read_text())
    for r in results.read(path):
        y = np.array(labels[r["spec"].data_id])
        logits = np.eye(2)[r["predictions"]]
        assert len(y) == 10
        assert evaluation.metric("mcc", logits, y) == pytest.approx(r["scores"]["student"])
    run(own, tmp_path / "other", "--cell", "1")  # of another machine: added to what is there
    assert experiment.export(study, RunStore(tmp_path / "other"), folder)[1] == 3
