"""MM-IMDb: several labels an example, from the files to the loss, the scores and the tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import f1_score
from test_results import result, run_spec
from tiny import alike, killed_and_resumed, mentor_checkpoint, rows, same, setting, weights

from armada_lib import (
    chapter,
    engine,
    evaluation,
    examples,
    films,
    losses,
    plans,
    profiles,
    report,
    results,
    run_data,
    runs,
    specs,
    students,
)
from armada_lib.methods import METHODS
from armada_lib.methods.base import LOSS
from armada_lib.methods.metadistil import Seen, objective
from armada_lib.methods.mutual import divergence
from armada_lib.profiles import Training
from armada_lib.results import RunStore

C = 5
ROOT = profiles.ROOT


def several(n: int, seed: int = 0, labels: int = C, share: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, labels)) < share).astype(np.float32)


def noise(n: int, seed: int = 1, labels: int = C) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, labels)).astype(np.float32)


# -- films: the text of a teacher, the archive --------------------------------------------------


@pytest.mark.parametrize(
    "plot, said",
    [
        ("A man runs away. He comes back.", "A man runs away."),
        ("Dr. No meets Mr. Smith in St. Ives. They talk.", "Dr. No meets Mr. Smith in St. Ives."),
        ("The U.S. Navy sends J. Doe home. He sails.", "The U.S. Navy sends J. Doe home."),
        ("It is 1941. A spy lands in Lisbon. He hides.", "It is 1941. A spy lands in Lisbon."),
        ("He changes her view of him.Two rivals meet.", "He changes her view of him."),
        ('"Who is it who calls?" he asks. Silence.', '"Who is it who calls?"'),
        ("Wait! What is that over there? It moves.", "Wait! What is that over there?"),
        ("a plot without an end", "a plot without an end"),
        ("  Three old friends meet again.  ", "Three old friends meet again."),
        ("He paid 3.50 for the map. It was wrong.", "He paid 3.50 for the map."),
        ("Rome.", "Rome."),
    ],
)
def test_a_teacher_is_told_the_first_sentence(plot, said):
    assert films.opening(plot) == said


def test_the_genres_are_those_of_the_table():
    assert len(films.GENRES) == len(set(films.GENRES)) == 23
    assert list(films.GENRES) == sorted(films.GENRES)


@pytest.fixture
def archive(tmp_path) -> Path:
    """An archive as MM-IMDb's authors give it out, of six films."""
    home = tmp_path / "mmimdb"
    (home / "dataset").mkdir(parents=True)
    of = {
        "0001": (["Brief.", "A longer plot about a ship. It sinks."], ["Drama", "News"]),
        "0002": (["A dog finds the way home. It rains."], ["Family", "Animation"]),
        "0003": (["The news of the day is read out. Twice."], ["News"]),
        "0004": (["A dog finds the way home. It snows."], ["War"]),
        "0005": (["Two cooks open an inn together. One leaves."], ["Comedy"]),
        "0006": (["A thief returns a stolen painting. Nobody asks."], ["Crime"]),
    }
    for number, (plots, genres) in of.items():
        body = {"plot": plots, "genres": genres, "title": "t"}
        (home / "dataset" / f"{number}.json").write_text(json.dumps(body))
        (home / "dataset" / f"{number}.jpeg").write_bytes(b"jpeg")
    split = {"train": ["0001", "0002", "0003", "0004"], "dev": ["0005"], "test": ["0006"]}
    (home / "split.json").write_text(json.dumps(split))
    return home


