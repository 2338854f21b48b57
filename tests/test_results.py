"""The run store: a Result is complete and verified, or absent; evidence files are deterministic."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError, create_model
from safetensors import safe_open

from armada_lib import machine, profiles, results
from armada_lib.profiles import Training
from armada_lib.results import Result, RunSpec, RunStore


def run_spec(**changes) -> RunSpec:
    return RunSpec(**{
        "profile": "mini", "task": "cola", "student": "bert-6l", "method": "armada", "teacher": "sd14",
        "manifold": "euclid", "reading": "paper", "alpha": 0.5, "beta": 0.1, "gamma": 1.0, "tau": 5.0,
        "seed": 0, "training": Training(), "student_id": "sha256:1", "teacher_id": "2", "data_id": "3/4",
    } | changes)  # fmt: skip


def result(spec: RunSpec | None = None, seed: int = 0, n: int = 40) -> Result:
    """A Result as a run makes it, with random outputs."""
    rng = np.random.default_rng(seed)
    return Result(
        spec or run_spec(),
        "accuracy",
        {"student": 62.5, "aligner": 51.25},
        {
            "student": rng.standard_normal((n, 2), np.float32),
            "aligner": rng.standard_normal((n, 2), np.float32),
        },
        rng.integers(0, 2, n),
        {"task": rng.random(7, np.float32), "manifold": np.full(7, np.nan, np.float32)},
        {
            "behaviour": {"majority_share": 0.6, "collapsed": False},
            "seconds": 1.5,
            "epochs": [{"epoch": 0}],
        },
        {"python": "3.11", "gpu": None},
    )


def equal(a: Result, b: Result) -> bool:
    arrays = lambda r: {"labels": r.labels, **{f"o/{k}": v for k, v in r.outputs.items()},
                        **{f"c/{k}": v for k, v in r.curves.items()}}  # fmt: skip
    x, y = arrays(a), arrays(b)
    same = x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and x[k].tobytes() == y[k].tobytes()
        for k in x
    )
    rest = lambda r: (r.spec, r.metric, r.scores, r.facts, r.environment)
    return same and rest(a) == rest(b)


# -- keys --------------------------------------------------------------------------------------


def test_equal_specs_have_equal_keys():
    assert run_spec().key == run_spec().key
    assert run_spec(alpha=1).key == run_spec(alpha=1.0).key
    again = RunSpec(**json.loads(run_spec().model_dump_json()))
    assert again == run_spec() and again.key == run_spec().key


@pytest.mark.parametrize("field", RunSpec.model_fields)
def test_any_other_field_is_another_key(field):
    old = getattr(run_spec(), field)
    new = {
        str: lambda: old + "x", float: lambda: old + 0.125, int: lambda: old + 1,
        Training: lambda: Training(epochs=11), type(None): lambda: "x", bool: lambda: not old,
    }[type(old)]()  # fmt: skip
    assert run_spec(**{field: new}).key != run_spec().key


@pytest.mark.parametrize("field", Training.model_fields)
def test_any_other_training_setting_is_another_key(field):
    other = {
        "warmup": 0.2, "schedule": "constant", "train_size": 100, "eval_size": 100, "split": "holdout",
        "select": "best", "precision": "bf16", "dropout": 0.5, "copa": "pair", "aligner": "direct",
        "projection": "free", "detach": False, "compile": True,
        "soft": "kl", "distance": "squared", "manifold_to": "both",
        "template": "chat", "protocol": "likelihood", "new_tokens": 9, "test_size": 9,
        "normalised": False, "partner_lr": 1e-4, "layer_epochs": 1, "threshold": 0.3,
        "stage_epochs": 3, "stage_lr": 1e-4, "match_epochs": 1, "first_epochs": 1, "text_encoder": "x",
    }  # fmt: skip
    old = getattr(Training(), field)
    new = other[field] if field in other else old + 1
    assert new != old
    assert run_spec(training=Training(**{field: new})).key != run_spec().key


def test_a_spec_is_frozen_and_has_no_unknown_field():
    with pytest.raises(ValidationError, match="frozen"):
        run_spec().seed = 3
    with pytest.raises(ValidationError, match="sede"):
        run_spec(sede=3)


def test_the_label_names_what_a_reader_tells_runs_apart_by():
    assert run_spec().label == "cola armada euclid paper seed 0"
    assert (
        run_spec(method="undistilled", manifold=None, reading=None).label
        == "cola undistilled seed 0"
    )


# -- the store ---------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_bit_for_bit(store):
    s, r = RunStore(), result()
    assert s.root == store
    assert r.spec not in s and s.load(r.spec.key) is None
    s.save(r)
    assert r.spec in s and run_spec(seed=1) not in s
    assert equal(s.load(r.spec.key), r)
    assert not equal(s.load(r.spec.key), result(seed=1))
    assert [p.name for p in s.runs.iterdir()] == [r.spec.key]
    assert sorted(p.name for p in (s.runs / r.spec.key).iterdir()) == [
        "arrays.safetensors",
        "result.json",
    ]


def test_arrays_that_are_not_contiguous_are_saved_as_they_read(store):
    r = result()
    r.outputs["student"] = np.asfortranarray(r.outputs["student"])[::-1]
    RunStore().save(r)
    np.testing.assert_array_equal(
        RunStore().load(r.spec.key).outputs["student"], r.outputs["student"]
    )


def test_predictions_and_flags():
    r = result()
    assert r.score == 62.5 and not r.collapsed
    np.testing.assert_array_equal(
        r.predictions(), (r.outputs["student"][:, 1] > r.outputs["student"][:, 0])
    )
    r.outputs["student"] = np.float32([0.5, 1.25])
    assert r.predictions().tolist() == [0.5, 1.25]


@pytest.mark.parametrize(
    "where, root", [("argument", "a"), ("variable", "b"), ("neither", ".armada")]
)
def test_where_the_store_is(tmp_path, monkeypatch, where, root):
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.setenv("ARMADA_STORE", str(tmp_path / "b"))
    if where == "neither":
        monkeypatch.delenv("ARMADA_STORE")
    assert RunStore(tmp_path / "a" if where == "argument" else None).root == tmp_path / root


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "result.json truncated": lambda d: (d / "result.json").write_text((d / "result.json").read_text()[:-40]),
    "result.json empty": lambda d: (d / "result.json").write_text(""),
    "result.json missing": lambda d: (d / "result.json").unlink(),
    "a digit of a score changed": lambda d: (d / "result.json").write_text(
        (d / "result.json").read_text().replace("62.5", "72.5")),
    "arrays truncated": lambda d: (d / "arrays.safetensors").write_bytes((d / "arrays.safetensors").read_bytes()[:-4]),
    "arrays missing": lambda d: (d / "arrays.safetensors").unlink(),
    "last byte of arrays flipped": lambda d: _flip(d / "arrays.safetensors", -1),
    "first byte of arrays flipped": lambda d: _flip(d / "arrays.safetensors", 0),
    "arrays of another run": lambda d: (d / "arrays.safetensors").write_bytes(
        (d.parent / run_spec(seed=1).key / "arrays.safetensors").read_bytes()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_set_aside_with_a_warning(store, damage, caplog):
    s, r = RunStore(), result()
    s.save(r)
    s.save(result(run_spec(seed=1), seed=1))
    home = s.runs / r.spec.key
    before = {p.name: p.read_bytes() for p in home.iterdir()}
    DAMAGE[damage](home)
    assert before != {p.name: p.read_bytes() for p in home.iterdir()}
    assert s.load(r.spec.key) is None
    assert f"stored run {r.spec.key} is damaged" in caplog.text and "computed again" in caplog.text
    assert not home.exists() and r.spec not in s
    assert [p.name for p in s.runs.iterdir() if p.name.startswith(f".damaged-{r.spec.key}-")]
    assert s.load(run_spec(seed=1).key) is not None
    caplog.clear()
    s.save(r)  # the place is free again
    assert equal(s.load(r.spec.key), r) and not caplog.text


def test_a_result_of_a_later_version_is_read(store):
    """Its specification has fields that are not known here, at defaults that its key does not hold."""
    s, r = RunStore(), result()
    s.save(r)
    home = s.runs / r.spec.key / "result.json"
    body = json.loads(json.loads(home.read_text())["result"])
    body["spec"] |= {"later": 1}
    body["spec"]["training"] |= {"later": 2}
    text = json.dumps(body, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    home.write_text(json.dumps({"digest": digest, "result": text}))
    assert equal(s.load(r.spec.key), r)


def test_a_result_that_cannot_be_read_now_stays(store, monkeypatch):
    s, r = RunStore(), result()
    s.save(r)

    def busy(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(results, "load_file", busy)
        with pytest.raises(PermissionError):
            s.load(r.spec.key)
    assert equal(s.load(r.spec.key), r)


def test_a_result_of_another_run_is_not_used(store, caplog):
    s, r = RunStore(), result()
    s.save(r)
    (s.runs / r.spec.key).rename(s.runs / "0123456789abcdef0123")
    assert s.load("0123456789abcdef0123") is None and "another specification" in caplog.text


def test_a_writer_that_is_second_changes_nothing(store):
    a, b = RunStore(), RunStore()
    first, second = result(seed=1), result(seed=2)
    a.save(first)
    b.save(second)
    assert equal(a.load(first.spec.key), first)
    assert [p.name for p in a.runs.iterdir()] == [first.spec.key]


def test_writers_at_the_same_moment_leave_one_whole_result(store):
    found, errors = [result(seed=i) for i in range(4)], []
    for _ in range(5):
        barrier = threading.Barrier(len(found))

        def write(r, barrier=barrier):
            barrier.wait()
            try:
                RunStore().save(r)
            except Exception as e:  # noqa: BLE001
                errors.append(e)

        threads = [threading.Thread(target=write, args=(r,)) for r in found]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        stored = RunStore().load(found[0].spec.key)
        assert not errors and sum(equal(stored, r) for r in found) == 1
        assert [p.name for p in RunStore().runs.iterdir()] == [found[0].spec.key]
        (RunStore().runs / found[0].spec.key).rename(store / f"done-{len(list(store.iterdir()))}")


def test_another_writer_between_look_and_rename_is_no_error(store, monkeypatch):
    rename, mine, theirs = Path.rename, result(seed=1), result(seed=2)

    def slow(self, target):
        monkeypatch.setattr(Path, "rename", rename)
        RunStore().save(theirs)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slow)
    RunStore().save(mine)
    assert equal(RunStore().load(mine.spec.key), theirs)
    assert [p.name for p in RunStore().runs.iterdir()] == [mine.spec.key]


def test_another_reader_may_set_a_damaged_result_aside_first(store, monkeypatch, caplog):
    s, r = RunStore(), result()
    s.save(r)
    _flip(s.runs / r.spec.key / "arrays.safetensors", -1)
    rename = Path.rename

    def slow(self, target):
        monkeypatch.setattr(Path, "rename", rename)
        assert RunStore().load(r.spec.key) is None
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slow)
    assert s.load(r.spec.key) is None
    assert len([p for p in s.runs.iterdir() if p.name.startswith(".damaged-")]) == 1


def _hold(root, key, inside, leave):
    with RunStore(root).lock(key):
        inside.set()
        leave.wait(60)


def test_the_lock_of_a_run_is_free_when_its_process_is_dead(store):
    context = multiprocessing.get_context("spawn")
    inside, leave = context.Event(), context.Event()
    RunStore().check()
    other = context.Process(target=_hold, args=(store, "k", inside, leave))
    other.start()
    assert inside.wait(60)
    lock = RunStore().lock("k")
    with pytest.raises(TimeoutError):
        lock.acquire(timeout=0.2)
    other.kill()
    other.join()
    with lock.acquire(timeout=5):
        pass


# -- evidence ----------------------------------------------------------------------------------


def many() -> list[Result]:
    specs = [
        run_spec(task=t, seed=s, student=w, **m)
        for t in ("rte", "cola") for s in (1, 0) for w in ("opt-1.3b", "bert-6l")
        for m in ({}, {"method": "undistilled", "teacher": None, "manifold": None, "reading": None, "beta": 0.0})
    ]  # fmt: skip
    return [result(s, seed=i) for i, s in enumerate(specs)]


def test_exported_results_are_read_back(tmp_path):
    path, found = tmp_path / "new" / "evidence.jsonl", many()
    results.export(found, path)
    back = results.read(path)
    assert {r["key"] for r in back} == {r.spec.key for r in found} and len(back) == len(found)
    by_key = {r.spec.key: r for r in found}
    for record in back:
        r = by_key[record["key"]]
        assert record["spec"] == r.spec and record["spec"].key == r.spec.key
        assert (record["scores"], record["facts"], record["environment"]) == (
            r.scores,
            r.facts,
            r.environment,
        )
        assert record["predictions"] == r.predictions().tolist()
    assert [p.name for p in path.parent.iterdir()] == ["evidence.jsonl"]


def test_an_exported_file_does_not_depend_on_the_order_of_the_results(tmp_path):
    found = many()
    texts = []
    for i, order in enumerate((found, found[::-1], found + found[:3])):
        results.export(order, tmp_path / f"{i}.jsonl")
        texts.append((tmp_path / f"{i}.jsonl").read_bytes())
    assert texts[0] == texts[1] == texts[2]
    specs = [json.loads(line)["spec"] for line in texts[0].decode().splitlines()]
    place = [(s["task"], s["method"], s["seed"]) for s in specs]
    assert place == sorted(place) and len(set(place)) == len(place) / 2


def test_predictions_of_a_regression_are_rounded_scores(tmp_path):
    r = result()
    r.outputs["student"] = np.float32([1.23456, 4.0])
    assert r.record()["predictions"] == [1.235, 4.0]


def test_an_export_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "evidence.jsonl"
    results.export(many(), path)
    before = path.read_bytes()
    broken = result()
    broken.facts["bad"] = object()
    with pytest.raises(TypeError):
        results.export([broken], path)
    assert path.read_bytes() == before


def test_an_edited_evidence_file_with_an_unknown_field_is_refused(tmp_path):
    path = tmp_path / "evidence.jsonl"
    results.export([result()], path)
    path.write_text(path.read_text().replace('"seed": 0', '"sede": 0'))
    with pytest.raises(ValidationError, match="sede"):
        results.read(path)


def test_nothing_stored_can_run_code(store):
    RunStore().save(result())
    home = RunStore().runs / result().spec.key
    json.loads((home / "result.json").read_text())
    with safe_open(home / "arrays.safetensors", "np") as f:
        assert "labels" in f.keys()  # noqa: SIM118


def test_a_setting_added_later_leaves_old_keys_valid():
    """Keys hash what differs from the defaults, so a new field at its default changes none."""
    before = run_spec(training=Training(epochs=3)).key
    newer = create_model("Training", __base__=Training, added=(int, 1))
    wider = create_model("RunSpec", __base__=RunSpec, training=(newer, ...), other=(str, "x"))
    fields = run_spec(training=Training(epochs=3)).model_dump()
    assert wider(**fields).key == before
    assert wider(**fields | {"other": "y"}).key != before


def test_peak_memory_is_what_was_held_beyond_the_start():
    memory = machine.peak_memory()
    assert (small := memory()) is None or small < 50
    held = np.ones((100, 2**17))  # 100 MiB
    assert small is None or 95 < memory() < 250
    del held
    assert small is None or memory() > 95
