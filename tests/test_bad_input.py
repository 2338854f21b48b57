"""Whatever is wrong with the input is said in one message, before any model is loaded or built."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from test_results import result, run_spec

from armada_lib import extraction, profiles, run_data, runs, specs, students, tasks
from armada_lib.methods import METHODS, MULTIMODAL
from armada_lib.profiles import MANIFOLDS, READINGS, Training, Unknown
from armada_lib.results import RunStore

NAN, INF = float("nan"), float("inf")
LOAD_STUDENT = students.load


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Loading a teacher, building a student or training fails the test."""
    for module, name in (
        (extraction.teachers, "load"),
        (runs.students, "load"),
        (runs.engine, "train"),
    ):
        monkeypatch.setattr(module, name, lambda *a, n=name, **k: pytest.fail(f"{n} was called"))


@pytest.fixture
def tiny(checkpoints, tmp_path, monkeypatch) -> Path:
    """A project folder with a profile `tiny` and a few rows; its teacher exists by name only."""
    base = tmp_path / "project"
    for folder in ("params/profiles", "book/data/mini/glue/cola", "teacher"):
        (base / folder).mkdir(parents=True)
    (base / "teacher" / "model_index.json").write_text("{}")
    raw = yaml.safe_load((profiles.ROOT / "params/profiles/mini.yaml").read_text())
    raw["students"] = {"bert-6l": {"checkpoint": checkpoints["bert"].checkpoint}}
    raw["teachers"] = {
        "sd14": {"kind": "image", "checkpoint": str(base / "teacher"), "width": 64, "size": 8}
    }
    del raw["training"]["groups"]["glue"]  # every row is evaluated
    (base / "params/profiles/tiny.yaml").write_text(yaml.safe_dump(raw))
    mine = [
        {"sentence": f"the cat {'sat ' * (i + 1)}", "label": i % 2, "idx": i} for i in range(24)
    ]
    for split in ("train", "validation"):
        text = "".join(json.dumps(r) + "\n" for r in mine)
        (base / f"book/data/mini/glue/cola/{split}.jsonl").write_text(text)
    monkeypatch.setattr(profiles, "ROOT", base)
    forget()
    yield base
    forget()


def forget() -> None:
    profiles.load.cache_clear()
    run_data._examples.cache_clear()


def data(folder: Path, monkeypatch, **rows) -> None:
    """`folder` as ARMADA_DATA with CoLA rows a split."""
    home = folder / "glue" / "cola"
    home.mkdir(parents=True)
    for split, values in rows.items():
        (home / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in values))
    monkeypatch.setenv("ARMADA_DATA", str(folder))
    forget()


GOOD = [{"sentence": "the cat sat", "label": 1}, {"sentence": "cat the sat", "label": 0}]


def test_the_set_up_of_these_tests_is_right(tiny):
    """What the other tests change is all that is wrong there."""
    s = specs.spec("tiny", "cola")
    assert s.method == "armada" and s.teacher_id and s.student_id.startswith("sha256:")
    # no mentor is in this profile, and no student of Table 8
    plain = [n for n, e in METHODS.items() if not e.mentor and n not in MULTIMODAL]
    assert len(specs.grid("tiny", ["cola"], plain)) == 9


def test_the_guard_of_these_tests_sees_work(tiny):
    for method in ("undistilled", "armada"):
        with pytest.raises(pytest.fail.Exception, match="load was called"):
            runs.run(specs.spec("tiny", "cola", method))


# -- names -------------------------------------------------------------------------------------

