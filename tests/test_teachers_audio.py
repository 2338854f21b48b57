"""Audio teachers: tiny random SpeechT5, vocoder and wav2vec2; the packaged voice; log_mel."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from elsewhere import elsewhere
from safetensors.torch import load_file, save_file
from scipy.signal import resample_poly
from transformers import (
    SpeechT5Config,
    SpeechT5ForTextToSpeech,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    SpeechT5Tokenizer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from armada_lib import profiles, teachers
from armada_lib.teacher_settings import AudioSpec
from armada_lib.teachers import audio, common
from armada_lib.teachers.sound import encoder, log_mel

TEXTS = ["a red heart", "the dog runs", "a red heart and the dog", "tree"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A voice, a vocoder and an encoder with random weights, each in the hub's layout."""
    folder = tmp_path_factory.mktemp("tiny")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "spm"), model_type="char",
        vocab_size=20, hard_vocab_limit=False, minloglevel=2,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = SpeechT5Tokenizer(str(folder / "spm.model"), model_max_length=40)
    tokenizer.save_pretrained(folder / "voice")
    sizes = dict(hidden_size=16, num_mel_bins=8, speaker_embedding_dim=6, positional_dropout=0.0)
    layers = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in dict(layers=1, attention_heads=2, ffn_dim=16).items()
    }
    voice = SpeechT5ForTextToSpeech(
        SpeechT5Config(
            vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes,
            **layers, speech_decoder_prenet_units=8, speech_decoder_postnet_units=8,
            speech_decoder_postnet_layers=2, max_text_positions=30,
        )
    )  # fmt: skip
    with torch.no_grad():  # spectrograms that differ, and ends that depend on what was said
        for name, parameter in voice.named_parameters():
            if parameter.ndim > 1:
                louder = {
                    "feat_out": 8,
                    "encoder_attn": 15,
                    "embed_tokens": 30,
                    "decoder.prenet": 1,
                }
                parameter.mul_(next((n for part, n in louder.items() if part in name), 3))
        voice.speech_decoder_postnet.prob_out.weight.normal_(std=1.0)
        voice.speech_decoder_postnet.prob_out.bias.fill_(-3.0)
    voice.save_pretrained(folder / "voice")
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=16, upsample_rates=[8, 8, 4],
        upsample_kernel_sizes=[16, 16, 8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]], sampling_rate=16000, initializer_range=0.3,
    )  # fmt: skip
    SpeechT5HifiGan(vocoder).save_pretrained(folder / "vocoder")
    ear = Wav2Vec2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8, 8), conv_stride=(5, 8, 8), conv_kernel=(10, 8, 8),
        num_feat_extract_layers=3, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        initializer_range=0.3,
    )  # fmt: skip
    Wav2Vec2Model(ear).save_pretrained(folder / "ear")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "ear")
    save_file({"speakers": torch.randn(3, 6)}, folder / "speakers.safetensors")
    return folder


def tiny(parts, **changes) -> AudioSpec:
    settings = dict(
        name="tiny",
        checkpoint=str(parts / "voice"),
        vocoder=str(parts / "vocoder"),
        encoder=str(parts / "ear"),
        width=12,
        batch_size=3,
    )
    return AudioSpec(**(settings | changes))


def tone(*frequencies: float, seconds: float = 0.5, rate: int = 16000) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return np.sum([np.sin(2 * np.pi * f * t) for f in frequencies], 0).astype(np.float32) / 4


# -- SpeechT5 -----------------------------------------------------------------------------------


def test_vectors_do_not_depend_on_neighbours_order_or_batch_size(parts):
    teacher = teachers.load(tiny(parts))
    before = torch.random.get_rng_state()
    together = teacher.encode(TEXTS)
    assert torch.equal(before, torch.random.get_rng_state())
    assert together.shape == (4, 12) and together.dtype == np.float16
    torch.manual_seed(5)
    alone = np.concatenate([teacher.encode([text]) for text in TEXTS])
    other = teachers.load(tiny(parts, batch_size=2)).encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(alone, together, atol=2e-3)
    np.testing.assert_allclose(other, together, atol=2e-3)
    assert np.abs(together[0] - together[1]).max() > 0.02


