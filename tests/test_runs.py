"""Studies: stored once, shared by workers, and the same after any number of kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from armada_lib import extraction, report, run_data, runs, specs, teachers
from armada_lib.results import RunStore

HERE = Path(__file__).parent


def everything(store: RunStore, specs) -> dict[str, tuple]:
    """What a study found, without times."""
    found = {}
    for s in specs:
        r = store.load(s.key)
        arrays = {
            **{f"o/{k}": v for k, v in r.outputs.items()},
            **{f"c/{k}": v for k, v in r.curves.items()},
        }
        found[s.key] = (
            r.scores,
            {k: v.tobytes() for k, v in sorted(arrays.items())},
            r.facts["diagnostics"],
        )
    return found


def test_a_study_killed_at_random_moments_ends_as_an_unkilled_one(project, tmp_path):
    env = os.environ | {
        "ARMADA_ROOT": str(project), "OMP_NUM_THREADS": "1", "ARMADA_SAVE_EVERY": "0",
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
    }  # fmt: skip
    found = {}
    for name, kills in (("killed", 24), ("whole", 0)):
        done = subprocess.run(
            [sys.executable, str(HERE / "kills.py"), str(kills)], env=env | {"ARMADA_STORE": str(tmp_path / name)},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = int(done.stdout.split()[-1])
    assert found["killed"] >= 20 and found["whole"] == 0
    import kills as script

    chosen = script.wanted()
    killed, whole = (everything(RunStore(tmp_path / n), chosen) for n in ("killed", "whole"))
    assert killed == whole
    leftovers = [
        p.name for p in (tmp_path / "killed/states").iterdir() if p.suffix == ".safetensors"
    ]
    assert not leftovers


def test_a_stored_run_is_never_computed_again(project, store, monkeypatch):
    s = specs.spec("tiny", "cola", "undistilled")
    first = runs.run(s)
    monkeypatch.setattr(runs, "compute", lambda *a, **k: pytest.fail("computed again"))
    again = runs.run(s)
    assert (
        again.scores == first.scores
        and (again.outputs["student"] == first.outputs["student"]).all()
    )
    assert set(first.scores) == {"student"} and again.facts["train"] == 24


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_result_is_set_aside_and_computed_again(project, store, damage, caplog):
    s = specs.spec("tiny", "cola", "undistilled")
    first = runs.run(s)
    path = (
        store / "runs" / s.key / ("arrays.safetensors" if damage != "truncate" else "result.json")
    )
    raw = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[: len(raw) // 2] if damage == "truncate" else raw)
    again = runs.run(s)
    assert "is damaged" in caplog.text
    assert (again.outputs["student"] == first.outputs["student"]).all()


def test_a_damaged_vector_is_computed_again_not_used(project, store):
    s = specs.spec("tiny", "cola", "armada")
    first = runs.run(s)
    for path in (store / "features").rglob("*.rows"):
        raw = bytearray(path.read_bytes())
        raw[10] ^= 0xFF
        path.write_bytes(raw)
    t = specs.spec("tiny", "cola", "armada", seed=1)
    runs.run(t)
    (store / "runs" / s.key).rename(store / "first")
    again = runs.run(s)
    np.testing.assert_array_equal(again.outputs["aligner"], first.outputs["aligner"])


def test_two_workers_give_what_one_gives(project, tmp_path, monkeypatch):
    monkeypatch.setenv("ARMADA_ROOT", str(project))  # for the workers
    chosen = specs.grid(
        "tiny", ["cola"], ["undistilled", "armada", "shuffled"], manifolds=("euclid",)
    )
    one, two = RunStore(tmp_path / "one"), RunStore(tmp_path / "two")
    runs.study(chosen, one, workers=1, progress=False)
    runs.study(chosen, two, workers=2, progress=False)
    assert everything(one, chosen) == everything(two, chosen)


@pytest.mark.parametrize(("threads", "gpu", "n"), [(1, False, 1), (3, False, 3), (3, True, 1)])
def test_a_study_takes_a_process_for_every_thread_that_it_may_use(monkeypatch, threads, gpu, n):
    wanted = specs.grid("mini", ["cola"], ["undistilled"], seeds=range(4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert runs._processes(wanted, None) == n and runs._processes(wanted, 2) == 2
    assert runs._processes(wanted[:2], None) == min(n, 2)


def test_teacher_vectors_are_computed_once_for_all_runs(project, store, monkeypatch):
    seen: list[str] = []
    load = teachers.load

    def counting(spec, device="cpu"):
        t = load(spec, device)
        encode = t.encode
        t.encode = lambda texts: (seen.extend(texts), encode(texts))[1]
        return t

    monkeypatch.setattr(teachers, "load", counting)
    runs.study(
        specs.grid("tiny", ["cola"], ["armada", "shuffled", "random", "layers_only"]),
        workers=1,
        progress=False,
    )
    assert len(seen) == len(set(seen)) == 48


def test_controls_read_what_they_say(project, store):
    s = {
        m: specs.spec("tiny", "copa", m)
        for m in ("armada", "shuffled", "random", "layers_only", "undistilled")
    }
    RunStore().check()
    extraction.extract(list(s.values()), RunStore(), progress=False)
    built = {m: runs.build(x, RunStore()) for m, x in s.items()}
    texts = np.arange(48)
    real, mixed = (built[m][2].vectors(texts) for m in ("armada", "shuffled"))
    assert sorted(map(tuple, real.tolist())) == sorted(map(tuple, mixed.tolist()))
    assert (real != mixed).any(1).float().mean() > 0.9
    assert abs(real.mean().item()) < 0.02 and abs(real.std().item() - 1) < 0.02
    noise = built["random"][2].vectors(texts)
    assert abs(noise.mean().item()) < 0.05 and abs(noise.std().item() - 1) < 0.05
    raw = {m: specs.spec("tiny", "copa", m, reading="released") for m in ("armada", "random")}
    extraction.extract(list(raw.values()), RunStore(), progress=False)
    own, drawn = (runs.build(x, RunStore())[2].vectors(texts) for x in raw.values())
    error = own.std(0) / len(texts) ** 0.5
    assert ((own.mean(0) - drawn.mean(0)).abs() < 5 * error).all()
    assert (drawn.std(0) / own.std(0)).mean().item() == pytest.approx(1, abs=0.05)
    assert built["layers_only"][2].teacher is None and built["layers_only"][1].aligner is None
    assert built["undistilled"][0].branch is None


@pytest.mark.parametrize("reading", ["paper", "released"])
def test_the_constant_teacher_says_the_mean_of_training_to_every_text(project, store, reading):
    real, same = (
        specs.spec("tiny", "cola", m, reading=reading, train_size=16, eval_size=8)
        for m in ("armada", "constant")
    )
    extraction.extract([real], RunStore(), progress=False)
    _, _, own, _, _ = runs.build(real, RunStore())
    _, _, train, held, facts = runs.build(same, RunStore())
    mean = own.vectors(np.arange(16)).mean(0)
    for part, n in ((train, 16), (held, 8)):
        got = part.vectors(np.arange(n))
        assert got.shape == (n, 64) and (got == got[0]).all()
        np.testing.assert_allclose(got[0], mean, atol=1e-5, rtol=1e-4)
    assert mean.abs().max() > 0.1 or reading == "paper"
    assert facts["texts_without_vector"] == 0  # none was refused


def test_equal_work_has_one_key(project):
    a = specs.spec("tiny", "cola", "undistilled", manifold="cosine", reading="released", alpha=0.1)
    b = specs.spec("tiny", "cola", "undistilled")
    assert a.key == b.key and a.manifold is None and a.teacher is None
    c = specs.spec("tiny", "cola", "armada", beta=0.0, manifold="cosine")
    d = specs.spec("tiny", "cola", "armada", beta=0.0, manifold="euclid")
    assert c.key == d.key
    chosen = specs.grid("tiny", ["cola"], ["undistilled", "armada"], readings=("paper", "released"))
    assert len(chosen) == 1 + 2 * 3


def test_the_tables_row_and_the_exported_line_say_what_stood_behind(project, tmp_path):
    r = runs.run(specs.spec("tiny", "cola", "armada", train_size=16, eval_size=10))
    df = report.table([r])
    assert (
        set(df["head"]) == {"student", "student_aux", "aligner", "aligner_aux"}
        and len(r.labels) == 10
    )
    line = r.record()
    assert (
        line["spec"]["teacher_id"] and line["environment"]["torch"] and line["facts"]["seconds"] > 0
    )
    assert len(line["predictions"]) == 10 and json.dumps(line)
    assert "home" not in json.dumps(line["environment"])


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_trained_student_loads_with_plain_transformers(project, tmp_path, monkeypatch, select):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scores = iter([3.0, 2.0] * 2)  # the first of two epochs is the best one
    monkeypatch.setattr(runs, "_judge", lambda *a: lambda: next(scores))
    s = specs.spec("tiny", "cola", "armada", select=select)
    runs.trained_student(s).save_pretrained(tmp_path / "student")
    stored = runs.run(s)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    _, held = run_data.examples(s)
    with torch.no_grad():
        logits = model(**tokenizer(held.first, padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(logits, stored.outputs["student"], atol=1e-4)