TASKS = list(tasks.TASKS)
NAMES = {
    "profile": (dict(profile="tinny"), "profile 'tinny'; did you mean 'tiny'?", ["tiny"]),
    "task": (dict(task="colla"), "task 'colla'; did you mean 'cola'?", TASKS),
    "student": (dict(student="bert-6"), "student (profile tiny) 'bert-6'; did you mean 'bert-6l'?", ["bert-6l"]),
    "teacher": (dict(teacher="sd41"), "teacher (profile tiny) 'sd41'; did you mean 'sd14'?", ["sd14"]),
    "method": (dict(method="armda"), "method 'armda'; did you mean 'armada'?", list(METHODS)),
    "loss": (dict(manifold="euclidean"), "manifold loss 'euclidean'; did you mean 'euclid'?", MANIFOLDS),
    "reading": (dict(reading="relesed"), "reading 'relesed'; did you mean 'released'?", READINGS),
    "setting": (dict(epoch=3), "training setting 'epoch'; did you mean 'epochs'?", list(Training.model_fields)),
    "unset setting": (dict(epoch=None), "training setting 'epoch'; did you mean", list(Training.model_fields)),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_a_misspelt_name_is_answered_with_the_valid_ones(tiny, case):
    given, message, valid = NAMES[case]
    with pytest.raises(Unknown) as e:
        specs.spec(**{"profile": "tiny", "task": "cola"} | given)
    said = str(e.value)
    assert said.startswith(f"unknown {message}") and "\n" not in said
    assert said.split(" Valid: ")[1].split(", ") == sorted(valid)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(tasks=["cola", "colla"]), "unknown task 'colla'"),
        (dict(methods=["undistilled", "armda"]), "unknown method 'armda'"),
        (dict(manifolds=["cosine", "euclidean"]), "unknown manifold loss 'euclidean'"),
        (dict(readings=["paper", "papr"]), "unknown reading 'papr'"),
        (dict(controls=["eucl"]), "unknown manifold loss 'eucl'"),
        (dict(seeds=[0, -1]), "seed must be an integer of 0 or more, got -1"),
        (dict(epoch=1), "unknown training setting 'epoch'"),
        (dict(teacher="sd41"), "unknown teacher"),
    ],
)
def test_a_study_is_checked_as_a_whole_before_its_first_run(tiny, given, message):
    whole = {"tasks": ["cola"], "methods": ["undistilled", "armada", "shuffled"]} | given
    with pytest.raises(ValueError, match=message):
        runs.study(specs.grid("tiny", **whole), progress=False)


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        *(("alpha", v, "from 0 to 1") for v in (-0.1, 1.5, NAN, INF, -INF, "0.5")),
        *(("beta", v, "of 0 or more") for v in (-1, -1e-9, NAN, INF, "1", [1])),
        *(("gamma", v, "of 0 or more") for v in (-1, NAN, INF)),
        *(("tau", v, "above 0") for v in (0, -5, NAN, INF)),
    ],
)
def test_a_weight_out_of_bounds_is_named_with_its_bounds(tiny, name, value, bounds):
    with pytest.raises(ValueError) as e:
        specs.spec("tiny", "cola", **{name: value})
    assert str(e.value) == f"{name} must be a finite number {bounds}, got {value!r}"


@pytest.mark.parametrize(
    "name, value", [("alpha", 0), ("alpha", 1), ("beta", 0), ("gamma", 0), ("tau", 1e-3)]
)
def test_a_weight_at_its_bound_is_valid(tiny, name, value):
    assert getattr(specs.spec("tiny", "cola", **{name: value}), name) == value


@pytest.mark.parametrize("beta", [-1.0, NAN, {"cosine": 1.0, "euclid": -2.0, "elementwise": 1.0}])
def test_a_bad_weight_in_the_profile_is_no_better(tiny, beta):
    path = tiny / "params/profiles/tiny.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["armada"]["paper"]["beta"] = beta
    path.write_text(yaml.safe_dump(raw))
    forget()
    with pytest.raises(ValueError, match="tiny.yaml: armada.paper.beta"):
        specs.spec("tiny", "cola", manifold="euclid")


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_a_seed_is_an_integer(tiny, seed):
    with pytest.raises(ValueError, match=f"^seed must be an integer of 0 or more, got {seed!r}$"):
        specs.spec("tiny", "cola", seed=seed)


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", 0),
        ("student_lr", NAN),
        ("aligner_lr", INF),
        ("batch_size", 2.5),
        ("dropout", -0.1),
        ("split", "test"),
    ],
)
def test_a_bad_training_setting_is_named(tiny, name, value):
    with pytest.raises(ValueError, match=f"^training settings: {name}: [^\n]+$"):
        specs.spec("tiny", "cola", **{name: value})


# -- data --------------------------------------------------------------------------------------


def real(tiny: Path) -> None:
    path = tiny / "params/profiles/tiny.yaml"
    path.write_text(path.read_text().replace("data: mini", "data: real"))
    forget()


