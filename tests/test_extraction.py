"""Vectors of tasks and files: read, estimated, computed once, shared between processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from armada_lib import __main__ as cli
from armada_lib import extraction, profiles, runs, specs
from armada_lib.results import RunStore

CODE = Path(__file__).resolve().parents[1]
SENTENCES = ["the cat sat", "a dog ran home", "the sun is up"]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_texts_come_from_tasks_and_three_kinds_of_file_each_once(project, tmp_path):
    a = write(tmp_path / "a.txt", "the cat sat\na dog ran home\n")
    b = write(tmp_path / "b.csv", 'label,text\n1,"a dog, ran home"\n0,the cat sat\n')
    c = write(tmp_path / "c.jsonl", '{"text": "the sun is up"}\n\n{"text": "the cat sat"}\n')
    expected = ["the cat sat", "a dog ran home", "a dog, ran home", "the sun is up"]
    assert extraction.read([a, b, c], "tiny") == expected
    cola = extraction.read(["cola"], "tiny")
    assert len(cola) == 48 and extraction.read(["cola", a, "cola"], "tiny") == [
        *cola,
        *expected[:2],
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "one\n\nthree\n", "text 2 of 3 is empty"),
        ("a.txt", "", "no text in it"),
        ("a.csv", "sentence\nhello\n", "no column 'text'; there are sentence"),
        ("a.jsonl", '{"sentence": "x"}\n', "no column 'text'"),
        ("a.jsonl", "hello\n", "cannot be read as jsonl"),
        ("a.jsonl", '{"text": 3}\n', "text 1 of 1 is empty"),
        ("a.json", "[]", "a file of texts ends in .txt, .csv, .jsonl"),
    ],
)
def test_a_bad_file_is_named(project, tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        extraction.read([path], "tiny")
    assert str(path) in str(e.value)


def test_a_missing_file_and_a_misspelt_task_are_named(project, tmp_path):
    with pytest.raises(FileNotFoundError, match="no.txt: there is no such file"):
        extraction.read([str(tmp_path / "no.txt")], "tiny")
    with pytest.raises(ValueError, match="unknown task 'colla'; did you mean 'cola'"):
        extraction.read(["colla"], "tiny")


def test_filling_computes_what_is_missing_once(project, tmp_path):
    store = RunStore(tmp_path)
    fill = lambda texts, **k: extraction.fill("tiny", "sd14", texts, store, progress=False, **k)
    assert fill(SENTENCES[:2]) == 2 and fill(SENTENCES) == 1 and fill(SENTENCES) == 0
    assert fill([]) == 0
    vectors = extraction.feature_store("tiny", "sd14", store).gather(SENTENCES)
    expected = extraction.load("tiny", "sd14").encode(SENTENCES)
    np.testing.assert_allclose(vectors, expected, atol=2e-2)


def test_a_pool_inside_another_takes_its_processes():
    with extraction.pool(1) as outer:
        first = outer.submit(os.getpid).result()
        with extraction.pool(2) as inner:
            assert inner is outer and inner.submit(os.getpid).result() == first != os.getpid()
        assert outer.submit(os.getpid).result() == first  # the inner one did not close it
    with pytest.raises(ZeroDivisionError), extraction.pool(1) as broken, extraction.pool(1):
        raise ZeroDivisionError
    with extraction.pool(1) as fresh:
        assert fresh is not broken and fresh.submit(os.getpid).result() != first


def test_the_estimate_counts_rows_and_weights(project):
    one, two = (extraction.estimate("tiny", "sd14", n) for n in (1000, 2000))
    assert one["disk"] == 1000 * (64 * 2 + 16) and two["disk"] == 2 * one["disk"]
    loaded = extraction.load("tiny", "sd14").pipeline
    count = sum(
        p.numel() for m in (loaded.unet, loaded.vae, loaded.text_encoder) for p in m.parameters()
    )
    assert one["weights"] == pytest.approx(4 * count, rel=0.02)


def test_the_command_says_what_it_will_do_and_does_it(project, tmp_path, capsys):
    texts = write(tmp_path / "t.txt", "\n".join(SENTENCES))
    argv = ["extract", "--profile", "tiny", "--teacher", "sd14", "--texts", texts,
            "--store", str(tmp_path / "s"), "--workers", "1"]  # fmt: skip
    cli.main(argv)
    said = capsys.readouterr().out
    assert "3 texts, 0 stored, 3 to compute" in said and "done: 3 vectors computed" in said
    cli.main(argv)
    assert "3 texts, 3 stored, 0 to compute" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--teacher", "sd41"], "unknown teacher (profile tiny) 'sd41'; did you mean 'sd14'?"),
        (["--profile", "tinny"], "unknown profile 'tinny'; did you mean 'tiny'?"),
        (["--texts", "colla"], "unknown task 'colla'"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--profile", "giant"], "profile 'giant' needs a CUDA GPU and none is visible"),
    ],
)
def test_bad_input_to_the_command_is_one_line(project, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(extraction.teachers, "load", lambda *a: pytest.fail("a teacher was loaded"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    raw = yaml.safe_load((project / "params/profiles/tiny.yaml").read_text()) | {"gpu": True}
    (project / "params/profiles/giant.yaml").write_text(yaml.safe_dump(raw))
    argv = ["extract", "--profile", "tiny", "--teacher", "sd14", "--texts", "cola",
            "--store", str(tmp_path), *change]  # fmt: skip
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert message in str(e.value.code) and "\n" not in str(e.value.code)


def test_two_processes_under_accelerate_share_the_texts(project, tmp_path):
    texts = write(tmp_path / "t.txt", "\n".join(f"the cat sat on mat {i}" for i in range(12)))
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ARMADA_ROOT": str(project),
        "PYTHONPATH": str(CODE),
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
              "--main_process_port", "0", "--num_processes", "2", "-m", "armada_lib"]  # fmt: skip
    command = [
        "extract",
        "--profile",
        "tiny",
        "--teacher",
        "sd14",
        "--texts",
        texts,
        "--store",
        str(tmp_path),
    ]
    done = subprocess.run([*launch, *command], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "12 to compute" in done.stdout and "done: 6 vectors computed by this process" in done.stdout
    )
    store = extraction.feature_store("tiny", "sd14", RunStore(tmp_path))
    sentences = extraction.read([texts], "tiny")
    expected = extraction.load("tiny", "sd14").encode(sentences)
    np.testing.assert_allclose(store.gather(sentences), expected, atol=2e-2)
    assert project == profiles.ROOT


def boxed(project: Path, folder: Path, refused: int, lost: int = 0) -> None:
    """A profile `boxed` whose teacher is a folder of one-coloured pictures of CoLA's texts."""
    raw = yaml.safe_load((project / "params/profiles/tiny.yaml").read_text())
    raw["teachers"] = {"box": {"kind": "blackbox", "source": "folder", "folder": str(folder),
                               "encoder": "efficientnet-lite0", "width": 1280}}  # fmt: skip
    (project / "params/profiles/boxed.yaml").write_text(yaml.safe_dump(raw))
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i, text in enumerate(extraction.read(["cola"], "tiny")[lost:]):
        if i < refused:
            lines.append({"text": text, "refused": "not allowed"})
            continue
        picture = rng.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        lines.append({"text": text, "file": f"{i}.png"})
    (folder / "index.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_texts_that_a_black_box_refused_are_trained_on_with_the_mean(project, tmp_path):
    boxed(project, tmp_path / "pictures", refused=5)
    store = RunStore(tmp_path / "store")
    s = specs.spec("boxed", "cola", "armada", teacher="box", epochs=1)
    result = runs.run(s, store)
    assert result.facts["texts_without_vector"] == 5
    _, _, train, held, _ = runs.build(s, store)
    absent = [np.flatnonzero(d.where < 0) for d in (train, held) if d.where is not None]
    assert sum(map(len, absent)) == 5
    assert (train.vectors(absent[0]) == 0).all() and train.vectors(np.arange(len(train))).any()
    assert extraction.fill("boxed", "box", extraction.read(["cola"], "tiny"), store) == 0
    raw = specs.spec("boxed", "cola", "armada", teacher="box", reading="released")
    _, _, train, _, _ = runs.build(raw, store)
    there, own = np.flatnonzero(train.where >= 0), np.flatnonzero(train.where < 0)
    mean = train.vectors(there).mean(0)
    torch.testing.assert_close(train.vectors(own)[0], mean, atol=2e-3, rtol=2e-3)
    noise = specs.spec("boxed", "cola", "random", teacher="box", reading="released")
    _, _, drawn, _, _ = runs.build(noise, store)  # with the moments of the vectors that are there
    torch.testing.assert_close(
        drawn.teacher.float().mean(), train.vectors(there).mean(), atol=0.1, rtol=0.1
    )


def test_a_text_without_a_file_stops_before_any_work(project, tmp_path, monkeypatch):
    boxed(project, tmp_path / "pictures", refused=2, lost=3)
    monkeypatch.setattr(runs.engine, "train", lambda *a, **k: pytest.fail("training began"))
    s = specs.spec("boxed", "cola", "armada", teacher="box", epochs=1)
    with pytest.raises(ValueError, match="3 of 46 texts have no file in .*pictures"):
        runs.study([s], RunStore(tmp_path / "store"), workers=1, progress=False)


def test_noise_is_added_to_both_splits_of_a_run_and_differs_between_them(project, store):
    plain, noisy = (specs.spec("tiny", "cola", "armada", noise=x) for x in (0.0, 3.0))
    extraction.extract([plain], RunStore(), progress=False)
    found = [runs.build(s, RunStore()) for s in (plain, noisy)]
    rows = np.arange(24)
    added = []
    for split in (2, 3):
        a, b = (x[split].vectors(rows) for x in found)
        added.append(b - a)
        assert 2.5 < float(added[-1].std()) < 3.5
    assert not np.allclose(*added)
    other = runs.build(specs.spec("tiny", "cola", "armada", noise=3.0, seed=1), RunStore())[2]
    assert not np.allclose(other.vectors(rows), found[1][2].vectors(rows))
