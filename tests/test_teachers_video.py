"""Video teachers: a tiny random pipeline in the hub's layout, and one that shares an image model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from elsewhere import elsewhere
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from armada_lib import profiles, teachers
from armada_lib.teacher_settings import VideoSpec
from armada_lib.teachers import common, video

TEXTS = ["a red heart", "the dog runs", "a red heart and the dog", "tree"]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*MARKS, *sorted({w for t in TEXTS for w in t.split()})]
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
)
FLAT = dict(  # the same layers in an image model: two heads of eight channels
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
)
DEEP = dict(
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    attention_head_dim=8,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A TextToVideoSDPipeline with random weights: frames of 16 pixels, latents 4 x 8 x 8."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    unet = UNet3DConditionModel(**UNET, **DEEP)
    for parameter in unet.parameters():  # temporal convolutions begin at zero: nothing to see
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    TextToVideoSDPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        ),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=BertModel(
            BertConfig(
                vocab_size=len(WORDS),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            )
        ),
        tokenizer=BertTokenizer(str(folder / "vocab.txt"), model_max_length=6),
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Tolerances below are those of fp32."""
    monkeypatch.setattr(common, "precision", lambda device: "fp32")


def tiny(checkpoint, **changes) -> VideoSpec:
    settings = dict(
        name="tiny",
        checkpoint=str(checkpoint),
        width=400,
        steps=2,
        frames=3,
        size=16,
        side=20,
        batch_size=3,
    )
    return VideoSpec(**(settings | changes))


def by_hand(checkpoint, text, output_type):
    """The film of `text` from the pipeline itself, 3 frames, 2 steps, guidance 7.5."""
    pipe = TextToVideoSDPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    noise = torch.randn(
        1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(common.seed(video.RECIPE, text))
    )
    with torch.inference_mode():
        return pipe(
            text, height=16, width=16, num_frames=3, num_inference_steps=2, guidance_scale=7.5,
            latents=noise, output_type=output_type,
        ).frames  # fmt: skip


def test_vectors_do_not_depend_on_neighbours_order_or_batch_size(checkpoint):
    teacher = teachers.load(tiny(checkpoint))
    together = teacher.encode(TEXTS)
    assert together.shape == (4, 400) and together.dtype == np.float16
    alone = np.concatenate([teacher.encode([text]) for text in TEXTS])
    other = teachers.load(tiny(checkpoint, batch_size=2)).encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(alone, together, atol=2e-3)
    np.testing.assert_allclose(other, together, atol=2e-3)
    assert np.abs(together[0] - together[1]).max() > 0.05


@pytest.mark.parametrize("readout, width", [("first-latent", 256), ("latents", 768)])
def test_latents_are_those_of_the_pipeline_called_by_hand(checkpoint, readout, width):
    vector = teachers.load(tiny(checkpoint, readout=readout, width=width)).encode(TEXTS[:1])[0]
    latents = by_hand(checkpoint, TEXTS[0], "latent")[0]
    expected = latents if readout == "latents" else latents[:, 0]
    np.testing.assert_allclose(vector, expected.flatten().numpy(), atol=5e-3, rtol=5e-3)


