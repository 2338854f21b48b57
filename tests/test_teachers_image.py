"""Image teachers: a tiny random pipeline in the hub's layout, and the embedded emoji painter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from elsewhere import elsewhere
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from armada_lib import profiles, teachers
from armada_lib.teacher_settings import ImageSpec
from armada_lib.teachers import common, image

TEXTS = ["a red heart", "the dog runs", "a red heart and the dog", "tree"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *sorted({w for t in TEXTS for w in t.split()}),
]


def tiny_unet(cross: int = 16) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A StableDiffusionPipeline with random weights: pictures of 16 pixels, latents 4 x 8 x 8."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        ),
        unet=tiny_unet(),
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
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(autouse=True)
def fp32(request, monkeypatch):
    """Tolerances below are those of fp32; tests of the painter use what the machine has."""
    if "painter" not in request.fixturenames:
        monkeypatch.setattr(image, "precision", lambda device: "fp32")


def tiny(checkpoint, **changes) -> ImageSpec:
    settings = dict(
        name="tiny",
        kind="image",
        checkpoint=str(checkpoint),
        width=256,
        steps=3,
        size=16,
        batch_size=3,
    )
    return ImageSpec(**(settings | changes))


def test_vectors_do_not_depend_on_neighbours_order_or_batch_size(checkpoint):
    teacher = teachers.load(tiny(checkpoint))
    together = teacher.encode(TEXTS)
    assert together.shape == (4, 256) and together.dtype == np.float16
    alone = np.concatenate([teacher.encode([text]) for text in TEXTS])
    other = teachers.load(tiny(checkpoint, batch_size=2)).encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(alone, together, atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(other, together, atol=2e-3, rtol=2e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_encode_is_the_pipeline_called_by_hand(checkpoint):
    spec = tiny(checkpoint, guidance=3.0)
    vector = teachers.load(spec).encode(TEXTS[:1])[0]
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    noise = torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(common.seed(image.RECIPE, TEXTS[0]))
    )
    with torch.inference_mode():
        latent = pipe(
            TEXTS[0], height=16, width=16, num_inference_steps=3, guidance_scale=3.0,
            latents=noise, output_type="latent",
        ).images  # fmt: skip
    np.testing.assert_allclose(vector, latent.flatten().numpy(), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("latent, width", [("channel-mean", 64), ("two-stage", 256), ("full", 256)])
def test_readings_of_the_latent(checkpoint, latent, width):
    vectors = teachers.load(tiny(checkpoint, latent=latent, width=width)).encode(TEXTS[:2])
    flat = teachers.load(tiny(checkpoint)).encode(TEXTS[:2]).astype(np.float32)
    assert vectors.shape == (2, width)
    if latent == "channel-mean":
        np.testing.assert_allclose(vectors, flat.reshape(2, 4, 64).mean(1), atol=5e-3, rtol=5e-3)
    else:
        assert (np.abs(vectors - flat).max() > 0.05) == (latent == "two-stage")


def test_paint_gives_one_picture_a_text(checkpoint):
    pictures = teachers.load(tiny(checkpoint)).paint(TEXTS)
    assert [p.size for p in pictures] == [(16, 16)] * 4


def test_truncated_counts_texts_longer_than_the_encoder_reads(checkpoint):
    teacher = teachers.load(tiny(checkpoint))  # 6 tokens: four words and two marks
    assert teacher.truncated(["a red heart and", "a red heart and the dog", "dog"]) == 1
    assert teacher.truncated([]) == 0


@pytest.mark.parametrize("texts", [["dog", ""], ["  \n"], "dog", [None]])
def test_a_text_without_words_is_refused(checkpoint, texts):
    teacher = teachers.load(tiny(checkpoint))
    with pytest.raises(ValueError, match=r"empty|list of strings"):
        teacher.encode(texts)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(width=1024), "256 numbers .* width is set to 1024"),
        (dict(size=20), "no multiple"),
        (dict(latent="two-stage", guidance_rescale=0.5), "guidance_rescale"),
    ],
)
def test_settings_that_do_not_fit_are_refused(checkpoint, changes, words):
    with pytest.raises(ValueError, match=words):
        teachers.load(tiny(checkpoint, **changes))


def test_values_that_are_no_numbers_are_an_error(checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="not finite"):
        teachers.load(tiny(broken)).encode(TEXTS[:1])
    assert teachers.fingerprint(tiny(broken)) != teachers.fingerprint(tiny(checkpoint))


def test_a_constant_vector_is_an_error():
    with pytest.raises(FloatingPointError, match="constant vector for 1 of 2 texts, first 'b'"):
        common.check_vectors(np.array([[1, 2], [3, 3]], np.float16), ["a", "b"], "t")


def test_fingerprint_covers_what_changes_the_vectors_and_loads_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(image, "_pipeline", None)
    one = teachers.fingerprint(tiny(checkpoint))
    changes = [
        dict(steps=4), dict(guidance=7.0), dict(guidance_rescale=0.7), dict(size=32),
        dict(width=64), dict(latent="full"), dict(text_encoder=str(checkpoint / "text_encoder")),
    ]  # fmt: skip
    others = [teachers.fingerprint(tiny(checkpoint, **c)) for c in changes]
    monkeypatch.setattr(image, "RECIPE", "other")
    others.append(teachers.fingerprint(tiny(checkpoint)))
    monkeypatch.undo()
    monkeypatch.setattr(image, "precision", lambda device: "bf16")
    others.append(teachers.fingerprint(tiny(checkpoint)))
    assert len({one, *others}) == len(others) + 1
    monkeypatch.setattr(image, "precision", lambda device: "fp32")
    same = tiny(checkpoint, batch_size=7, name="other", note="x", stands_for="y")
    assert teachers.fingerprint(same) == one == teachers.load(tiny(checkpoint)).fingerprint


def test_a_model_card_does_not_change_the_fingerprint(checkpoint):
    one = common.identity(str(checkpoint), None)
    (checkpoint / "evaluation.json").write_text("{}")
    assert common.identity(str(checkpoint), None) == one


def test_missing_weights_name_the_command_that_gets_them(monkeypatch):
    monkeypatch.setattr(image.profiles, "identity", lambda *_: "hub:nobody/nothing@0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = tiny("nobody/nothing", revision="main")
    with pytest.raises(FileNotFoundError, match="`hf download nobody/nothing --revision main`"):
        teachers.load(spec)


def test_parts_without_a_text_encoder_need_one_and_read_text_json(checkpoint, tmp_path):
    for part in ("unet", "vae", "scheduler"):
        shutil.copytree(checkpoint / part, tmp_path / part)
    (tmp_path / "text.json").write_text('{"tokens": 5}')
    with pytest.raises(ValueError, match="set text_encoder"):
        teachers.load(tiny(tmp_path))
    encoder = tmp_path / "encoder"
    shutil.copytree(checkpoint / "text_encoder", encoder)
    shutil.copytree(checkpoint / "tokenizer", encoder, dirs_exist_ok=True)
    one = tiny(tmp_path, text_encoder=str(encoder))
    teacher = teachers.load(one)
    assert teacher.encode(TEXTS).shape == (4, 256)
    assert teacher.truncated(["a red heart and", "a red heart"]) == 1
    (tmp_path / "text.json").write_text('{"tokens": 6}')
    profiles.file_digest.cache_clear()  # files are taken not to change within a process
    assert teachers.fingerprint(one) != teacher.fingerprint


def test_another_process_gives_the_same_vectors(checkpoint, tmp_path):
    spec = tiny(checkpoint)
    np.testing.assert_array_equal(
        elsewhere(spec, TEXTS, tmp_path), teachers.load(spec).encode(TEXTS)
    )


ADAPTER = "pytorch_lora_weights.safetensors"
RANK = 4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random LoRA of linear and convolution layers of the tiny UNet, alpha 2 at rank 4."""
    return make_adapter(tmp_path_factory.mktemp("adapter"), tiny_unet())