@pytest.mark.parametrize(
    "rows, message",
    [
        (dict(train=GOOD), r"validation\.parquet \(or \.jsonl\) not found below ARMADA_DATA"),
        (
            dict(train=GOOD, validation=[r | {"label": -1} for r in GOOD]),
            "cola/validation .*no labels",
        ),
        (
            dict(train=[r | {"label": None} for r in GOOD], validation=GOOD),
            "cola/train .*no labels",
        ),
        (
            dict(train=[*GOOD, {"sentence": " ", "label": 1}], validation=GOOD),
            "row 2: column 'sentence' is empty",
        ),
        (
            dict(train=GOOD, validation=[{"text": "a", "label": 1}]),
            r"missing column\(s\) \['sentence'\]",
        ),
        (
            dict(train=[*GOOD, {"sentence": "a", "label": 2}], validation=GOOD),
            "row 2: label 2 is out of range",
        ),
    ],
)
def test_bad_data_are_refused_with_file_and_row(tiny, tmp_path, monkeypatch, rows, message):
    real(tiny)
    data(tmp_path / "data", monkeypatch, **rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        specs.spec("tiny", "cola", "undistilled")


def test_a_holdout_larger_than_the_data_is_refused(tiny):
    with pytest.raises(ValueError, match="cola: .*a holdout of 500 .*there are 24"):
        specs.spec("tiny", "cola", split="holdout")


def test_a_text_over_the_limit_is_cut_and_said_so(tiny, caplog, monkeypatch):
    monkeypatch.setattr(runs.students, "load", LOAD_STUDENT)
    s = specs.spec("tiny", "cola", "undistilled", max_length=10)
    # 2 + i + 1 words and 2 marks: all texts from i = 6 on are longer than 10
    _, _, train, _, facts = runs.build(s, RunStore())
    assert "CoLA: 18 training and 18 evaluation texts are cut at 10 tokens" in caplog.text
    assert facts["cut"] == 36 and max(train.lengths) == 10


# -- store -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["undistilled", "armada"])
@pytest.mark.parametrize("start", ["run", "study"])
def test_a_store_that_cannot_be_written_to_is_named_first(
    tiny, tmp_path, monkeypatch, method, start
):
    blocked = tmp_path / "file" / "store"  # below a regular file: even root cannot write there
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARMADA_STORE", str(blocked))
    s = specs.spec("tiny", "cola", method)
    with pytest.raises(OSError) as e:
        runs.run(s) if start == "run" else runs.study([s], progress=False)
    assert str(e.value).startswith(f"the store {blocked} cannot be written to")
    assert "set ARMADA_STORE to a writable folder" in str(e.value)


def no_space(*a, **k):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(arrays, path, **k):
    Path(path).write_bytes(b"half of it")
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    "where, what",
    [("save_file", no_space_in_rust), ("save_file", no_space), ("os.fsync", no_space)],
)
def test_a_full_disk_is_named_and_leaves_nothing(store, monkeypatch, where, what):
    s = RunStore()
    s.check()
    monkeypatch.setattr(f"armada_lib.results.{where}", what)
    with pytest.raises(OSError) as e:
        s.save(result())
    assert str(s.runs) in str(e.value) and run_spec().label in str(e.value)
    assert "No space left on device" in str(e.value)
    assert list(s.runs.iterdir()) == []
    monkeypatch.undo()
    assert RunStore(store).load(result().spec.key) is None


def test_a_full_disk_while_the_record_is_written_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError, match="could not be written to .*runs: .*No space left"):
        RunStore().save(result())
    assert list(RunStore().runs.iterdir()) == []


def test_an_error_that_is_no_full_disk_keeps_its_name_and_leaves_nothing(store, monkeypatch):
    r = result()
    r.facts["bad"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        RunStore().save(r)
    assert list(RunStore().runs.iterdir()) == []


# -- what the paper's scale needs --------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No GPU, no network and an empty cache of the hub."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    profiles.hub_revision.cache_clear()
    forget()


@pytest.mark.parametrize("start", ["spec", "grid"])
def test_the_paper_profile_without_a_gpu_names_the_profiles_that_need_none(offline, start):
    with pytest.raises(RuntimeError) as e:
        specs.spec("paper", "cola") if start == "spec" else specs.grid(
            "paper", ["cola"], ["armada"]
        )
    said = str(e.value)
    assert "profile 'paper' needs a CUDA GPU" in said and "ARMADA_NO_GPU=1" in said
    assert "'mini'" in said and "'cpu'" in said


@pytest.mark.parametrize(
    "student, checkpoint",
    [("bert-6l", "google/bert_uncased_L-6_H-768_A-12"), ("opt-1.3b", "facebook/opt-1.3b")],
)
def test_the_paper_profile_without_weights_names_the_command_that_gets_them(
    offline, tmp_path, monkeypatch, student, checkpoint
):
    monkeypatch.setenv("ARMADA_NO_GPU", "1")
    data(tmp_path / "data", monkeypatch, train=GOOD, validation=GOOD)
    with pytest.raises(
        FileNotFoundError, match=f"'{checkpoint}' is neither .*`hf download {checkpoint}`"
    ):
        specs.spec("paper", "cola", student=student)


def test_the_papers_teacher_without_weights_names_the_command_that_gets_them(
    offline, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setenv("ARMADA_NO_GPU", "1")
    data(tmp_path / "data", monkeypatch, train=GOOD, validation=GOOD)
    paper = profiles.load("paper")
    here = paper.model_copy(update={"students": {"bert-6l": checkpoints["bert"]}})
    monkeypatch.setattr(profiles, "load", lambda name: here)
    assert specs.spec("paper", "cola", "undistilled").student_id.startswith("sha256:")
    with pytest.raises(FileNotFoundError, match="`hf download CompVis/stable-diffusion-v1-4`"):
        specs.spec("paper", "cola", "armada")


def test_the_paper_profile_without_data_names_file_variable_and_hub(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("ARMADA_NO_GPU", "1")
    with pytest.raises(
        FileNotFoundError,
        match=r"nyu-mll/glue \(cola, train\).*ARMADA_DATA.*glue/cola/train.parquet",
    ):
        specs.spec("paper", "cola")