def test_encode_is_the_models_called_by_hand(parts):
    vector = teachers.load(tiny(parts)).encode(TEXTS[:1])[0]
    load = lambda kind, part: kind.from_pretrained(parts / part).eval()
    ids = SpeechT5Tokenizer.from_pretrained(parts / "voice")(TEXTS[0], return_tensors="pt")
    drawn = torch.Generator().manual_seed(common.seed(audio.RECIPE, "speaker"))
    speaker = torch.randn(1, 6, generator=drawn)
    torch.manual_seed(common.seed(audio.RECIPE, "dropout"))
    with torch.inference_mode():
        wave = load(SpeechT5ForTextToSpeech, "voice").generate_speech(
            ids.input_ids, speaker / speaker.norm(), vocoder=load(SpeechT5HifiGan, "vocoder")
        )
        heard = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
        states = load(Wav2Vec2Model, "ear")(heard[None]).last_hidden_state[0]
    np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=2e-3)
    for readout, expected in (("first", states[0]), ("max", states.max(0).values)):
        other = teachers.load(tiny(parts, readout=readout)).encode(TEXTS[:1])[0]
        np.testing.assert_allclose(other, expected.numpy(), atol=3e-3, rtol=3e-3)


def test_another_process_gives_the_same_vectors(parts, tmp_path):
    spec = tiny(parts)
    np.testing.assert_array_equal(
        elsewhere(spec, TEXTS, tmp_path), teachers.load(spec).encode(TEXTS)
    )


def test_speak_gives_sounds_that_end_when_their_text_does(parts):
    teacher = teachers.load(tiny(parts))
    sounds = teacher.speak(TEXTS)
    assert {rate for _, rate in sounds} == {16000}
    assert all(w.dtype == np.float32 and 0 < np.abs(w).max() <= 1 for w, _ in sounds)
    assert len({len(w) for w, _ in sounds}) > 1
    for text, (wave, _) in zip(TEXTS, sounds, strict=True):
        np.testing.assert_allclose(teacher.speak([text])[0][0], wave, atol=1e-3)


def test_a_voice_that_finds_no_end_is_cut_at_the_length_of_its_own_text(parts, tmp_path):
    endless = shutil.copytree(parts / "voice", tmp_path / "endless")
    weights = load_file(endless / "model.safetensors")
    weights["speech_decoder_postnet.prob_out.weight"] *= 0
    save_file(weights, endless / "model.safetensors", metadata={"format": "pt"})
    teacher = teachers.load(tiny(parts, checkpoint=str(endless)))
    texts = ["tree", "a red heart"]
    lengths = [len(wave) for wave, _ in teacher.speak(texts)]
    assert lengths == [len(teacher.speak([text])[0][0]) for text in texts]
    assert lengths == [20 * 256 * len(teacher.voice.tokenizer(t).input_ids) for t in texts]