def make_adapter(folder: Path, unet: UNet2DConditionModel) -> Path:
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_in"]
    config = LoraConfig(r=RANK, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    return folder


def changed(adapter: Path, folder: Path, change) -> Path:
    """A copy of the adapter whose tensors are `change(tensors)`; without its metadata."""
    folder.mkdir()
    save_file(change(load_file(adapter / ADAPTER)), folder / ADAPTER)
    return folder


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_an_adapter_is_the_pipeline_with_that_adapter(checkpoint, adapter, scale):
    """Against diffusers' own forward pass with the LoRA beside the weights, not in them."""
    spec = tiny(checkpoint, adapter=str(adapter), adapter_scale=scale)
    teacher = teachers.load(spec)
    plain = teachers.load(tiny(checkpoint))
    names = [n for n, _ in teacher.pipeline.unet.named_modules()]
    assert names == [n for n, _ in plain.pipeline.unet.named_modules()]  # nothing more to run
    vectors = teacher.encode(TEXTS[:1])
    assert np.abs(vectors - plain.encode(TEXTS[:1])).max() > 0.05

    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(adapter), adapter_name="style")
    pipe.set_adapters("style", scale)
    pipe.text_encoder.eval()
    noise = torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(common.seed(image.RECIPE, TEXTS[0]))
    )
    with torch.inference_mode():
        latent = pipe(
            TEXTS[0], height=16, width=16, num_inference_steps=3, guidance_scale=7.5,
            latents=noise, output_type="latent",
        ).images  # fmt: skip
    np.testing.assert_allclose(vectors[0], latent.flatten().numpy(), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_adapter_adds_scaled_products_to_the_weights(checkpoint, adapter, scale):
    spec = tiny(checkpoint, adapter=str(adapter), adapter_scale=scale)
    after = teachers.load(spec).pipeline.unet.state_dict()
    before = teachers.load(tiny(checkpoint)).pipeline.unet.state_dict()
    tensors = load_file(adapter / ADAPTER)
    layers = {k.removeprefix("unet.").split(".lora")[0] for k in tensors}
    assert set(before) == set(after)
    for key, weight in before.items():
        layer = key.removesuffix(".weight")
        expected = weight
        if layer in layers:
            up, down = (tensors[f"unet.{layer}.lora_{x}.weight"].flatten(1) for x in "BA")
            expected = weight + scale * 2 / RANK * (up @ down).view_as(weight)
        torch.testing.assert_close(after[key], expected, atol=1e-5, rtol=1e-5)
    assert {"conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"} < layers


def test_half_an_adapter_is_the_adapter_at_half_its_scale(checkpoint, adapter, tmp_path):
    def half(tensors):
        return {k: v / 2 if "lora_B" in k else v for k, v in tensors.items()}

    one = changed(adapter, tmp_path / "same", lambda tensors: tensors)
    two = changed(adapter, tmp_path / "half", half)
    vectors = [
        teachers.load(tiny(checkpoint, adapter=str(folder), adapter_scale=scale)).encode(TEXTS)
        for folder, scale in ((one, 0.5), (two, 1.0), (one, 1.0))
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-3, rtol=2e-3)
    assert np.abs(vectors[0] - vectors[2]).max() > 0.05


def test_an_adapter_in_the_other_common_layout_with_alpha(checkpoint, adapter, tmp_path):
    """`lora_unet_..._to_q.lora_down.weight` and `.alpha`: how most files on the hub look."""

    def other(tensors):
        found = {}
        for key, value in tensors.items():
            if "attn" in key:
                layer, which = key.removeprefix("unet.").removesuffix(".weight").split(".lora_")
                name = "lora_unet_" + layer.replace(".", "_")
                found[f"{name}.lora_{dict(A='down', B='up')[which]}.weight"] = value
                found[f"{name}.alpha"] = torch.tensor(1.0)
        return found

    def own(tensors):
        return {k: v for k, v in tensors.items() if "attn" in k}

    one = changed(adapter, tmp_path / "other", other)
    two = changed(adapter, tmp_path / "own", own)  # without alpha: alpha is the rank
    vectors = [
        teachers.load(tiny(checkpoint, adapter=str(folder), adapter_scale=scale)).encode(TEXTS)
        for folder, scale in ((one, 1.0), (two, 1 / RANK))
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-3, rtol=2e-3)


def without(word: str):
    return lambda tensors: {k: v for k, v in tensors.items() if word not in k}


def renamed(old: str, new: str):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def one_more(tensors):
    return tensors | {"unet.extra.to_q.lora_A.weight": torch.zeros(4, 16)}


@pytest.mark.parametrize(
    "change, words",
    [
        (renamed("unet.", "transformer."), r"another model .* no layer for transformer\.conv_in"),
        (renamed("attn", "nothing"), r"no layer for unet\.down_blocks.*nothing1"),
        (renamed(".lora_A", ".other_A"), "no layer for .*other_A"),
        (one_more, r"no layer for unet\.extra\.to_q"),
        (without("attn2.to_q.lora_B"), "layers take 82 tensors, the file holds 78"),
        (without("unet"), "layers take 0 tensors"),
    ],
    ids=["other part", "other names", "no lora", "one more", "half a layer", "empty"],
)
def test_an_adapter_is_taken_whole_or_refused(checkpoint, adapter, tmp_path, change, words):
    folder = changed(adapter, tmp_path / "changed", change)
    with pytest.raises(ValueError, match=words):
        teachers.load(tiny(checkpoint, adapter=str(folder)))


def test_an_adapter_of_another_width_names_layer_and_shapes(checkpoint, tmp_path):
    folder = make_adapter(tmp_path, tiny_unet(cross=32))
    words = (
        r"another model than .*attn2\.to_k\.lora_A has shape \[4, 32\] in the file, \[4, 16\] in"
    )
    with pytest.raises(ValueError, match=words):
        teachers.load(tiny(checkpoint, adapter=str(folder)))


def test_an_adapter_must_be_safetensors(checkpoint, tmp_path):
    (tmp_path / ADAPTER).write_bytes(b"these bytes are no tensors at all")
    with pytest.raises(ValueError, match=f"{ADAPTER} is no safetensors file"):
        teachers.load(tiny(checkpoint, adapter=str(tmp_path)))
    torch.save({}, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"'lora.bin' is no .safetensors file"):
        teachers.load(tiny(checkpoint, adapter=str(tmp_path), adapter_file="lora.bin"))


def test_a_missing_adapter_names_the_file_or_the_command(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(image, "_pipeline", None)  # found out before weights are loaded
    with pytest.raises(FileNotFoundError, match=rf"has no file {ADAPTER} .*{tmp_path}"):
        teachers.load(tiny(checkpoint, adapter=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="asset:no-such"):
        teachers.load(tiny(checkpoint, adapter="asset:no-such"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = "`hf download nobody/nothing a.safetensors --revision main`"
    spec = tiny(
        checkpoint,
        adapter="nobody/nothing",
        adapter_file="a.safetensors",
        adapter_revision="main",
    )
    with pytest.raises(FileNotFoundError, match=words):
        teachers.load(spec)


def test_an_adapter_on_the_hub_is_the_file_at_its_revision(checkpoint, adapter, monkeypatch):
    asked = []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        return str(adapter / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    spec = tiny(checkpoint, adapter="some/style", adapter_revision="abc")
    teacher = teachers.load(spec)
    assert set(asked) == {("some/style", ADAPTER, "abc")}
    local = teachers.load(tiny(checkpoint, adapter=str(adapter)))
    assert teacher.fingerprint == local.fingerprint  # the same bytes, wherever they are from
    np.testing.assert_array_equal(teacher.encode(TEXTS), local.encode(TEXTS))


def test_fingerprint_covers_the_adapter_only_where_there_is_one(checkpoint, adapter, tmp_path):
    plain = teachers.fingerprint(tiny(checkpoint))
    assert teachers.fingerprint(tiny(checkpoint, adapter_scale=0.5)) == plain
    assert teachers.fingerprint(tiny(checkpoint, adapter_file="x.safetensors")) == plain
    same = changed(adapter, tmp_path / "same", lambda tensors: tensors)
    again = changed(adapter, tmp_path / "again", lambda tensors: tensors)
    other = changed(adapter, tmp_path / "other", renamed("to_q", "to_v"))
    (again / "README.md").write_text("a model card")
    of = {
        name: teachers.fingerprint(tiny(checkpoint, adapter=str(folder), **more))
        for name, folder, more in (
            ("same", same, {}),
            ("again", again, {}),
            ("other", other, {}),
            ("scale", same, dict(adapter_scale=0.5)),
        )
    }
    assert of["same"] == of["again"]
    assert len({plain, *of.values()}) == 4


def test_compile_is_asked_for_and_changes_no_vector(checkpoint):
    one, two = (teachers.load(tiny(checkpoint, compile=flag)) for flag in (False, True))
    assert teachers.fingerprint(tiny(checkpoint, compile=True)) == one.fingerprint
    assert one.pipeline.unet._compiled_call_impl is None
    assert two.pipeline.unet._compiled_call_impl is not None
    with torch.compiler.set_stance("force_eager"):  # a real compilation takes half a minute
        np.testing.assert_array_equal(two.encode(TEXTS), one.encode(TEXTS))


@pytest.fixture(scope="module")
def painter():
    return teachers.load(profiles.load("cpu").teacher("sd14"))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_painter_alone_is_painter_in_a_batch(painter):
    together = painter.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert cosine(painter.encode([text])[0], vector) > 0.999
    assert max(cosine(together[i], together[j]) for i in range(4) for j in range(i)) < 0.95


def test_painter_reads_words_as_if_there_were_no_padding(painter):
    pipe = painter.pipeline
    ids = pipe.tokenizer(TEXTS[:1], return_tensors="pt").input_ids
    with torch.inference_mode():
        words = pipe.text_encoder(ids).last_hidden_state[0]
        padded = painter._states(TEXTS[:1])[0]
    assert len(padded) == 24 > len(words)
    torch.testing.assert_close(padded[: len(words)], words, atol=1e-4, rtol=1e-4)


def test_painter_paints_what_the_text_says(painter):
    """Colour is the least it must know: the words decide, although each text has its own noise."""
    colours = {"red": 0, "green": 1, "blue": 2}
    for colour, channel in colours.items():
        texts = [f"a {colour} circle", f"a {colour} heart", f"the {colour} square"]
        means = np.mean([np.asarray(p, float) for p in painter.paint(texts)], axis=(0, 1, 2))
        assert means.argmax() == channel, (colour, means)


def test_painter_fits_the_repository_and_its_card_is_measured(painter):
    folder = Path(profiles.resolve("asset:emoji-painter"))
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 12e6
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["guidance_rescale"] == painter.spec.guidance_rescale
    assert measured["settings"]["steps"] == painter.spec.steps
    for group in ("training", "held_out"):
        # the card is only worth having if the weights beside it know more than chance
        found = measured["retrieval"][group]
        assert found["top5"] - 3 * found["top5_se"] > measured["chance"]["top5"]


@pytest.fixture(scope="module")
def styled(painter):
    return teachers.load(painter.spec.model_copy(update={"adapter": "asset:emoji-style"}))


def colour(painter, texts: list[str]) -> float:
    """Mean of the largest minus the smallest of red, green and blue, in 0..1."""
    pictures = np.stack([np.asarray(p, float) for p in painter.paint(texts)]) / 255
    return float((pictures.max(-1) - pictures.min(-1)).mean())


def test_painter_with_its_style_paints_in_black_and_still_what_the_text_says(painter, styled):
    assert styled.fingerprint != painter.fingerprint
    texts = ["a red heart", "the black square", "a smiling face", "a blue circle"]
    assert colour(painter, texts) > 4 * colour(styled, texts)
    heart, square = (styled.encode([t])[0] for t in ("a red heart", "the black square"))
    again = styled.encode(["this is a picture of a heart"])[0]
    assert cosine(heart, again) > cosine(square, again)


def test_painter_style_fits_the_repository_and_its_card_is_measured(painter, styled):
    folder = Path(profiles.resolve("asset:emoji-style"))
    assert (folder / ADAPTER).stat().st_size < 2e6
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["settings"]["steps"] == styled.spec.steps
    assert measured["settings"]["adapter_scale"] == styled.spec.adapter_scale
    assert measured["bytes"] == (folder / ADAPTER).stat().st_size
    for group in ("training", "held_out"):
        own, none = (measured["retrieval"][group][k]["new"] for k in ("with", "without"))
        assert own["top5"] - 3 * own["top5_se"] > measured["chance"]["top5"]
        assert own["cosine_own"] > none["cosine_own"]  # nearer to the new style than without it