def test_grey_is_that_of_the_first_decoded_frame_and_the_rest_is_not_decoded(
    checkpoint, monkeypatch
):
    teacher = teachers.load(tiny(checkpoint))
    decode, rows = teacher.pipeline.vae.decode, []
    monkeypatch.setattr(
        teacher.pipeline.vae, "decode", lambda z, **k: rows.append(len(z)) or decode(z, **k)
    )
    vector = teacher.encode(TEXTS[:1])[0]
    assert rows == [1]
    frame = torch.from_numpy(by_hand(checkpoint, TEXTS[0], "np")[0][0])  # (16, 16, 3) in [0, 1]
    grey = frame @ torch.tensor([0.299, 0.587, 0.114])
    sized = torch.nn.functional.interpolate(
        grey[None, None], (20, 20), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(vector, sized.flatten().numpy(), atol=2e-3)
    assert vector.min() >= 0 and vector.max() <= 1 and vector.std() > 0.01


def test_film_shows_what_encode_reads(checkpoint):
    teacher = teachers.load(tiny(checkpoint, side=16, width=256))
    films = teacher.film(TEXTS[:2])
    assert [[frame.size for frame in film] for film in films] == [[(16, 16)] * 3] * 2
    first = [np.asarray(film[0].convert("L"), float) / 255 for film in films]
    vectors = teacher.encode(TEXTS[:2]).reshape(2, 16, 16)
    np.testing.assert_allclose(np.stack(first), vectors, atol=1 / 100)
    assert np.abs(np.asarray(films[0][0], float) - np.asarray(films[0][2], float)).max() > 1


def test_projection_streams_a_fixed_sign_matrix_that_keeps_lengths():
    numbers, width = video.BLOCK + 40, 64
    some = np.zeros((3, numbers), np.float32)
    some[0, 5] = some[1, video.BLOCK + 7] = some[2, 45] = 1
    rows = video.project(some, width)
    np.testing.assert_allclose(np.abs(rows), 1 / np.sqrt(width), rtol=1e-6)
    assert abs((rows[0] * rows[1]).sum()) < 0.6 and not np.array_equal(rows[0], rows[1])
    x = np.random.default_rng(0).normal(size=(200, numbers)).astype(np.float32)
    dense = video.project(np.eye(numbers, dtype=np.float32), width)
    np.testing.assert_allclose(video.project(x, width), x @ dense, rtol=1e-3, atol=1e-3)
    ratio = (video.project(x, width) ** 2).sum(1) / (x**2).sum(1)
    assert abs(ratio.mean() - 1) < 3 * np.sqrt(2 / width / 200)  # sd of the mean of 200
    assert not np.array_equal(video.project(some, 32), rows[:, :32] * np.sqrt(2))


def test_encode_projects_its_readout(checkpoint):
    whole = teachers.load(tiny(checkpoint)).encode(TEXTS[:2]).astype(np.float32)
    small = teachers.load(tiny(checkpoint, project=True, width=32)).encode(TEXTS[:2])
    assert small.shape == (2, 32) and small.dtype == np.float16
    np.testing.assert_allclose(small, video.project(whole, 32), atol=2e-2)


def test_another_process_gives_the_same_vectors(checkpoint, tmp_path):
    spec = tiny(checkpoint)
    np.testing.assert_array_equal(
        elsewhere(spec, TEXTS, tmp_path), teachers.load(spec).encode(TEXTS)
    )


def test_truncated_counts_texts_longer_than_the_encoder_reads(checkpoint):
    teacher = teachers.load(tiny(checkpoint))  # 6 tokens: four words and two marks
    assert teacher.truncated(["a red heart and", "a red heart and the dog", "dog"]) == 1
    assert teacher.truncated([]) == 0


@pytest.mark.parametrize("texts", [["dog", ""], ["  \n"], "dog", [None]])
def test_a_text_without_words_is_refused(checkpoint, texts, monkeypatch):
    teacher = teachers.load(tiny(checkpoint))
    monkeypatch.setattr(teacher, "_latents", None)
    for ask in (teacher.encode, teacher.film):
        with pytest.raises(ValueError, match=r"empty|list of strings"):
            ask(texts)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(width=1024), r"400 numbers \(20 x 20\); its width is set to 1024"),
        (dict(width=1024, readout="latents"), "768 numbers"),
        (dict(width=400, readout="first-latent"), "256 numbers"),
        (dict(width=401, project=True), "a projection only makes fewer"),
        (dict(size=20), "no multiple of 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_weights_are_read(
    checkpoint, changes, words, monkeypatch
):
    monkeypatch.setattr(video, "_pipeline", None)
    with pytest.raises(ValueError, match=words):
        teachers.load(tiny(checkpoint, **changes))


def test_values_that_are_no_numbers_are_an_error(checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = load_file(broken / "unet" / WEIGHTS)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, broken / "unet" / WEIGHTS, metadata={"format": "pt"})
    teacher = teachers.load(tiny(broken, readout="first-latent", width=256))
    with pytest.raises(FloatingPointError, match="not finite"):
        teacher.encode(TEXTS[:1])
    assert teachers.fingerprint(tiny(broken)) != teachers.fingerprint(tiny(checkpoint))


def test_fingerprint_covers_what_changes_the_vectors_and_loads_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(video, "_pipeline", None)
    one = teachers.fingerprint(tiny(checkpoint))
    changes = [
        dict(steps=4), dict(guidance=7.0), dict(frames=4), dict(size=32), dict(width=64),
        dict(readout="latents"), dict(side=21), dict(project=True),
        dict(text_encoder=str(checkpoint / "text_encoder")), dict(spatial=str(checkpoint / "vae")),
    ]  # fmt: skip
    others = [teachers.fingerprint(tiny(checkpoint, **c)) for c in changes]
    monkeypatch.setattr(video, "RECIPE", "other")
    others.append(teachers.fingerprint(tiny(checkpoint)))
    monkeypatch.undo()
    monkeypatch.setattr(common, "precision", lambda device: "bf16")
    others.append(teachers.fingerprint(tiny(checkpoint)))
    assert len({one, *others}) == len(others) + 1
    monkeypatch.setattr(common, "precision", lambda device: "fp32")
    same = tiny(checkpoint, batch_size=7, name="other", note="x", stands_for="y")
    assert teachers.fingerprint(same) == one == teachers.load(tiny(checkpoint)).fingerprint