def test_the_speaker_is_drawn_given_or_an_average(parts):
    file = str(parts / "speakers.safetensors")
    drawn, first, average = (
        teachers.load(tiny(parts, **s)).encode(TEXTS[:2])
        for s in (dict(), dict(speaker=file), dict(speaker=file, speakers="average"))
    )
    assert np.abs(drawn - first).max() > 0.005
    single = []
    for row in load_file(file)["speakers"]:
        save_file({"x": row[None].contiguous()}, parts / "one.safetensors")
        single.append(
            teachers.load(tiny(parts, speaker=str(parts / "one.safetensors"))).encode(TEXTS[:2])
        )
    np.testing.assert_array_equal(single[0], first)
    np.testing.assert_allclose(average, np.mean(single, 0), atol=2e-3)


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"a": torch.ones(2, 5)}, r"shape \(n, 6\); it holds \[\[2, 5\]\]"),
        ({"a": torch.ones(6)}, r"holds \[\[6\]\]"),
        ({"a": torch.ones(0, 6)}, r"holds \[\[0, 6\]\]"),
        ({"a": torch.ones(1, 6), "b": torch.ones(1, 6)}, "must hold one tensor"),
    ],
)
def test_a_speaker_file_of_another_shape_is_refused(parts, tmp_path, tensors, words, monkeypatch):
    monkeypatch.setattr(SpeechT5ForTextToSpeech, "from_pretrained", None)
    save_file(tensors, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=words):
        teachers.load(tiny(parts, speaker=str(tmp_path / "s.safetensors")))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(vocoder=None), "set vocoder"),
        (dict(width=768), "gives 12 numbers; width is 768"),
        (dict(encoder="log-mel"), "log-mel gives 768 numbers; width is 12"),
        (dict(encoder="log-mel", width=768, readout="max"), "no readout 'max'"),
        (dict(speakers="average"), "needs a speaker file"),
        (dict(checkpoint="package:hibari"), "its own vocoder"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_weights_are_read(
    parts, changes, words, monkeypatch
):
    monkeypatch.setattr(audio, "model", None)
    with pytest.raises(ValueError, match=words):
        teachers.load(tiny(parts, **changes))


@pytest.mark.parametrize("texts", [["dog", ""], ["  \n"], "dog", [None]])
def test_a_text_without_words_is_refused(parts, texts, monkeypatch):
    teacher = teachers.load(tiny(parts))
    monkeypatch.setattr(teacher, "voice", None)
    for ask in (teacher.encode, teacher.speak):
        with pytest.raises((ValueError, AttributeError), match=r"empty|list of strings"):
            ask(texts)


@pytest.mark.parametrize("text", ["\U0001f600", "...", "狗"])
def test_a_text_with_nothing_to_speak_is_refused(parts, text):
    with pytest.raises(ValueError, match="can be spoken"):
        teachers.load(tiny(parts)).encode(["tree", text])


def test_a_long_text_is_cut_and_counted(parts):
    teacher = teachers.load(tiny(parts))  # 30 positions, fewer than the tokenizer's 40 tokens
    long = "the dog runs and a red heart runs"
    assert teacher.truncated([long, "the dog"]) == 1 and teacher.truncated([]) == 0
    assert np.array_equal(teacher.encode([long]), teacher.encode([long + " and runs"]))


def test_values_that_are_no_numbers_are_an_error(parts, tmp_path):
    ear = shutil.copytree(parts / "ear", tmp_path / "ear")
    weights = load_file(ear / "model.safetensors")
    weights["encoder.layer_norm.bias"][0] = float("nan")
    save_file(weights, ear / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="not finite"):
        teachers.load(tiny(parts, encoder=str(ear))).encode(TEXTS[:1])


def test_a_checkpoint_that_lacks_weights_is_refused(parts, tmp_path):
    ear = shutil.copytree(parts / "ear", tmp_path / "ear")
    weights = load_file(ear / "model.safetensors")
    del weights["feature_projection.projection.bias"]
    save_file(weights, ear / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights.*feature_projection.projection.bias"):
        teachers.load(tiny(parts, encoder=str(ear)))


def test_weights_under_the_names_of_older_releases_are_read(parts, tmp_path):
    """facebook/wav2vec2-base was saved when weight norm kept weight_g and weight_v."""
    ear = shutil.copytree(parts / "ear", tmp_path / "ear")
    weights = load_file(ear / "model.safetensors")
    start = "encoder.pos_conv_embed.conv."
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        weights[start + old] = weights.pop(f"{start}parametrizations.weight.{new}")
    save_file(weights, ear / "model.safetensors", metadata={"format": "pt"})
    sound = tone(440)
    new, old = (encoder(str(path))(sound, 16000) for path in (parts / "ear", ear))
    np.testing.assert_array_equal(new, old)


def test_weights_that_are_only_there_as_a_pickle_are_refused(parts, tmp_path):
    ear = shutil.copytree(parts / "ear", tmp_path / "ear")
    torch.save(load_file(ear / "model.safetensors"), ear / "pytorch_model.bin")
    (ear / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no safetensors weights.*spaces/safetensors"):
        teachers.load(tiny(parts, encoder=str(ear)))


@pytest.mark.parametrize("part", ["checkpoint", "vocoder", "encoder"])
def test_missing_weights_name_the_command_that_gets_them(parts, part, monkeypatch):
    monkeypatch.setattr(profiles, "identity", lambda *_: "hub:nobody/nothing@0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    revision = "revision" if part == "checkpoint" else f"{part}_revision"
    with pytest.raises(FileNotFoundError, match="`hf download nobody/nothing --revision x`"):
        teachers.load(tiny(parts, **{part: "nobody/nothing", revision: "x"}))


def test_fingerprint_covers_what_changes_the_vectors_and_loads_nothing(parts, monkeypatch):
    monkeypatch.setattr(audio, "model", None)
    one = teachers.fingerprint(tiny(parts))
    file = str(parts / "speakers.safetensors")
    changes = [
        dict(width=11), dict(readout="max"), dict(vocoder=str(parts / "ear")),
        dict(encoder="log-mel"), dict(encoder=str(parts / "voice")), dict(speaker=file),
        dict(checkpoint=str(parts / "ear")), dict(speaker=file, speakers="average"),
    ]  # fmt: skip
    others = [teachers.fingerprint(tiny(parts, **c)) for c in changes]
    others.append(teachers.fingerprint(tiny(parts), "cuda"))
    monkeypatch.setattr(audio, "RECIPE", "other")
    others.append(teachers.fingerprint(tiny(parts)))
    monkeypatch.undo()
    assert len({one, *others}) == len(others) + 1
    same = tiny(parts, batch_size=7, name="other", note="x", stands_for="y")
    assert teachers.fingerprint(same) == one == teachers.load(tiny(parts)).fingerprint


# -- encoders of sounds -------------------------------------------------------------------------


def test_log_mel_is_768_finite_numbers_whatever_the_length_loudness_and_rate():
    for seconds in (0.2, 1.0, 3.0):
        vector = log_mel(tone(440, 1000, seconds=seconds), 16000)
        assert vector.shape == (768,) and vector.dtype == np.float32
        assert np.isfinite(vector).all() and vector.min() >= -16
    sound = tone(440, 1000) + 0.01 * np.random.default_rng(0).normal(size=8000).astype(np.float32)
    np.testing.assert_allclose(log_mel(0.1 * sound, 16000), log_mel(sound, 16000), atol=1e-4)
    faster = resample_poly(sound, 3, 2)
    assert np.abs(log_mel(faster, 24000) - log_mel(sound, 16000)).mean() < 0.02


def test_log_mel_hears_pitch_and_when_it_changes():
    low, high = tone(300), tone(3000)
    means = [log_mel(x, 16000).reshape(64, 12)[:, 0] for x in (low, high)]
    centre = 2595 * np.log10(1 + np.array([300, 3000]) / 700)
    first, last = 2595 * np.log10(1 + np.array([60, 7600]) / 700)
    bands = (centre - first) / (last - first) * 65 - 1
    assert np.abs([m.argmax() for m in means] - bands).max() <= 1
    up, down = (log_mel(np.concatenate(p), 16000) for p in ((low, high), (high, low)))
    up, down = up.reshape(64, 12), down.reshape(64, 12)
    np.testing.assert_allclose(up[:, :2], down[:, :2], atol=0.15)  # the same sounds in all
    np.testing.assert_allclose(up[:, 2], -down[:, 2], atol=0.3)  # the first half turned about
    assert up[means[0].argmax(), 2] > 2 and up[means[1].argmax(), 2] < -2


def test_log_mel_is_its_equation():
    """Straight from the docstring: window by window, triangle by triangle."""
    sound = np.random.default_rng(1).normal(size=3000)
    corners = 700 * (
        10 ** (np.linspace(*(2595 * np.log10(1 + np.array([60, 7600]) / 700)), 66) / 2595) - 1
    )
    hertz = np.arange(513) * 16000 / 1024
    power = []
    for start in range(0, len(sound) - 399, 160):
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
        spectrum = np.abs(np.fft.rfft(sound[start : start + 400] * window, 1024)) ** 2
        power.append(
            [spectrum @ np.interp(hertz, corners[b : b + 3], [0, 1, 0]) for b in range(64)]
        )
    x = np.log10(np.maximum(np.array(power) / np.max(power), 1e-8)).T
    T = x.shape[1]
    rows = [
        [row.mean(), row.std()]
        + [2 / T * sum(row * np.cos(np.pi * k * (np.arange(T) + 0.5) / T)) for k in range(1, 11)]
        for row in x
    ]
    np.testing.assert_allclose(log_mel(sound, 16000), np.ravel(rows), atol=1e-4)


@pytest.mark.parametrize(
    "sound, words",
    [
        (np.zeros(8000), "silent"),
        (np.full(8000, np.nan), "not finite"),
        (np.ones((2, 8000)), "one row of samples"),
        (tone(440)[:2000], "too short"),
        (np.zeros(0), "too short"),
    ],
)
def test_a_sound_without_content_is_refused(sound, words):
    with pytest.raises(ValueError, match=words):
        log_mel(sound, 16000)


def test_wav2vec2_hears_a_sound_of_any_rate_and_not_its_loudness(parts):
    hear = encoder(str(parts / "ear"))
    sound = tone(440, 1000)
    assert hear(sound, 16000).shape == (12,)
    np.testing.assert_allclose(hear(0.5 * sound, 16000), hear(sound, 16000), atol=1e-3)
    faster = resample_poly(sound, 3, 2).astype(np.float32)
    near = np.abs(hear(faster, 24000) - hear(sound, 16000)).max()
    assert near < 0.1 * np.abs(hear(tone(2000), 16000) - hear(sound, 16000)).max()


# -- the packaged voice -------------------------------------------------------------------------

absent = [name for name in ("hibari", "onnxruntime") if importlib.util.find_spec(name) is None]
packaged = pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")
HIBARI = AudioSpec(name="voice", checkpoint="package:hibari", encoder="log-mel", width=768)
SENTENCES = [
    "The dog runs to the tree.",
    "She bought 3 apples, and a loaf of bread.",
    "Is it true?",
]


@pytest.fixture(scope="module")
def voice():
    return teachers.load(HIBARI)


@packaged
def test_the_packaged_voice_gives_a_text_its_own_vector(voice):
    together = voice.encode(SENTENCES)
    assert together.shape == (3, 768) and together.dtype == np.float16
    for text, vector in zip(SENTENCES, together, strict=True):
        np.testing.assert_array_equal(voice.encode([text])[0], vector)
    other = teachers.load(HIBARI.model_copy(update=dict(batch_size=2))).encode(SENTENCES[::-1])
    np.testing.assert_array_equal(other[::-1], together)
    assert np.abs(together[0].astype(float) - together[2]).mean() > 0.05
    assert voice.truncated(SENTENCES) == 0


@packaged
def test_the_packaged_voice_speaks_what_encode_hears(voice):
    (wave, rate), _, _ = voice.speak(SENTENCES)
    assert rate == 24000 and wave.dtype == np.float32 and 1 < len(wave) / rate < 6
    np.testing.assert_array_equal(
        voice.encode(SENTENCES[:1])[0], log_mel(wave, rate).astype(np.float16)
    )


@packaged
@pytest.mark.parametrize("text", ["\U0001f600", "...", "狗", ":)"])
def test_the_packaged_voice_refuses_what_it_cannot_speak(voice, text):
    with pytest.raises(ValueError, match="can be spoken"):
        voice.encode(["The dog runs.", text])


@packaged
@pytest.mark.parametrize(
    "changes", [dict(vocoder="x"), dict(speaker="x"), dict(speaker="x", speakers="average")]
)
def test_the_packaged_voice_takes_no_other_parts(changes):
    with pytest.raises(ValueError, match="one voice"):
        teachers.load(HIBARI.model_copy(update=changes))


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install"):
        teachers.load(HIBARI)


def test_the_package_is_not_read_as_a_pickle_but_hashed(parts):
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    assert len(json.dumps(teachers.fingerprint(HIBARI))) == 66
    assert teachers.fingerprint(HIBARI) != teachers.fingerprint(tiny(parts))
