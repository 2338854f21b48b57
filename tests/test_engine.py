"""The engine: what must be equal is equal bit for bit, and a killed run ends as an unkilled one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import experiment, rows, same, weights

from armada_lib import engine, evaluation, losses, students
from armada_lib.aligner import drift
from armada_lib.state import Diverged

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["bert", "deberta", "opt"])
def test_all_weights_zero_is_undistilled_bit_for_bit(checkpoints, name):
    plain, _, a = experiment(checkpoints[name], "undistilled", alpha=0, beta=0, gamma=0)
    armada, _, b = experiment(checkpoints[name], "armada", alpha=0, beta=0, gamma=0)
    assert same(weights(plain.model), weights(armada.model))
    assert (a.curves["task"] == b.curves["task"]).all()
    other, _, _ = experiment(checkpoints[name], "armada")
    assert not same(weights(plain.model), weights(other.model))


def test_beta_zero_makes_the_three_manifold_losses_one_run(checkpoints):
    runs = [weights(experiment(checkpoints["bert"], manifold=m, beta=0.0)[0]) for m in
            ("cosine", "euclid", "elementwise")]  # fmt: skip
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert not same(runs[0], weights(experiment(checkpoints["bert"], manifold="cosine")[0]))


@pytest.mark.parametrize(
    "choice",
    [{"soft": "squared"}, {"soft": "frobenius"}, {"soft": "kl"}, {"soft": "mse"}, {"distance": "squared"},
     {"distance": "literal"}, {"manifold_to": "both"}, {"aligner": "direct"}, {"aligner": "projected"},
     {"projection": "fixed"}, {"projection": "free"}, {"aligner_pretrain": 1}],
    ids=str,
)  # fmt: skip
def test_every_option_of_the_register_trains_and_changes_the_run(checkpoints, choice):
    manifold = "cosine" if choice == {"distance": "literal"} else "euclid"
    usual = experiment(checkpoints["bert"], manifold=manifold, training={"epochs": 1})
    other = experiment(checkpoints["bert"], manifold=manifold, training={"epochs": 1, **choice})
    assert np.isfinite(other[2].curves["total"]).all()
    a, b = (
        {**weights(x[0]), **{f"a/{k}": v for k, v in weights(x[1].aligner).items()}}
        for x in (usual, other)
    )
    assert not same(a, b)


def test_the_manifold_loss_may_train_the_aligner_too(checkpoints):
    _, _, t = experiment(checkpoints["bert"], training={"manifold_to": "both"})
    np.testing.assert_allclose(t.curves["aligner_manifold"], t.curves["manifold"], rtol=1e-5)


def test_kl_refuses_a_regression_task(checkpoints):
    with pytest.raises(ValueError, match="'kl' needs classes"):
        experiment(checkpoints["bert"], kind="regression", training={"soft": "kl"})


@pytest.mark.parametrize("reading", ["paper", "released"])
def test_with_detach_the_aligner_does_not_depend_on_the_student(checkpoints, reading):
    runs = [experiment(checkpoints["bert"], student_seed=s, reading=reading, training={"dropout": 0.0})
            for s in (1, 2)]  # fmt: skip
    assert not same(weights(runs[0][0]), weights(runs[1][0]))
    assert same(weights(runs[0][1].aligner), weights(runs[1][1].aligner))


def test_without_detach_the_student_losses_reach_the_aligner(checkpoints):
    a = experiment(checkpoints["bert"], training={"detach": False})[1].aligner
    b = experiment(checkpoints["bert"], training={"detach": True})[1].aligner
    assert not same(weights(a), weights(b))


def test_what_rests_for_an_epoch_gathers_no_gradient(checkpoints):
    """In epochs of the student alone its losses may reach the aligner; the next epoch starts clean."""
    made = [
        experiment(checkpoints["bert"], reading="released", training={"epochs": 2, "detach": d})
        for d in (True, False)
    ]
    (s, m, t), (s2, m2, _) = made
    assert len(t.epochs) >= 3
    assert same(weights(m.aligner), weights(m2.aligner))
    assert same(weights(s), weights(s2))


@pytest.mark.parametrize(
    "method, moves", [("armada", True), ("frozen_aligner", False), ("shuffled", True)]
)
def test_a_frozen_aligner_does_not_move(checkpoints, method, moves):
    _, before, _ = experiment(
        checkpoints["bert"], method, training={"epochs": 1, "aligner_lr": 1e-30}
    )
    _, after, _ = experiment(checkpoints["bert"], method, training={"epochs": 1})
    assert same(weights(before.aligner), weights(after.aligner)) != moves


def test_layers_only_has_the_added_layers_and_no_aligner(checkpoints):
    student, method, trained = experiment(checkpoints["bert"], "layers_only", alpha=0, beta=0)
    assert method.aligner is None and student.branch is not None
    assert {"task", "aux_task"} <= set(trained.curves) and "manifold" not in trained.curves


@pytest.mark.parametrize("kind", ["class", "regression", "choice"])
@pytest.mark.parametrize("reading", ["paper", "released"])
def test_every_kind_of_task_learns(checkpoints, kind, reading):
    _, _, trained = experiment(
        checkpoints["bert"],
        kind=kind,
        reading=reading,
        training={"epochs": 20, "student_lr": 3e-3, "dropout": 0.0},
    )
    task = trained.curves["task"][np.isfinite(trained.curves["task"])]
    assert task[-4:].mean() < 0.7 * task[:4].mean()
    aligner = trained.curves["aligner_task"][np.isfinite(trained.curves["aligner_task"])]
    assert aligner[-4:].mean() < aligner[:4].mean()


def test_released_alternates_by_epoch(checkpoints):
    _, _, t = experiment(checkpoints["bert"], reading="released")
    assert [e["phase"] for e in t.epochs] == ["aligner", "student"] * 2
    assert np.isnan(t.curves["task"][:4]).all() and np.isnan(t.curves["aligner_task"][4:8]).all()


def test_probing_gradients_changes_nothing(checkpoints):
    a, _, ta = experiment(checkpoints["bert"], run={"probes": 0})
    b, _, tb = experiment(checkpoints["bert"], run={"probes": 2})
    assert same(weights(a), weights(b))
    assert not ta.diagnostics["gradients"]
    first = tb.diagnostics["gradients"][0]
    assert len(tb.diagnostics["gradients"]) == 4
    assert set(first["gradient"]) == {"task", "aux_task", "soft", "aux_soft", "manifold"}
    assert min(first["gradient"].values()) > 0 and first["scatter"]["hidden"] > 0


def test_projections_end_orthogonal_and_drift_is_reported(checkpoints):
    student, m, t = experiment(checkpoints["bert"], training={"retract_every": 100})
    assert t.diagnostics["drift"] > 1e-3  # nothing held it for 8 steps
    for weight in (student.branch["projection"].weight, m.aligner.projection):
        assert drift(weight) < 1e-5
    _, _, t = experiment(checkpoints["bert"], training={"retract_every": 1})
    assert t.diagnostics["drift"] < 1e-5


def test_a_fixed_projection_stays_and_a_free_one_drifts(checkpoints):
    start = experiment(checkpoints["bert"], training={"projection": "fixed", "epochs": 1})[0]
    end = experiment(checkpoints["bert"], training={"projection": "fixed", "epochs": 3})[0]
    w = lambda s: s.branch["projection"].weight
    assert torch.equal(w(start), w(end))
    assert drift(w(experiment(checkpoints["bert"], training={"projection": "free"})[0])) > 1e-3


def test_predictions_do_not_need_the_branch(checkpoints):
    student, method, _ = experiment(checkpoints["bert"])
    data = rows(student)
    whole = evaluation.predict(student, method, data, bf16=False)
    assert set(whole) == {"student", "student_aux", "aligner", "aligner_aux"}
    student.branch = None
    assert (
        evaluation.predict(student, method, data, bf16=False)["student"] == whole["student"]
    ).all()


def test_the_optimiser_is_clipped_adamw(checkpoints):
    """Against clip_grad_norm_ and an unfused AdamW, parameter by parameter, over three steps."""
    s = experiment(checkpoints["bert"], "undistilled", training={"epochs": 1})[0]
    t = engine.Training(student_lr=1e-2, clip=0.5, schedule="constant", weight_decay=0.1)
    mine = engine.Optimiser(s, 1e-2, t, 10)
    start = [p.detach().clone() for p in mine.params]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    decays = [0.1 if p in set(mine.adam.param_groups[0]["params"]) else 0.0 for p in mine.params]
    reference = torch.optim.AdamW([{"params": [p], "weight_decay": d} for p, d in zip(theirs, decays, strict=True)],
                                  lr=1e-2, foreach=False)  # fmt: skip
    torch.manual_seed(0)
    for scale in (5.0, 0.001, 1.0):
        for p, q in zip(mine.params, theirs, strict=True):
            p.grad = torch.randn_like(p) * scale
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        mine.step()
        reference.step()
    for p, q in zip(mine.params, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    tables = {id(s.model.get_input_embeddings().weight)}
    assert all(id(p) not in tables and p.ndim > 1 for p in mine.adam.param_groups[0]["params"])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(checkpoints):
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step \d+"):
        experiment(checkpoints["bert"], "undistilled", training={"student_lr": 1e30, "epochs": 3})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("reading, select", [("paper", "last"), ("released", "best")])
@pytest.mark.parametrize("at", [1, 5, 8, 11])
def test_a_killed_run_ends_as_an_unkilled_one(
    checkpoints, tmp_path, monkeypatch, reading, select, at
):
    state = tmp_path / "state.safetensors"
    scores = iter([3.0, 2.0, 1.0] * 3)
    kw = {"reading": reading, "training": {"epochs": 3, "select": select}}
    go = lambda **run: experiment(checkpoints["bert"], run=run, **kw)
    whole, m0, t0 = go(evaluate=lambda: next(scores))

    done = {"steps": 0}
    step = engine.Optimiser.step

    def dying(self):
        done["steps"] += 1
        if done["steps"] > at * len(("student", "aligner")):
            raise Killed
        return step(self)

    scores = iter([3.0, 2.0, 1.0] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(engine.Optimiser, "step", dying)
        with pytest.raises(Killed):
            go(state=state, save_every=0.0, evaluate=lambda: next(scores))
    assert state.exists()
    resumed, m1, t1 = go(state=state, save_every=0.0, evaluate=lambda: next(scores))
    assert same(weights(whole), weights(resumed)) and same(weights(m0.aligner), weights(m1.aligner))
    for name, curve in t0.curves.items():
        np.testing.assert_array_equal(curve, t1.curves[name])
    assert not state.exists()
    assert t0.earlier == 0 and 0 < t1.earlier < t1.seconds  # what the killed attempt had cost


class Half:
    """One of two processes that hold the same, as far as the engine asks."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, index):
        self.process_index, self.is_main_process = index, index == 0

    def reduce(self, x, how):
        return x

    def wait_for_everyone(self):
        pytest.fail("a process waits, and the others may be elsewhere")


