"""Starts: made once from training texts and pictures, kept complete, and where fine-tuning begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_mentors import spoil
from tiny import Killed, killed

from armada_lib import (
    encoding,
    engine,
    evaluation,
    extraction,
    profiles,
    run_data,
    runs,
    specs,
    starts,
)
from armada_lib.batching import Encoded
from armada_lib.files import Damaged
from armada_lib.methods import METHODS, MULTIMODAL, Method
from armada_lib.profiles import Unknown
from armada_lib.results import RunStore
from armada_lib.students import Student
from armada_lib.teacher_settings import AudioSpec, BlackboxSpec, ImageSpec, VideoSpec

STAGED = [n for n, e in METHODS.items() if e.stage]
TINY = {"train_size": 16, "eval_size": 8, "stage_epochs": 2, "epochs": 1}


@pytest.fixture(scope="session")
def gallery_root(root, checkpoints, tmp_path_factory) -> Path:
    """A project with a painter, what plays videos and features, and students of two families."""
    base = tmp_path_factory.mktemp("gallery")
    shutil.copytree(root / "book", base / "book")
    raw = yaml.safe_load((root / "params/profiles/tiny.yaml").read_text())
    raw["students"] = {
        "bert-6l": {"checkpoint": checkpoints["bert"].checkpoint},
        "deberta": {"checkpoint": checkpoints["deberta"].checkpoint},
    }
    painter = raw["teachers"]["sd14"]
    raw["teachers"] |= {
        "film": painter | {"latent": "channel-mean", "width": 16},
        "looks": {"kind": "blackbox", "source": "painter", "painter": painter | {"name": "sd14"},
                  "encoder": "efficientnet-lite0", "width": 1280},
    }  # fmt: skip
    raw["baselines"]["multimodal"] |= {"student": "bert-6l", "video": "film", "frames": "looks"}
    (base / "params/profiles").mkdir(parents=True)
    (base / "params/profiles/gallery.yaml").write_text(yaml.safe_dump(raw))
    bare = raw | {"baselines": {k: v for k, v in raw["baselines"].items() if k != "multimodal"}}
    (base / "params/profiles/bare.yaml").write_text(yaml.safe_dump(bare))
    lost = {k: v for k, v in raw["teachers"].items() if k != "film"}
    (base / "params/profiles/lost.yaml").write_text(yaml.safe_dump(raw | {"teachers": lost}))
    return base


@pytest.fixture
def gallery(gallery_root, monkeypatch):
    monkeypatch.setattr(profiles, "ROOT", gallery_root)
    # every test has runs and starts of its own, but vectors are made once
    monkeypatch.setattr(RunStore, "features", gallery_root / "features")
    for known in (profiles.load, run_data._examples, extraction.load):
        known.cache_clear()
    yield gallery_root
    for known in (profiles.load, run_data._examples, extraction.load):
        known.cache_clear()


def spec(method="visualbert", task="cola", profile="gallery", **kw):
    halves = {"epochs": 2} if method.startswith("x_adapter") else {}
    return specs.spec(profile, task, method, **{**TINY, **halves, **kw})


@pytest.fixture
def no_vectors(gallery, tmp_path, monkeypatch):
    """No teacher has said anything yet."""
    monkeypatch.setattr(RunStore, "features", tmp_path / "none")


def ready(s, store=None) -> Path:
    """The file of the start of `s`, made if it was not there."""
    store = store or RunStore()
    store.check()
    extraction.extract([s], store, progress=False)
    starts.prepare([s], store, progress=False)
    return store.root / "starts" / s.start_id / "start.safetensors"


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(path).items() if k != "facts"}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MULTIMODAL)
def test_every_baseline_with_pictures_runs_and_is_stored(gallery, method):
    s, store = spec(method), RunStore()
    result = runs.run(s)
    assert np.isfinite(result.curves["total"]).all() and set(result.outputs) == {"student"}
    assert "task" in result.curves and store.load(s.key).scores == result.scores
    assert s.student == "bert-6l" and (s.manifold, s.reading) == (None, None)
    assert [s.alpha, s.beta, s.gamma] == [0, 0, 0]
    if method not in STAGED:
        assert "stage" not in result.facts and s.start_id is None
        return
    stage = result.facts["stage"]
    assert stage["epochs"] == 2 and stage["steps"] == 4 and stage["texts"] == 16
    assert stage["parameters"] > 0 and stage["train_seconds"] > 0
    assert stage["losses"]["words"] > 0 and result.facts["method_parameters"] == 0
    assert set(result.curves) == {"task", "total", "grad_student"}  # fine-tuning is undistilled
    assert len(list((store.root / "starts" / s.start_id).iterdir())) == 1


@pytest.mark.parametrize("method", ["vilbert", "img_voken"])
def test_texts_of_a_choice_are_read_one_by_one(gallery, method):
    result = runs.run(spec(method, "copa"))
    assert result.facts["stage"]["texts"] == 32 == 2 * result.facts["train"]


def test_parameters_of_a_stage_are_those_that_it_adds(gallery):
    """Vokenization hangs its heads on the student when it sees the texts; all of it is counted."""
    s = spec("img_voken")
    facts = json.loads(bytes(load_file(ready(s))["facts"].tolist()))
    V = len(load_file(ready(s))["ids"])
    mlp = lambda n: n * 256 + 256 + 256 * 64 + 64
    head = lambda out: 32 * 32 + 32 + 2 * 32 + 32 * out + out
    assert facts["parameters"] == mlp(2 * 32) + mlp(64) + head(16) + (32 * 32 + 32 + 2 * 32 + V)


# -- one start -----------------------------------------------------------------------------------


def test_a_start_is_made_once_and_shared_by_seeds(gallery, monkeypatch):
    made, plain = [], starts._train
    monkeypatch.setattr(starts, "_train", lambda s, *a: (made.append(s), plain(s, *a))[1])
    wanted = [spec(seed=0), spec(seed=1), spec("vlbert", seed=1)]
    found = runs.study(wanted, workers=1, progress=False)
    assert len(made) == 2 and {m.seed for m in made} == {0}
    assert wanted[0].start_id == wanted[1].start_id != wanted[2].start_id
    a, b = (r.outputs["student"] for r in found[:2])
    assert not np.array_equal(a, b)  # heads and order are the seed's


def test_what_makes_a_start_another_one(gallery):
    s = spec()
    for same in ({"seed": 3}, {"student_lr": 5e-4}, {"epochs": 2}, {"select": "best"}):
        assert spec(**same).start_id == s.start_id and spec(**same).key != s.key, same
    for other in ({"mentor_seed": 1}, {"stage_epochs": 3}, {"stage_lr": 1e-4}, {"regions": 4},
                  {"train_size": 12}, {"batch_size": 4}, {"teacher": "film"}):  # fmt: skip
        assert spec(**other).start_id != s.start_id, other
    assert specs.start_of(s).training.student_lr == 1e-3  # the profile's
    usual = {"stage_epochs": None}
    assert specs.start_of(spec(epochs=3, **usual)).training.epochs == 3
    assert specs.start_of(spec(epochs=1, **usual)).training.epochs == 2


def test_old_keys_know_nothing_of_starts(gallery):
    s = specs.spec("gallery", "cola", "undistilled")
    given = s.model_dump(exclude_defaults=True)
    new = {
        "stage_epochs",
        "stage_lr",
        "regions",
        "match_epochs",
        "vokens",
        "first_epochs",
        "text_encoder",
    }
    assert not {"start_id", "stage", "mentor_seed"} & set(given) and not new & set(
        given["training"]
    )


def test_fine_tuning_begins_at_the_start(gallery):
    s = spec()
    kept = weights_of(ready(s))
    student, method, train, held, facts = runs.build(s, RunStore())
    assert type(method) is Method and train.teacher is None and held.teacher is None
    ids, rows = kept.pop("ids"), kept.pop("rows")
    own = dict(student.model.bert.named_parameters())
    table = own.pop("embeddings.word_embeddings.weight")
    assert equal({k: v.detach() for k, v in own.items()}, kept)
    # of the vocabulary, the rows of training texts are the stage's and the others the checkpoint's
    fresh = encoding.student(s)
    before = fresh.model.get_input_embeddings().weight
    place = {int(i): n for n, i in enumerate(ids)}
    unseen = 0
    for n, i in enumerate(student._used.tolist()):
        seen = i in place
        unseen += not seen
        assert torch.equal(table[n], rows[place[i]] if seen else before[i])
    special = {fresh.tokenizer.pad_token_id, fresh.tokenizer.mask_token_id}
    words = {int(i) for t in train.tokens for i in student._used[t.astype(np.int64)]}
    assert set(place) == words | special and unseen > 0
    moved = [
        k
        for k, v in fresh.model.bert.named_parameters()
        if k in kept and not torch.equal(v, kept[k])
    ]
    assert any("layer.0" in k for k in moved) and any("pooler" in k for k in moved)
    assert facts["stage"]["epochs"] == 2


def test_a_stage_reads_no_labels_and_runs_no_student(gallery, monkeypatch):
    s = spec("vidlankd_clip")
    extraction.extract([s], RunStore(), progress=False)
    monkeypatch.setattr(Student, "forward", lambda *a: pytest.fail("the student was called"))
    texts, plain = [], engine.train
    monkeypatch.setattr(engine, "train", lambda *a, **k: (texts.append(a[2]), plain(*a, **k))[1])
    ready(s)
    (seen,) = texts
    assert not seen.labels.any() and len(seen) == len(seen.tokens) == 16
    x = seen.vectors(np.arange(16))  # standardised over the training texts
    torch.testing.assert_close(x.mean(0), torch.zeros(1280), atol=2e-3, rtol=0)
    assert x.std(0, unbiased=False).median() == pytest.approx(1, abs=2e-3)


def test_only_training_texts_are_pictured(gallery, no_vectors):
    s = spec("vid_voken_clip")
    train, held = run_data.examples(s)
    assert run_data.teacher_texts(s) == train.teacher_texts
    runs.run(s)
    known = extraction.feature_store("gallery", "looks", RunStore())
    assert not known.missing(train.teacher_texts)
    assert known.missing(held.teacher_texts) == [
        t for t in held.teacher_texts if t not in set(train.teacher_texts)
    ]


# -- kills, damage, several processes --------------------------------------------------------------


@pytest.mark.parametrize(
    "method, at", [("visualbert", 1), ("vidlankd_resnet", 5), ("img_voken", 6)]
)
def test_a_killed_stage_leaves_nothing_wrong_and_goes_on(
    gallery, tmp_path, monkeypatch, method, at
):
    monkeypatch.setenv("ARMADA_SAVE_EVERY", "0")
    s, taken = spec(method, batch_size=4), []
    monkeypatch.setattr(Method, "after_step", lambda self, step: taken.append(step))
    whole = ready(s, RunStore(tmp_path / "whole"))
    assert taken == list(range(1, 9))
    taken.clear()
    store = RunStore(tmp_path / "killed")
    with killed(monkeypatch, at):
        ready(s, store)
    home = store.root / "starts" / s.start_id
    assert [p.name for p in home.iterdir()] == ["state.safetensors"] and taken[-1] == at
    (home / "left.tmp").write_bytes(b"half")
    again = ready(s, store)
    assert taken == list(range(1, 9)) and equal(weights_of(again), weights_of(whole))
    assert [p.name for p in home.iterdir()] == ["start.safetensors"]
    a, b = (json.loads(bytes(load_file(p)["facts"].tolist())) for p in (again, whole))
    same = {"losses", "steps", "epochs", "parameters", "texts"}
    assert {k: a[k] for k in same} == {k: b[k] for k in same}


@pytest.mark.parametrize("how", ["cut", "changed", "other"])
def test_a_damaged_start_is_found_and_made_again(gallery, how, caplog):
    s = spec()
    path = ready(s)
    good = weights_of(path)
    if how == "other":  # a whole file, of another start
        other = ready(spec("vlbert"))
        spoil(path, other.read_bytes())
    else:
        body = bytearray(path.read_bytes())
        body[-1] ^= 64
        spoil(path, bytes(body) if how == "changed" else bytes(body[:-8]))
    body = path.read_bytes()
    with pytest.raises(Damaged, match=r"start\.safetensors is damaged"):
        starts.begin(encoding.student(s), s, RunStore())
    assert not path.exists()
    path.write_bytes(body)
    assert [x.key for x in starts.lacking([s], RunStore())] == [s.start_id]
    assert "made again" in caplog.text
    assert equal(weights_of(ready(s)), good)


def test_a_start_that_the_profile_no_longer_describes_is_refused(gallery):
    s = spec().model_copy(update={"start_id": "0" * 20})
    with pytest.raises(ValueError, match="make the specification anew"):
        starts.prepare([s], RunStore())


def test_several_processes_need_a_start_that_is_there(gallery):
    class Two:
        num_processes, is_main_process = 2, True

        def wait_for_everyone(self):
            raise Killed  # it came as far as training

    s = spec(processes=2)
    with pytest.raises(
        ValueError, match="its start is not there yet; make it in one process first"
    ):
        runs.run(s, accelerator=Two())
    ready(s)
    with pytest.raises(Killed):
        runs.run(s, accelerator=Two())


# -- what is left, and what is read at test time -----------------------------------------------------


@pytest.mark.parametrize("method", ["vilbert", "vid_voken_resnet", "vidlankd_resnet"])
def test_a_student_after_a_stage_is_a_plain_checkpoint(gallery, tmp_path, method):
    from transformers import AutoModelForSequenceClassification

    s = spec(method)
    student = runs.trained_student(s).eval()
    assert not any(hasattr(student, n) for n in ("stage", "guide", "adapters"))
    student.save_pretrained(tmp_path / "student")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    texts = student.tokenizer(run_data.examples(s)[1].first, return_tensors="pt", padding=True)
    student.model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(student(texts).logits, plain(**texts).logits)


def test_adapters_are_refused_and_a_guide_is_saved_beside_the_checkpoint(gallery, tmp_path):
    with pytest.raises(ValueError, match="a plain checkpoint has no place for them"):
        runs.trained_student(spec("x_adapter")).save_pretrained(tmp_path / "a")
    runs.trained_student(spec("visual_guidance")).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "guidance.safetensors").is_file()


def predicted(s, blind: bool) -> np.ndarray:
    """Predictions of a trained student, `blind`: with no vectors of the evaluated texts."""
    student, method, train, held, _ = runs.build(s, RunStore())
    engine.train(student, method, train, s.training, s.seed)
    if blind:
        held = Encoded(held.tokens, held.types, held.labels, held.per_example, held.pad)
    return evaluation.predict(student, method, held, False)["student"]


@pytest.mark.parametrize("method", ["visual_guidance", "x_adapter"])
def test_predictions_need_no_picture_of_the_evaluated_texts(gallery, no_vectors, method):
    s = spec(method, teacher="sd14")
    extraction.extract([s], RunStore(), progress=False)
    np.testing.assert_array_equal(predicted(s, True), predicted(s, False))
    if method == "x_adapter":  # nor of any text
        assert s.teacher is None and not list(RunStore().features.glob("*"))


def test_the_v_expert_reads_pictures_of_the_evaluated_texts(gallery, no_vectors):
    s = spec("x_adapter_pictures")
    extraction.extract([s], RunStore(), progress=False)
    with pytest.raises(ValueError, match="the V-expert reads pictures; the texts have none"):
        predicted(s, True)
    one = predicted(s, False)
    known = extraction.feature_store("gallery", "sd14", RunStore())
    assert not known.missing(run_data.examples(s)[1].teacher_texts) and np.isfinite(one).all()


def test_masks_keep_their_row_where_words_are_masked_and_nowhere_else(gallery):
    fresh = encoding.student(spec())
    mask, table = fresh.tokenizer.mask_token_id, fresh.model.get_input_embeddings().weight
    student = runs.build(spec("x_adapter"), RunStore())[0]
    own = student.model.get_input_embeddings().weight
    assert torch.equal(own[student.mask_id], table[mask])
    student = runs.build(spec("undistilled"), RunStore())[0]
    assert student.mask_id is None and mask not in student._used


def test_a_text_encoder_is_part_of_what_a_run_is(gallery, checkpoints, monkeypatch):
    own, other = spec("x_adapter"), spec("x_adapter", text_encoder=checkpoints["bert"].checkpoint)
    assert own.teacher_id is None and own.key != other.key
    assert other.teacher is None
    assert other.teacher_id == profiles.identity(checkpoints["bert"].checkpoint)
    assert np.isfinite(runs.run(other).curves["total"]).all()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="some/encoder"):
        spec("x_adapter", text_encoder="some/encoder")


# -- one clear error -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(method="vilber"), "unknown method 'vilber'; did you mean 'vilbert'.*x_adapter_pictures"),
        (dict(method="vid_voken_resnet", profile="lost"), "unknown teacher of vid_voken_resnet .*'film'.*sd14"),
        (dict(method="vidlankd_clip", profile="bare"), "no block `multimodal` in `baselines`.*vidlankd_clip"),
        (dict(student="deberta"), "unknown architecture of deberta .*'deberta-v2'.*bert"),
        (dict(method="x_adapter", student="deberta"), "unknown architecture of deberta"),
        (dict(regions=5), "a picture of 4 x 4 cannot be cut into 5 equal squares; valid: 1, 4, 16"),
        (dict(method="x_adapter_pictures", epochs=2, regions=9), "cannot be cut into 9 equal squares"),
        (dict(method="img_voken", stage_epochs=1), "stage_epochs must be at least 2"),
        (dict(method="img_voken", match_epochs=2), "2 of 2 epochs leave none"),
        (dict(method="vidlankd_clip", first_epochs=2), "first_epochs must be 1 to 1"),
        (dict(method="x_adapter", epochs=1), "x_adapter learns in two parts; of 1 epochs"),
        (dict(beta=0.3), "visualbert does not use beta: it has no weights"),
        (dict(method="x_adapter", epochs=2, tau=2.0), "x_adapter does not use tau"),
        (dict(task="commonsense", student="bert-6l"), "unknown method for commonsense 'visualbert'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_work(gallery, monkeypatch, given, words):
    for module, name in ((extraction.teachers, "load"), (engine, "train")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("work was started"))
    with pytest.raises((Unknown, ValueError), match=words):
        spec(**given)


def test_channels_are_those_of_the_picture_that_a_vector_is():
    image = dict(name="a", checkpoint="b", width=64, size=8)
    assert ImageSpec(**image).channels == 4 == ImageSpec(**image, latent="full").channels
    assert ImageSpec(**image, latent="channel-mean").channels == 1
    video = dict(name="a", checkpoint="b", width=64)
    assert VideoSpec(**video).channels == 1 and VideoSpec(**video, project=True).channels is None
    assert VideoSpec(**video, readout="first-latent").channels == 4
    assert VideoSpec(**video, readout="latents").channels is None
    looks = dict(name="a", width=64, encoder="c", source="folder", folder="d")
    assert BlackboxSpec(**looks).channels is None
    assert AudioSpec(name="a", width=64, checkpoint="b", encoder="log-mel").channels is None


@pytest.mark.parametrize("name", ["mini", "cpu", "paper", "smoke"])
def test_table_8_of_every_profile_is_complete(name):
    p = profiles.load(name)
    block = p.baselines.multimodal
    assert p.student(block.student).stands_for and set(block.tasks) <= set(run_data.TASKS)
    assert {p.teacher(block.video).kind, p.teacher(block.frames).kind} == {"video", "blackbox"}
    assert {"undistilled", "armada"} < set(block.methods) <= {*METHODS}
    assert set(block.methods) - {"undistilled", "armada"} <= set(MULTIMODAL)