def test_the_authors_archive_becomes_files_that_are_read(archive, tmp_path, monkeypatch, caplog):
    data = tmp_path / "data"
    done = subprocess.run(
        [sys.executable, "-m", "armada_lib", "films", str(archive), "--data", str(data)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "train: 3 films; validation: 1 films; test: 1 films" in done.stdout
    assert "1 films open as another does" in done.stderr
    assert f"ARMADA_POSTERS={archive}" in done.stdout
    monkeypatch.setenv("ARMADA_DATA", str(data))
    e = examples.load("mmimdb", "train", "real")
    assert e.first[0] == "A longer plot about a ship. It sinks."  # the longest plot
    assert e.labels.sum() == 4 and e.labels[0, films.GENRES.index("Drama")] == 1
    assert examples.load("mmimdb", "validation", "real").labels.sum() == 1

    from armada_lib.teachers.collection import Collection

    known = Collection(archive)
    assert known.missing(e.teacher_texts) == []
    assert known.path(e.teacher_texts[0]).name == "0001.jpeg"
    assert known.path(e.teacher_texts[2]).name == "0002.jpeg"  # of two that open alike the first


@pytest.mark.parametrize("gone", ["split.json", "dataset/0002.json", "dataset/0005.jpeg"])
def test_an_incomplete_archive_is_named(archive, tmp_path, gone):
    (archive / gone).unlink()
    with pytest.raises(FileNotFoundError, match=gone):
        films.convert(archive, tmp_path / "data")
    assert not (archive / "index.csv").exists()


# -- the task ----------------------------------------------------------------------------------


@pytest.fixture
def put(tmp_path, monkeypatch):
    monkeypatch.setenv("ARMADA_DATA", str(tmp_path / "data"))

    def write(found: list[dict], split: str = "train") -> None:
        path = tmp_path / "data" / "mmimdb" / "mmimdb" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in found))

    return write


def film(n: int = 0, genres=("Drama",), end: str = "End.") -> dict:
    return {"plot": f"A film of number {n} begins. {end}", "genres": list(genres)}


def test_a_row_becomes_a_plot_its_opening_and_a_row_of_labels(put):
    put([film(0, ["Western", "Action"]), film(1)])
    e = examples.load("mmimdb", "train", "real")
    assert (e.task.kind, e.task.outputs, e.per_example, e.second) == ("multilabel", 23, 1, None)
    assert e.first == ["A film of number 0 begins. End.", "A film of number 1 begins. End."]
    assert e.teacher_texts == ["A film of number 0 begins.", "A film of number 1 begins."]
    assert e.labels.shape == (2, 23) and e.labels.dtype == np.float32
    assert np.flatnonzero(e.labels[0]).tolist() == [0, 22]
    part = e.take(np.array([1]))
    assert part.labels.shape == (1, 23) and part.teacher_texts == e.teacher_texts[1:]
    share = np.full(23, 0.5 / 3)
    share[[0, 7, 22]] = 1.5 / 3
    np.testing.assert_allclose(e.start, np.log(share / (1 - share)))


@pytest.mark.parametrize("wrong", [["Opera"], [], None, "Drama", ["Drama", 3], 1])
def test_a_genre_that_does_not_exist_is_named_with_its_row(put, wrong):
    put([film(0), film(1) | {"genres": wrong}])
    with pytest.raises(ValueError, match="row 1: genres .* is out of range; MM-IMDb takes") as e:
        examples.load("mmimdb", "train", "real")
    assert "Film-Noir" in str(e.value)


@pytest.mark.parametrize("wrong", [[], None])
def test_an_unlabelled_split_is_refused(put, wrong):
    put([film(0) | {"genres": wrong}] * 2)
    with pytest.raises(ValueError, match="this split has no labels"):
        examples.load("mmimdb", "train", "real")


def test_without_files_the_message_says_how_to_make_them(put, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"train\.parquet .*python -m armada_lib films"):
        examples.load("mmimdb", "train", "real")
    monkeypatch.delenv("ARMADA_DATA")
    with pytest.raises(FileNotFoundError, match="ARMADA_DATA .*python -m armada_lib films"):
        examples.load("mmimdb", "train", "real")


def test_the_digest_covers_labels_and_what_the_teacher_is_told(put, monkeypatch):
    def digest() -> str:
        return examples.load("mmimdb", "train", "real").digest

    put([film(0), film(1)])
    found = [digest()]
    put([film(0), film(1, ["War"])])
    found.append(digest())
    monkeypatch.setattr(films, "opening", lambda plot: plot[:9])
    found.append(digest())
    assert len(set(found)) == 3