def test_missing_weights_name_the_command_that_gets_them(monkeypatch):
    monkeypatch.setattr(profiles, "identity", lambda *_: "hub:nobody/nothing@0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="`hf download nobody/nothing --revision main`"):
        teachers.load(tiny("nobody/nothing", revision="main"))


def test_weights_that_are_only_there_as_a_pickle_are_refused(checkpoint, tmp_path):
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    for part in ("unet", "vae"):
        weights = load_file(pickled / part / WEIGHTS)
        (pickled / part / WEIGHTS).unlink()
        torch.save(weights, pickled / part / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no safetensors weights.*spaces/safetensors"):
        teachers.load(tiny(pickled))


def test_half_precision_files_are_found_by_their_variant(checkpoint, tmp_path):
    TextToVideoSDPipeline.from_pretrained(checkpoint).save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / WEIGHTS).exists()
    vectors = teachers.load(tiny(tmp_path)).encode(TEXTS[:1])
    assert np.array_equal(vectors, teachers.load(tiny(checkpoint)).encode(TEXTS[:1]))


@pytest.fixture
def shared(checkpoint, tmp_path):
    """An image model, and a film model that holds only what the image model lacks."""
    torch.manual_seed(1)
    image = UNet2DConditionModel(**UNET, **FLAT)
    image.save_pretrained(tmp_path / "image" / "unet")
    shutil.copytree(checkpoint / "vae", tmp_path / "image" / "vae")
    film = UNet3DConditionModel(**UNET, **DEEP)
    film.save_config(tmp_path / "film" / "unet")
    own = {}
    for name in film.state_dict().keys() - image.state_dict().keys():
        weight = film.state_dict()[name].clone()
        # What a temporal layer adds is zero: every frame is then an image.
        own[name] = (
            weight * 0 if ".proj_out." in name or "transformer_in.proj_out" in name else weight
        )
    save_file(own, tmp_path / "film" / "unet" / WEIGHTS, metadata={"format": "pt"})
    shutil.copytree(checkpoint / "scheduler", tmp_path / "film" / "scheduler")
    (tmp_path / "film" / "text.json").write_text('{"tokens": 5}')
    shutil.copytree(checkpoint / "text_encoder", tmp_path / "words")
    shutil.copytree(checkpoint / "tokenizer", tmp_path / "words", dirs_exist_ok=True)
    return tmp_path, image.eval()


def test_a_film_model_without_motion_is_the_image_model_frame_by_frame(shared):
    folder, image = shared
    film = video.assemble_unet(folder / "film", folder / "image").eval()
    x, t, words = torch.randn(2, 4, 3, 8, 8), torch.tensor(300), torch.randn(2, 5, 16)
    with torch.inference_mode():
        frames = torch.stack([image(x[:, :, i], t, words).sample for i in range(3)], 2)
        torch.testing.assert_close(film(x, t, words).sample, frames, atol=1e-4, rtol=1e-4)


def test_a_film_model_overlays_its_own_weights_and_lacks_none(shared):
    folder, image = shared
    path = folder / "film" / "unet" / WEIGHTS
    own = load_file(path)
    save_file(own | {"conv_in.bias": torch.full((8,), 3.0)}, path)
    film = video.assemble_unet(folder / "film", folder / "image")
    assert (film.conv_in.bias == 3).all()
    torch.testing.assert_close(film.conv_out.weight, image.conv_out.weight)
    name = next(n for n in own if "temp_convs" in n)
    save_file({n: w for n, w in own.items() if n != name}, path)
    with pytest.raises(ValueError, match=rf"1 weights are in neither model: {name}"):
        video.assemble_unet(folder / "film", folder / "image")
    for wrong in ({"conv_in.bias": torch.zeros(9)}, {"nobody": torch.zeros(1)}):
        save_file(own | wrong, path)
        with pytest.raises(ValueError, match=rf"without a place: {next(iter(wrong))}"):
            video.assemble_unet(folder / "film", folder / "image")


def test_another_number_of_heads_is_refused(shared):
    folder, _ = shared
    UNet3DConditionModel(**UNET, **(DEEP | dict(attention_head_dim=4))).save_config(
        folder / "film" / "unet"
    )
    with pytest.raises(ValueError, match=r"attn1' has \[2, 4\] heads"):
        video.assemble_unet(folder / "film", folder / "image")


def test_a_film_model_takes_its_autoencoder_from_the_image_model(shared):
    folder, _ = shared
    parts = dict(spatial=str(folder / "image"))
    with pytest.raises(ValueError, match="set text_encoder"):
        teachers.load(tiny(folder / "film", **parts))
    spec = tiny(folder / "film", **parts, text_encoder=str(folder / "words"))
    teacher = teachers.load(spec)
    assert teacher.encode(TEXTS).shape == (4, 400)
    assert teacher.truncated(["a red heart and", "a red heart"]) == 1
    profiles.file_digest.cache_clear()  # files are taken not to change within a process
    save_file(load_file(folder / "image" / "unet" / WEIGHTS) | {"x": torch.zeros(1)},
              folder / "image" / "unet" / WEIGHTS)  # fmt: skip
    assert teachers.fingerprint(spec) != teacher.fingerprint
