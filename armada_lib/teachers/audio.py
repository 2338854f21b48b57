"""Text-to-speech teachers: a text is spoken, and the sound becomes 768 numbers (`sound.py`).

SpeechT5 with its vocoder and wav2vec2-base (paper, section 4; the readings are register A4), or a
small packaged voice and the statistics of its log-mel spectrogram.

Chance: SpeechT5 drops activations when it speaks, too. It draws them from one seed, the same for
all texts, and the rows of a batch share them, so a text has no part in what another draws; the
vocoder and wav2vec2, which would see a batch's padding, get one sound at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from armada_lib import profiles, quiet
from armada_lib.teacher_settings import AudioSpec
from armada_lib.teachers import common
from armada_lib.teachers.common import model, pretrained
from armada_lib.teachers.sound import WIDTH, encoder

RECIPE = "audio-1"  # raise it when code below changes the vectors
PACKAGED = "package:hibari"


def fingerprint(spec: AudioSpec, device: str = "cpu") -> str:
    """sha256 over all that changes the vectors; reads files but loads no weights.

    Raises FileNotFoundError for a checkpoint that is neither on disk nor within reach.
    """
    facts = {
        "recipe": RECIPE,
        "checkpoint": profiles.identity(spec.checkpoint, spec.revision),
        "vocoder": spec.vocoder and profiles.identity(spec.vocoder, spec.vocoder_revision),
        "encoder": spec.encoder == "log-mel"
        or profiles.identity(spec.encoder, spec.encoder_revision),
        "speaker": spec.speaker and profiles.identity(spec.speaker, None),
        "settings": spec.model_dump(include={"kind", "readout", "speakers", "width"}),
        "device": torch.device(device).type,  # fp32 on both, but each has its own random numbers
    }
    return common.digest(facts)


def load(spec: AudioSpec, device: str = "cpu") -> AudioTeacher:
    """See `armada_lib.teachers.load`."""
    return AudioTeacher(spec, device)


class AudioTeacher:
    """A frozen text-to-speech model as an encoder of texts. See `armada_lib.teachers`.

    ValueError for settings that do not fit each other, FileNotFoundError without its weights.
    """

    def __init__(self, spec: AudioSpec, device: str = "cpu") -> None:
        self.spec, self.name, self.width = spec, spec.name, spec.width
        _check_settings(spec)
        self.fingerprint = fingerprint(spec, device)
        with quiet.libraries():
            self.encoder = encoder(spec.encoder, spec.encoder_revision, spec.readout, device)
            self.voice = _Hibari(spec) if spec.checkpoint == PACKAGED else _SpeechT5(spec, device)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors of `texts`, float16 (n, width): the mean over the voice's speakers.

        Raises ValueError for a text without a word or character the voice can speak, or whose
        sound is silent or too short, and FloatingPointError for a vector that is not finite or is
        constant.
        """
        step = self.spec.batch_size
        return common.in_batches(texts, self.width, step, self.name, self._vectors)

    def _vectors(self, texts: list[str]) -> np.ndarray:
        total = np.zeros((len(texts), self.width), np.float32)
        for speaker in range(len(self.voice.speakers)):
            for row, (wave, rate) in enumerate(self._speak(texts, speaker)):
                try:
                    total[row] += self.encoder(wave, rate)
                except ValueError as e:
                    raise ValueError(f"teacher {self.name!r}, {texts[row][:60]!r}: {e}") from e
        return total / len(self.voice.speakers)

    def speak(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        """What `encode` hears (its first speaker): float32 (samples,) in [-1, 1] and the rate, Hz.

        ValueError for a text that cannot be spoken.
        """
        common.check_texts(texts)
        step = self.spec.batch_size
        return [s for i in range(0, len(texts), step) for s in self._speak(texts[i : i + step], 0)]

    def truncated(self, texts: list[str]) -> int:
        """How many of `texts` are longer than the voice reads: their ends are not spoken."""
        return self.voice.truncated(list(texts)) if texts else 0

    def _speak(self, texts: list[str], speaker: int) -> list[tuple[np.ndarray, int]]:
        for text in texts:
            if not self.voice.speakable(text):
                raise ValueError(
                    f"teacher {self.name!r}: nothing in {text[:60]!r} can be spoken (no letter or "
                    "number the voice knows)"
                )
        return [(wave, self.voice.rate) for wave in self.voice.speak(texts, speaker)]


def _check_settings(spec: AudioSpec) -> None:
    """Raise ValueError for settings that do not fit each other, before any weights are loaded."""
    packaged, mel = spec.checkpoint == PACKAGED, spec.encoder == "log-mel"
    own = spec.vocoder or spec.speaker or spec.speakers != "one"
    unknown = spec.speakers == "average" and not spec.speaker
    width = WIDTH if mel else _config(spec.encoder, spec.encoder_revision).hidden_size
    for wrong, what in (
        (packaged and own, f"{spec.checkpoint} has one voice, its own vocoder, and no other"),
        (not packaged and not spec.vocoder, "SpeechT5 makes spectrograms, no sounds; set vocoder"),
        (unknown, "speakers 'average' needs a speaker file; set speaker"),
        (mel and spec.readout != "mean", f"encoder 'log-mel' has no readout {spec.readout!r}"),
        (width != spec.width, f"{spec.encoder} gives {width} numbers; width is {spec.width}"),
    ):
        if wrong:
            raise ValueError(f"teacher {spec.name!r}: {what}")


class _Hibari:
    """The packaged voice: 24 kHz, its own vocoder, one speaker, its noise seeded by the text."""

    rate, speakers = 24_000, (None,)

    def __init__(self, spec: AudioSpec) -> None:
        profiles.resolve(spec.checkpoint)  # says how to install it
        try:
            import onnxruntime  # noqa: F401
        except ImportError as e:
            raise FileNotFoundError(
                f"teacher {spec.name!r}: {spec.checkpoint} needs the package onnxruntime; run "
                "`pip install onnxruntime`"
            ) from e
        from hibari import Hibari

        self.model = Hibari(threads=1)  # worker processes share the cores

    def speakable(self, text: str) -> bool:
        return any(sign.isalpha() for spoken in self.model.phonemize(text) for sign in spoken)

    def speak(self, texts: list[str], speaker: int) -> list[np.ndarray]:
        return [self.model(text, seed=common.seed(RECIPE, text)) for text in texts]

    def truncated(self, texts: list[str]) -> int:
        return 0  # sentence by sentence, to the end


class _SpeechT5:
    """SpeechT5 and its vocoder: fp32 on every device, as its steps feed on each other's rounding."""

    def __init__(self, spec: AudioSpec, device: str) -> None:
        from transformers import SpeechT5ForTextToSpeech, SpeechT5HifiGan, SpeechT5Tokenizer

        config = _config(spec.checkpoint, spec.revision)
        self.device, self.speakers = device, _speakers(spec, config.speaker_embedding_dim)
        self.tokenizer = pretrained(SpeechT5Tokenizer, spec.checkpoint, spec.revision)
        self.longest = min(self.tokenizer.model_max_length, config.max_text_positions)
        self.model = model(SpeechT5ForTextToSpeech, spec.checkpoint, spec.revision, device)
        self.vocoder = model(SpeechT5HifiGan, str(spec.vocoder), spec.vocoder_revision, device)
        self.rate = self.vocoder.config.sampling_rate

    def speakable(self, text: str) -> bool:
        known = self.tokenizer.get_vocab().keys() & set(self.tokenizer.tokenize(text))
        return any(sign.isalnum() for token in known for sign in token)

    @torch.inference_mode()
    def speak(self, texts: list[str], speaker: int) -> list[np.ndarray]:
        batch = self.tokenizer(
            texts, truncation=True, max_length=self.longest, padding=True, return_tensors="pt"
        ).to(self.device)
        cuda = [torch.device(self.device)] if torch.device(self.device).type == "cuda" else []
        with torch.random.fork_rng(cuda), quiet.libraries():
            torch.manual_seed(common.seed(RECIPE, "dropout"))
            spectra, lengths = self.model.generate_speech(
                batch.input_ids,
                speaker_embeddings=self.speakers[speaker].expand(len(texts), -1).to(self.device),
                attention_mask=batch.attention_mask,
                return_output_lengths=True,
            )
        # Who never comes to an end is cut at 20 frames a token of the batch's longest text. Its
        # own cut is that of its own tokens: speak it alone.
        limits = batch.attention_mask.sum(1) * 20 - self.model.config.reduction_factor
        waves = []
        for text, spectrum, length, limit in zip(texts, spectra, lengths, limits, strict=True):
            if len(texts) > 1 and length > limit:
                waves += self.speak([text], speaker)
            else:
                waves.append(self.vocoder(spectrum[:length]).cpu().numpy())
        return waves

    def truncated(self, texts: list[str]) -> int:
        with quiet.libraries():
            return sum(len(row) > self.longest for row in self.tokenizer(texts).input_ids)


def _speakers(spec: AudioSpec, width: int) -> torch.Tensor:
    """Speaker vectors (n, width): all of the file, its first, or one drawn vector of length 1."""
    if spec.speaker is None:
        stream = torch.Generator().manual_seed(common.seed(RECIPE, "speaker"))
        return torch.nn.functional.normalize(torch.randn(1, width, generator=stream))
    from safetensors.torch import load_file

    found = list(load_file(profiles.resolve(spec.speaker)).values())
    if len(found) != 1 or found[0].ndim != 2 or not len(found[0]) or found[0].shape[1] != width:
        raise ValueError(
            f"teacher {spec.name!r}: {spec.speaker} must hold one tensor of shape (n, {width}); it "
            f"holds {[list(vectors.shape) for vectors in found]}"
        )
    return found[0].float() if spec.speakers == "average" else found[0][:1].float()


def _config(reference: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    return pretrained(AutoConfig, reference, revision)