# -- metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_f1_is_that_of_scikit_learn(seed, threshold):
    gold, out = several(60, seed), noise(60, seed + 10)
    said = 1 / (1 + np.exp(-out.astype(float))) >= threshold
    for average in ("micro", "macro"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = evaluation.metric(f"{average}_f1", out, gold, threshold)
        expected = 100 * f1_score(gold.astype(int), said.astype(int), average=average)
        assert found == pytest.approx(expected) and 2 < expected < 95


def test_f1_of_an_example_done_by_hand():
    gold = np.float32([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    out = np.float32([[2, 1, -1], [-1, 1, -1], [-1, 1, -1], [-9, -9, -9]])
    # label 0: 1 hit, 1 miss -> 2/3; label 1: 2 hits, 1 false -> 4/5; label 2: never there -> 0
    assert evaluation.metric("macro_f1", out, gold) == pytest.approx(100 * (2 / 3 + 4 / 5) / 3)
    # together 3 hits, 1 miss, 1 false alarm
    assert evaluation.metric("micro_f1", out, gold) == pytest.approx(75)


def test_the_threshold_itself_counts_as_yes():
    gold = np.float32([[1, 1]])
    assert evaluation.metric("micro_f1", np.float32([[0, 0]]), gold) == 100
    assert evaluation.metric("micro_f1", np.float32([[-1e-6, -1e-6]]), gold) == 0
    assert evaluation.metric("micro_f1", np.float32([[-1e-6, 1]]), gold, 0.4) == 100


def test_nothing_predicted_is_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("micro_f1", "macro_f1"):
            assert evaluation.metric(name, np.full((9, C), -3, np.float32), several(9)) == 0


def test_a_model_that_says_one_set_only_is_flagged():
    gold = several(400)
    constant = np.tile(np.float32([2, -2, 2, -2, -2]), (400, 1))
    found = evaluation.behaviour(constant, gold)
    assert found["collapsed"] and found["majority_share"] == 1 and found["said"] == 2
    assert found["gold"] == pytest.approx(gold.sum(1).mean()) and json.dumps(found)
    sets = {tuple(row) for row in gold.tolist()}
    most = max(sum(tuple(r) == s for r in gold.tolist()) for s in sets)
    assert found["gold_majority"] == most / 400
    varied = constant.copy()
    varied[:3, 0] = -2  # 1 % of the examples differ
    assert not evaluation.behaviour(varied, gold)["collapsed"]
    varied[1:3, 0] = 2
    assert evaluation.behaviour(varied, gold)["collapsed"]
    # another threshold sees other sets in the same outputs
    between = np.where(gold > 0, 0.5, -0.5).astype(np.float32)
    assert not evaluation.behaviour(between, gold)["collapsed"]
    assert evaluation.behaviour(between, gold, 0.9)["collapsed"]


# -- losses ------------------------------------------------------------------------------------


def given(training=None, **kw):
    s = setting("class", training=training, **kw)
    return replace(s, kind="multilabel", outputs=C, label_mean=tuple([-1.0] * C))


def encoded(student, n=32, seed=0):
    data = rows(student, n, seed)
    knows = data.teacher[:, 0] > 1.5
    y = several(n, seed)
    y[:, 0] = [float(k) for k in knows]
    data.labels = torch.from_numpy(y)
    return data


@pytest.fixture
def pupil(checkpoints):
    return students.load(checkpoints["bert"], C, 0, dropout=0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def test_the_loss_is_binary_cross_entropy_over_labels_and_examples(pupil):
    method = METHODS["undistilled"].build(given(), pupil)
    out, y = noise(8), several(8)
    p = sigmoid(out)
    expected = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    assert method.task(torch.from_numpy(out), torch.from_numpy(y)).item() == pytest.approx(expected)
    assert LOSS["multilabel"] == "bce" and method.phi is losses.sigmoid


def test_armadas_terms_are_their_formulas(pupil):
    method = METHODS["armada"].build(given(alpha=0.3, beta=0.2, gamma=0.7), pupil)
    data = encoded(pupil)
    batch = data.batch(np.arange(6), pupil.packs)
    out = pupil(batch.inputs)
    terms = method.losses(batch, out, "joint", losses.mean_row)
    t = method.aligner(batch.teacher)
    y, get = batch.labels.numpy(), lambda x: x.detach().numpy().astype(float)

    def bce(o):
        p = sigmoid(get(o))
        return -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))

    def matched(a, b):  # D of Eq. 2 with Phi = sigmoid
        gap = sigmoid(get(a) / 5) - sigmoid(get(b) / 5)
        return np.mean(np.sqrt((gap**2).sum(1)))

    expected = {
        "aligner_task": bce(t.logits), "aligner_aux": 0.7 * bce(t.aux_logits),
        "task": 0.7 * bce(out.logits), "aux_task": 0.7 * 0.7 * bce(out.aux_logits),
        "soft": 0.3 * matched(t.logits, out.logits),
        "aux_soft": 0.7 * 0.3 * matched(t.aux_logits, out.aux_logits),
        "manifold": 0.2 * np.linalg.norm(get(t.projection).mean(0) - get(out.projection).mean(0)),
    }  # fmt: skip
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name


def test_gradients_stay_on_their_side(pupil):
    method = METHODS["armada"].build(given(), pupil)
    batch = encoded(pupil).batch(np.arange(8), pupil.packs)
    terms = method.losses(batch, pupil(batch.inputs), "joint", losses.mean_row)
    aligner, own = list(method.aligner.parameters()), list(pupil.parameters())
    reach = lambda loss, ps: [
        g is not None and bool(g.abs().sum())
        for g in torch.autograd.grad(loss, ps, retain_graph=True, allow_unused=True)
    ]
    for name, term in terms.items():
        if name.startswith("aligner"):
            assert any(reach(term, aligner)) and not any(reach(term, own)), name
        else:
            assert any(reach(term, own)) and not any(reach(term, aligner)), name
    # every label's own head row is reached, by its own labels alone
    head = pupil.family.head(pupil.model)
    grad = torch.autograd.grad(terms["task"], head.bias, retain_graph=True)[0]
    assert head.bias.shape == (C,) and (grad != 0).all()


def test_heads_start_at_the_labels_log_odds(pupil):
    start = (-2.0, -1.0, 0.0, 1.0, 2.0)
    method = METHODS["armada"].build(replace(given(), label_mean=start), pupil)
    heads = [pupil.family.head(pupil.model), pupil.branch["aux_head"], method.aligner.output_head,
             method.aligner.aux_head]  # fmt: skip
    for head in heads:
        assert head.bias.tolist() == list(start)


@pytest.mark.parametrize("soft", ["norm", "squared", "frobenius", "kl", "mse"])
def test_every_soft_loss_has_its_least_value_where_aligner_and_student_agree(pupil, soft):
    method = METHODS["armada"].build(given({"soft": soft}), pupil)
    a, b = (torch.from_numpy(noise(6, s)) for s in (1, 2))
    equal, apart = method._match(a, a.clone()), method._match(a, b)
    assert equal.item() < 1e-5 < apart.item()
    near, there = sigmoid(a / 5), sigmoid(b / 5)
    expected = {
        "norm": np.mean(np.sqrt(((near - there) ** 2).sum(1))),
        "squared": np.mean(((near - there) ** 2).sum(1)),
        "frobenius": np.sqrt(((near - there) ** 2).sum()),
        "mse": 25 * np.mean((near - there) ** 2),
        "kl": 25 * np.mean((near * np.log(near / there)
                            + (1 - near) * np.log((1 - near) / (1 - there))).sum(1)),
    }[soft]  # fmt: skip
    assert apart.item() == pytest.approx(expected, rel=1e-4)


def binary_kl(a, b, tau=1.0):
    p, q = sigmoid(np.asarray(a) / tau), sigmoid(np.asarray(b) / tau)
    return tau**2 * np.mean((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1))


class Said:
    """A mentor of which the logits alone are asked."""

    def __init__(self, logits):
        self.logits = torch.from_numpy(logits)


def test_the_baselines_ask_a_question_a_label(pupil):
    """KD, mutual learning and MetaDistil with sigmoid in the place of softmax."""
    t, z, y = noise(8, 3), noise(8, 4), several(8)
    kd = METHODS["kd"].build(replace(given(alpha=0.4), tau=2.0, mentor=Said(t)), pupil)
    found = kd.soft(*map(torch.from_numpy, (t, z)))
    assert found.item() == pytest.approx(binary_kl(t, z, 2.0), rel=1e-4)
    pull = divergence(torch.from_numpy(t), torch.from_numpy(z), "multilabel")
    assert pull.item() == pytest.approx(binary_kl(t, z), rel=1e-4)
    s = replace(given(alpha=0.5), tau=2.0)
    own, taught = (Seen(torch.from_numpy(x), None) for x in (z, t))
    counts = torch.tensor([1.0] * 4 + [0.0] * 4)
    terms = objective(own, taught, torch.from_numpy(y), counts, s)
    p = sigmoid(z[:4])
    bce = -np.mean(y[:4] * np.log(p) + (1 - y[:4]) * np.log(1 - p))
    gap = 4 * np.mean((sigmoid(z[:4] / 2) - sigmoid(t[:4] / 2)) ** 2)
    assert terms["task"].item() == pytest.approx(0.5 * bce, rel=1e-4)
    assert terms["soft"].item() == pytest.approx(0.5 * gap, rel=1e-4)


# -- training ----------------------------------------------------------------------------------


def train(checkpoints, method="armada", name="bert", n=32, **kw):
    s = given(**kw)
    student = students.load(checkpoints[name], C, s.seed, dropout=s.training.dropout)
    m = METHODS[method].build(s, student)
    data = encoded(student, n)
    return student, m, engine.train(student, m, data, s.training, s.seed), data


@pytest.mark.parametrize("reading", ["paper", "released"])
def test_it_learns(checkpoints, reading):
    options = {"epochs": 25, "student_lr": 3e-3, "dropout": 0.0}
    student, m, trained, data = train(checkpoints, reading=reading, training=options)
    task = trained.curves["task"][np.isfinite(trained.curves["task"])]
    assert task[-4:].mean() < 0.7 * task[:4].mean()
    out = evaluation.predict(student, m, data, bf16=False)
    assert set(out) == {"student", "student_aux", "aligner", "aligner_aux"}
    assert all(x.shape == (32, C) for x in out.values())
    assert evaluation.metric("micro_f1", out["student"], data.labels.numpy()) > 75
    first = evaluation.metric("micro_f1", out["aligner"][:, :1], data.labels.numpy()[:, :1])
    assert first > 90  # what the teacher's vector knows


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_all_weights_zero_is_undistilled_bit_for_bit(checkpoints, name):
    zero = dict(alpha=0, beta=0, gamma=0)
    plain = train(checkpoints, "undistilled", name, **zero)[0]
    armada = train(checkpoints, "armada", name, **zero)[0]
    other = train(checkpoints, "armada", name)[0]
    assert same(weights(plain.model), weights(armada.model))
    assert not same(weights(plain.model), weights(other.model))


def test_a_killed_run_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path):
    def build():
        student = students.load(checkpoints["bert"], C, 0)
        return student, METHODS["armada"].build(given({"epochs": 3}), student), encoded(student)

    alike(*killed_and_resumed(build, monkeypatch, tmp_path / "state.safetensors", at=5))


# -- results -----------------------------------------------------------------------------------


def scored(spec, seed=0, n=30) -> results.Result:
    r = result(spec, seed, n)
    gold = several(n, 99, 23, 0.1)
    r.labels, r.metric = gold, "micro_f1"
    r.outputs = {h: noise(n, seed + i, 23) + 2 * gold - 2 for i, h in enumerate(r.outputs)}
    of = lambda m: {h: evaluation.metric(m, o, gold) for h, o in r.outputs.items()}
    r.scores, r.facts["also"] = of("micro_f1"), {"macro_f1": of("macro_f1")}
    r.facts |= {"evaluation": n, "behaviour": evaluation.behaviour(r.outputs["student"], gold)}
    r.environment |= {"torch": "t", "cpu": "c"}
    return r


def test_a_result_is_stored_and_its_record_holds_the_labels(store, tmp_path):
    RunStore().save(scored(run_spec(task="mmimdb")))
    r = RunStore().load(run_spec(task="mmimdb").key)
    assert r.labels.shape == (30, 23) and r.predictions().dtype == bool
    results.export([r], tmp_path / "e.jsonl")
    (record,) = results.read(tmp_path / "e.jsonl")
    said = np.zeros((30, 23), int)
    for i, numbers in enumerate(record["predictions"]):
        said[i, numbers] = 1
    gold = r.labels.astype(int)
    for metric, own in (("micro", r.score), ("macro", r.facts["also"]["macro_f1"]["student"])):
        assert 100 * f1_score(gold, said, average=metric, zero_division=0) == pytest.approx(own)
    strict = run_spec(task="mmimdb", training=Training(threshold=0.9))
    assert replace(r, spec=strict).predictions().sum() < r.predictions().sum()


def test_both_metrics_make_tables_beside_the_papers(monkeypatch):
    usual = profiles.load("mini").armada["paper"].of("euclid", "mmimdb")
    base = {"task": "mmimdb", "student": "bert-base", "teacher": "posters", "beta": usual}
    alone = base | {
        "method": "undistilled",
        "teacher": None,
        "manifold": None,
        "reading": None,
        "beta": 0.0,
    }
    found = [scored(run_spec(**kind, seed=s), seed=10 * s + i)
             for s in range(3) for i, kind in enumerate((alone, base))]  # fmt: skip
    frames = {m: report.table(found, m) for m in ("micro_f1", "macro_f1")}
    assert report.table(found).equals(frames["micro_f1"])
    printed = chapter.published(9)
    for metric, wanted in (
        ("micro_f1", ("64.9", "66.2", "+1.3")),
        ("macro_f1", ("48.1", "48.9", "+0.8")),
    ):
        assert set(frames[metric]["metric"]) == {metric}
        out = report.scores(frames[metric], printed[printed["metric"] == metric])
        out = out.set_index("trained as")
        assert out.loc["undistilled", "published"] == wanted[0]
        assert out.loc["ARMADA Euclid", "published"] == wanted[1]
        assert out.loc["ARMADA Euclid", "published gain"] == wanted[2]
        own = np.mean([(r.scores if metric == "micro_f1" else r.facts["also"][metric])["student"]
                       for r in found if r.spec.method == "armada"])  # fmt: skip
        assert out.loc["ARMADA Euclid", "measured"].startswith(f"{own:.1f}")
    outcome, text = report.judge(frames["macro_f1"], ["ARMADA Euclid"])
    assert outcome == "undecided" and "shuffled teacher" in text
    with pytest.raises(ValueError, match="has no f2; its metrics are micro_f1, macro_f1"):
        report.table(found, "f2")


# -- from names to tables ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def cinema_root(root, checkpoints, tmp_path_factory) -> Path:
    """A project with a few films; a mentor of four layers, an assistant of three, a student of two."""
    base = tmp_path_factory.mktemp("cinema")
    (base / "book/data/mini/mmimdb/mmimdb").mkdir(parents=True)
    for split in ("train", "validation"):
        lines = (ROOT / f"book/data/mini/mmimdb/mmimdb/{split}.jsonl").read_text().splitlines()
        path = base / f"book/data/mini/mmimdb/mmimdb/{split}.jsonl"
        path.write_text("\n".join(lines[:24]))
    big = mentor_checkpoint(checkpoints["bert"].checkpoint, base / "big")
    raw = yaml.safe_load((root / "params/profiles/tiny.yaml").read_text())
    raw["students"] = {
        "bert-6l": {"checkpoint": checkpoints["bert"].checkpoint},
        "bert-base": {"checkpoint": big},
        "middle": {"checkpoint": big, "layers": [0, 1, 3]},
        "little": {"checkpoint": big, "layers": [1, 3]},
    }
    painter = {**raw["teachers"]["sd14"], "name": "sd14"}
    raw["teachers"]["posters"] = {"kind": "blackbox", "source": "painter", "painter": painter,
                                  "encoder": "efficientnet-lite0", "width": 1280}  # fmt: skip
    raw["baselines"] |= {"student": "little", "mentor": "bert-base", "assistant": "middle"}
    raw["training"] = {"default": {"epochs": 1, "batch_size": 8, "student_lr": 1e-3, "precision": "fp32",
                                   "train_size": 16, "eval_size": 8}}  # fmt: skip
    (base / "params/profiles").mkdir(parents=True)
    (base / "params/profiles/cinema.yaml").write_text(yaml.safe_dump(raw))
    shutil.copytree(ROOT / "book/published", base / "book/published")
    return base


@pytest.fixture
def cinema(cinema_root, monkeypatch):
    monkeypatch.setattr(profiles, "ROOT", cinema_root)
    for known in (profiles.load, run_data._examples):
        known.cache_clear()
    yield cinema_root
    for known in (profiles.load, run_data._examples):
        known.cache_clear()


def test_posters_reach_the_aligner_and_plots_the_student(cinema):
    s = specs.spec("cinema", "mmimdb", "armada", "bert-base", "posters")
    r = runs.run(s)
    assert set(r.scores) == set(r.facts["also"]["macro_f1"]) == set(r.outputs)
    assert set(r.scores) == {"student", "student_aux", "aligner", "aligner_aux"}
    assert all(o.shape == (8, 23) for o in r.outputs.values()) and r.labels.shape == (8, 23)
    train, held = run_data.examples(s)
    from armada_lib.extraction import feature_store

    known = feature_store("cinema", "posters", RunStore())
    assert known.missing(train.teacher_texts + held.teacher_texts) == []
    assert known.missing(train.first) == train.first  # no whole plot was painted
    trained = runs.trained_student(s)
    assert trained.labels == films.GENRES


def test_a_trained_student_is_saved_with_its_genres(cinema, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    s = specs.spec("cinema", "mmimdb", "undistilled", "bert-base")
    runs.trained_student(s).save_pretrained(tmp_path / "student")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label[7] == "Drama" and model.config.label2id["Western"] == 22
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    _, held = run_data.examples(s)
    with torch.no_grad():
        inputs = tokenizer(
            held.first, padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        logits = model(**inputs).logits.numpy()
    np.testing.assert_allclose(logits, runs.run(s).outputs["student"], atol=1e-4)


# `sftn` makes its own `sftn_mentor`; `seqkd` is for students that generate
WITH_A_MENTOR = [m for m, e in METHODS.items() if e.mentor and m not in ("seqkd", "sftn_mentor")]
CONTROLS = ["shuffled", "random", "constant", "layers_only", "frozen_aligner"]


@pytest.mark.parametrize("reading", ["paper", "released"])
def test_armada_and_its_controls_run_end_to_end(cinema, reading):
    chosen = specs.grid("cinema", ["mmimdb"], ["undistilled", "armada", *CONTROLS],
                        readings=(reading,), teacher="sd14", student="bert-6l")  # fmt: skip
    found = runs.study(chosen, workers=1, progress=False)
    assert len(found) == 1 + 3 + len(CONTROLS)
    for r in found:
        assert np.isfinite(r.outputs["student"]).all() and r.facts["steps"] >= 2
    assert len(report.scores(report.table(found, "macro_f1"))) == len(found)


def test_the_baselines_with_a_mentor_run_end_to_end(cinema):
    chosen = [specs.spec("cinema", "mmimdb", m) for m in WITH_A_MENTOR]
    for r in runs.study(chosen, workers=1, progress=False):
        assert np.isfinite(r.outputs["student"]).all(), r.spec.label
        assert np.isfinite(r.curves["total"]).any(), r.spec.label


def asked(**changed):
    base = dict.fromkeys(
        ("profile", "teacher", "student", "methods", "manifold", "reading", "seeds"), "auto"
    )
    none = dict.fromkeys(("threshold", "alpha", "beta", "gamma", "tau", "workers"))
    return base | none | {"keep": "", "profile": "mini"} | changed


def test_the_chapters_plan_is_the_profiles(monkeypatch):
    monkeypatch.setattr(runs, "compute", lambda *a, **k: pytest.fail("work was started"))
    plan = plans.multimodal(asked())
    block = profiles.load("mini").multimodal
    assert plan.teachers == ["posters"] and plan.students == [block.student]
    assert {s.method for s in plan.specs} == set(block.methods)
    assert {s.task for s in plan.specs} == {"mmimdb"} and {s.seed for s in plan.specs} == set(
        block.seeds
    )
    assert {s.manifold for s in plan.specs if s.method == "armada"} == set(block.manifolds)
    other = plans.multimodal(asked(teacher="sd14", threshold=0.3, seeds="5", methods="armada"))
    assert {s.training.threshold for s in other.specs} == {0.3}
    assert {s.teacher for s in other.specs} == {"sd14", None}
    assert "posters of films" in plan.said and "first sentence" in plan.said


def test_a_task_may_have_a_beta_of_its_own_which_is_its_usual_one():
    own = profiles.Weights(beta={"cosine": 1, "euclid": 2, "elementwise": 3}, tasks={"mmimdb": 0.5})
    assert (own.of("euclid"), own.of("euclid", "cola"), own.of("euclid", "mmimdb")) == (2, 2, 0.5)
    own = profiles.Weights(tasks={"mmimdb": {"cosine": 1, "euclid": 2, "elementwise": 3}})
    assert (own.of("cosine"), own.of("elementwise", "mmimdb")) == (1, 3)
    usual = profiles.load("mini").armada["paper"]
    assert usual.of("euclid") != usual.of("euclid", "mmimdb")
    make = lambda task, **kw: specs.spec("mini", task, "armada", teacher="posters", **kw)
    films_, sentences = make("mmimdb"), make("cola")
    assert films_.beta == usual.of("euclid", "mmimdb") and sentences.beta == usual.of("euclid")
    record = {"metric": "micro_f1", "scores": {"student": 1.0}, "facts": {
        "behaviour": {"collapsed": False}, "evaluation": 9, "seconds": 1.0}}  # fmt: skip
    arms = [report.arms(report.table([record | {"spec": s}]))["arm"].item()
            for s in (films_, sentences, make("mmimdb", beta=usual.of("euclid")))]  # fmt: skip
    assert arms == ["ARMADA Euclid", "ARMADA Euclid", f"ARMADA Euclid (β = {sentences.beta:g})"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"taecher": "sd14"}, "unknown parameter 'taecher'; did you mean 'teacher'"),
        ({"teacher": "poster"}, "unknown teacher .* 'poster'; did you mean 'posters'"),
        ({"methods": "amrada"}, "unknown method 'amrada'; did you mean 'armada'"),
        ({"threshold": 1.0}, "threshold: .*less than 1"),
        ({"threshold": 0}, "threshold: .*greater than 0"),
        ({"student": "bert"}, "unknown student"),
        ({"methods": "seqkd"}, "unknown method for mmimdb 'seqkd'"),
    ],
)
def test_bad_parameters_stop_before_any_work(changed, message, monkeypatch):
    monkeypatch.setattr(runs, "compute", lambda *a, **k: pytest.fail("work was started"))
    with pytest.raises(ValueError, match=message):
        plans.multimodal(asked(**changed))


def test_the_papers_posters_need_a_folder(monkeypatch, tmp_path):
    from armada_lib import teachers

    monkeypatch.delenv("ARMADA_POSTERS", raising=False)
    who = profiles.load("paper").teacher("posters")
    assert (who.encoder, who.width) == ("microsoft/resnet-50", 2048)
    with pytest.raises(ValueError, match="needs the environment variable ARMADA_POSTERS"):
        teachers.fingerprint(who)
    t = profiles.load("paper").recipe("mmimdb", "mmimdb", "bert-base")
    assert (t.epochs, t.student_lr, t.threshold) == (20, 2e-5, 0.5)
