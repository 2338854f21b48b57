"""The schema of a teacher's entry in a profile, one class for each kind of teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from armada_lib.settings import Strict


class _Teacher(Strict):
    """What every teacher has: its output becomes one vector of `width` numbers."""

    name: str
    width: int = Field(gt=0)
    batch_size: int = Field(32, gt=0)
    stands_for: str = ""
    note: str = ""

    @property
    def channels(self) -> int | None:
        """Of the square picture that a vector is, channel by channel; None: it is none, but features."""
        return None


class ImageSpec(_Teacher):
    """A text-to-image diffusion model read at its final latent (A2), with or without a LoRA.

    `adapter`: a LoRA folder or hub id, `adapter_file` the safetensors file in it (A5).
    """

    kind: Literal["image"] = "image"
    checkpoint: str
    revision: str | None = None
    text_encoder: str | None = None
    adapter: str | None = None
    adapter_file: str = "pytorch_lora_weights.safetensors"
    adapter_revision: str | None = None
    adapter_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    steps: int = Field(20, gt=0)
    guidance: float = Field(7.5, ge=0)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    size: int = Field(gt=0)
    latent: Literal["flatten", "channel-mean", "two-stage", "full"] = "flatten"
    compile: bool = False

    @property
    def channels(self) -> int | None:
        return 1 if self.latent == "channel-mean" else 4


class VideoSpec(_Teacher):
    """A text-to-video diffusion model (A3).

    `size` x `size` pixels are drawn, `frames` of them. `readout`: the first decoded frame in grey at
    `side` x `side` pixels, the first frame's latent, or all latents. `project`: a recorded, seeded
    random projection to `width` numbers instead of the readout itself.
    """

    kind: Literal["video"] = "video"
    checkpoint: str
    revision: str | None = None
    text_encoder: str | None = None
    spatial: str | None = None  # an image model whose spatial weights and autoencoder it shares
    steps: int = Field(20, gt=0)
    guidance: float = Field(7.5, ge=0)
    frames: int = Field(64, gt=0)
    size: int = Field(256, gt=0)
    readout: Literal["first-grey", "first-latent", "latents"] = "first-grey"
    side: int = Field(512, gt=0)
    project: bool = False
    compile: bool = False

    @property
    def channels(self) -> int | None:
        return None if self.project else {"first-grey": 1, "first-latent": 4}.get(self.readout)


class AudioSpec(_Teacher):
    """A text-to-speech model whose sound is summarised by a fixed encoder (A4).

    `checkpoint`: SpeechT5 with `vocoder`, or `package:hibari` (one voice, its own vocoder).
    `encoder`: a wav2vec2 checkpoint, or "log-mel" for fixed statistics of the log-mel spectrogram.
    `speaker`: a safetensors file of speaker vectors, (n, 512); None draws one fixed vector.
    """

    kind: Literal["audio"] = "audio"
    checkpoint: str
    revision: str | None = None
    vocoder: str | None = None
    vocoder_revision: str | None = None
    encoder: str
    encoder_revision: str | None = None
    speaker: str | None = None
    readout: Literal["mean", "first", "max"] = "mean"
    speakers: Literal["one", "average"] = "one"
    batch_size: int = Field(8, gt=0)


class TextSpec(_Teacher):
    """A text encoder: a control that knows much about the text and has no second modality.

    The vector is the mean over the tokens' last hidden states.
    """

    kind: Literal["text"] = "text"
    checkpoint: str
    revision: str | None = None


class BlackboxSpec(_Teacher):
    """Anything that returns a picture or a sound for a text, and nothing else.

    `source`: "api" (an endpoint that speaks the OpenAI images API), "folder" (files made before) or
    "painter" (an image model of ours, read at its pictures only: a stand-in for a service).
    `folder` keeps what came back, so that no text is asked or paid for twice; None puts it into the
    store; $NAME in it stands for an environment variable. `encoder` turns a picture into a vector:
    "efficientnet-lite0", or the hub id of a CLIP or ResNet checkpoint; a sound by "log-mel" or the
    hub id of a wav2vec2 checkpoint.

    Of an api: `key_variable` names the environment variable that holds the key (None: it asks for
    none), `max_calls` bounds all calls ever made for the folder, `timeout` (seconds) one call, and
    `backoff` (seconds) is the first wait before it is asked again, up to `retries` times.

    ValueError for a source without what it needs: api `base_url` and `model`, folder `folder`,
    painter `painter`.
    """

    kind: Literal["blackbox"] = "blackbox"
    source: Literal["api", "folder", "painter"]
    folder: str | None = None
    encoder: str
    encoder_revision: str | None = None
    painter: ImageSpec | None = None
    base_url: str | None = None
    model: str | None = None
    size: str = Field("512x512", pattern=r"^([1-9]\d{1,4}x[1-9]\d{1,4}|auto)$")
    key_variable: str | None = Field("ARMADA_API_KEY", pattern=r"^[A-Za-z_]\w*$")
    max_calls: int = Field(1000, gt=0)
    concurrency: int = Field(4, gt=0, le=64)
    timeout: float = Field(120.0, gt=0, allow_inf_nan=False)
    retries: int = Field(5, ge=0, le=20)
    backoff: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _complete(self) -> BlackboxSpec:
        needs = {"api": ("base_url", "model"), "folder": ("folder",), "painter": ("painter",)}
        if lacking := [name for name in needs[self.source] if not getattr(self, name)]:
            raise ValueError(f"source {self.source!r} needs {' and '.join(lacking)}")
        return self

    @property
    def checkpoint(self) -> str:
        """What is asked, in the place where other teachers name their checkpoint."""
        painter = self.painter.checkpoint if self.painter else None
        asked = {"api": self.model, "folder": self.folder, "painter": painter}
        return f"{self.source}: {asked[self.source]}"


TeacherSpec = Annotated[
    ImageSpec | VideoSpec | AudioSpec | TextSpec | BlackboxSpec, Field(discriminator="kind")
]