def test_a_rest_of_fewer_examples_than_processes_ends_no_run_too_late(checkpoints):
    # 33 examples in batches of 2 x 8: the last one is left out, or one process would have none
    _, _, t = experiment(checkpoints["bert"], n=33, run={"accelerator": Half(0)})
    assert t.steps == 2 * 2 and len(t.epochs) == 2
    assert np.isfinite(t.curves["total"]).all() and len(t.curves["total"]) == t.steps


def test_the_first_process_alone_saves_and_none_waits(checkpoints, tmp_path, monkeypatch):
    saved, save = [], engine.save
    monkeypatch.setattr(engine, "save", lambda path, *a: saved.append(path) or save(path, *a))
    for index in (0, 1):
        run = {"accelerator": Half(index), "state": tmp_path / f"{index}", "save_every": 0.0}
        experiment(checkpoints["bert"], run=run)
    assert saved and set(saved) == {tmp_path / "0"}


def test_a_damaged_state_is_not_used(checkpoints, tmp_path):
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"not a state")
    whole, _, _ = experiment(checkpoints["bert"])
    again, _, _ = experiment(checkpoints["bert"], run={"state": state})
    assert same(weights(whole), weights(again))


def test_two_processes_match_one_with_twice_the_batch(checkpoints, tmp_path):
    """Under `accelerate launch`, every loss: centroids and gradients are those of the whole batch."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    checkpoint = checkpoints["bert"].checkpoint
    found = {}
    for processes, batch in ((2, 4), (1, 8)):
        out = tmp_path / f"{processes}.safetensors"
        # accelerate starts several CPU processes only through MPI; its torchrun launcher is named
        # "--multi_gpu" and serves CPU processes as well, because the script asks for the CPU
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
                  "--main_process_port", "0", "--num_processes", str(processes)]  # fmt: skip
        head = launch if processes > 1 else [sys.executable]
        done = subprocess.run([*head, str(HERE / "tiny.py"), checkpoint, str(out), str(batch)],
                              env=env, capture_output=True, text=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        with safe_open(out, "pt") as f:
            assert f.metadata() == {"processes": str(processes), "steps": "8 8 8"}
            found[processes] = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    for name, one in found[1].items():
        if name.endswith(
            "key.bias"
        ):  # its gradient is zero in exact arithmetic: Adam blows up rounding
            continue
        torch.testing.assert_close(found[2][name], one, atol=2e-4, rtol=1e-3)


TRAJECTORIES = [("undistilled", "paper", "class"), ("armada", "paper", "class"), ("armada", "released", "class"),
                ("armada", "paper", "regression"), ("layers_only", "paper", "choice")]  # fmt: skip


def trajectories(spec):
    found = {}
    for method, reading, kind in TRAJECTORIES:
        extra = {"alpha": 0, "beta": 0} if method == "layers_only" else {}
        _, _, t = experiment(
            spec, method, kind, reading=reading, training={"dropout": 0.0}, **extra
        )
        found[f"{method} {reading} {kind}"] = {
            k: [None if np.isnan(x) else round(float(x), 5) for x in t.curves[k]]
            for k in ("total", "task", "grad_student") if k in t.curves
        }  # fmt: skip
    return found


def test_the_committed_trajectory_still_holds(checkpoints):
    """If this fails on purpose: raise `results.RECIPE`, then `python tests/test_engine.py` and say why."""
    kept = json.loads((HERE / "trajectory.json").read_text())
    now = trajectories(checkpoints["bert"])
    assert kept.keys() == now.keys()
    for run, curves in kept.items():
        for name, curve in curves.items():
            a = np.array(curve, dtype=float)
            np.testing.assert_allclose(
                np.array(now[run][name], dtype=float),
                a,
                rtol=2e-3,
                atol=2e-4,
                err_msg=f"{run} {name}",
            )


def test_a_run_leaves_the_callers_random_state_alone(checkpoints):
    torch.manual_seed(3)
    expected = torch.rand(2)
    student = students.load(checkpoints["bert"], 2, 0)
    data = rows(student)
    from tiny import setting

    from armada_lib.methods import METHODS

    s = setting()
    m = METHODS["armada"].build(s, student)
    torch.manual_seed(3)
    engine.train(student, m, data, s.training, 0)
    assert torch.equal(torch.rand(2), expected)


def test_the_shared_centroid_has_the_global_value_and_the_local_gradient():
    class Two:
        def reduce(self, x, how):
            return (x + 1.0) / 2 if how == "mean" else x

    p = torch.ones(4, 3, requires_grad=True)
    c = engine._shared_centroid(Two())(p * 3)
    torch.testing.assert_close(c, torch.full((3,), 2.0))
    losses.mean_row(c[None]).sum().backward()
    torch.testing.assert_close(p.grad, torch.full((4, 3), 3 / 4))


if __name__ == "__main__":
    import tempfile

    import conftest

    class Factory:
        def mktemp(self, name):
            return Path(tempfile.mkdtemp())

    spec = conftest.checkpoints.__wrapped__(Factory())["bert"]
    (HERE / "trajectory.json").write_text(json.dumps(trajectories(spec), indent=1) + "\n")
