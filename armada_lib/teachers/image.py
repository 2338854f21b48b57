"""Text-to-image teachers: a thin wrapper around diffusers' StableDiffusionPipeline.

The teacher's vector is the final latent of one picture drawn from the text (paper, section 4: 20
steps, guidance 7.5). The same class runs Stable Diffusion v1-4 and this project's emoji painter, each
with or without a LoRA (register A5).

Noise: the initial latent of a text is drawn on the CPU from a generator seeded by a hash of the
text, so batch size, order and process count change nothing but rounding (matrix kernels depend on
the batch size): the last digit of float16 in fp32, a cosine above 0.999 under bf16.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from armada_lib import profiles, quiet
from armada_lib.teacher_settings import ImageSpec
from armada_lib.teachers.common import (
    check_texts,
    count_longer,
    digest,
    identity,
    in_batches,
    precision,
    seed,
)

RECIPE = "image-1"  # raise it when code below changes the vectors
STRENGTH = 0.75  # of the image-to-image pass of the two-stage reading (register A2)

# How a latent (n, channels, h, w) becomes a vector; register A2 lists the readings of "32 × 32".
READOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flatten": lambda z: z.flatten(1),
    "channel-mean": lambda z: z.mean(1).flatten(1),
    "two-stage": lambda z: z.flatten(1),
    "full": lambda z: z.flatten(1),
}


def fingerprint(spec: ImageSpec, device: str = "cpu") -> str:
    """sha256 over all that changes the vectors; reads files but loads no weights.

    Raises FileNotFoundError for a checkpoint or adapter that is neither on disk nor within reach.
    """
    facts: dict[str, Any] = {
        "recipe": RECIPE,
        "checkpoint": identity(spec.checkpoint, spec.revision),
        "text_encoder": spec.text_encoder and identity(spec.text_encoder, None),
        "precision": precision(device),
        "settings": spec.model_dump(
            include={"kind", "steps", "guidance", "guidance_rescale", "size", "latent", "width"}
        ),
    }
    if spec.adapter:  # an entry that is there only if set: it leaves other fingerprints as they are
        file = profiles.file_digest(str(_adapter_file(spec)))
        facts["adapter"] = {"file": file, "scale": spec.adapter_scale}
    return digest(facts)


def load(spec: ImageSpec, device: str = "cpu") -> ImageTeacher:
    """See `armada_lib.teachers.load`."""
    return ImageTeacher(spec, device)


class ImageTeacher:
    """A frozen text-to-image model as an encoder of texts. See `armada_lib.teachers`.

    ValueError for settings that do not fit the checkpoint, FileNotFoundError without its weights.
    """

    def __init__(self, spec: ImageSpec, device: str = "cpu") -> None:
        if spec.latent == "two-stage" and spec.guidance_rescale:
            raise ValueError(
                "latent 'two-stage' has no guidance_rescale: image-to-image knows none"
            )
        self.spec, self.name, self.width, self.device = spec, spec.name, spec.width, device
        self.fingerprint = fingerprint(spec, device)
        self.precision = precision(device)
        with quiet.libraries(diffusers=True):
            self.pipeline = _pipeline(spec, device, self.precision)
        self._check_width()
        with torch.inference_mode(), quiet.libraries(diffusers=True):
            self._empty = self._states([""])

    def _check_width(self) -> None:
        pipe, spec = self.pipeline, self.spec
        multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
        if spec.size % multiple or spec.size % 8:
            raise ValueError(
                f"teacher {spec.name!r}: size {spec.size} is no multiple of {max(multiple, 8)}"
            )
        side = spec.size // pipe.vae_scale_factor
        channels = pipe.unet.config.out_channels
        width = READOUTS[spec.latent](torch.empty(1, channels, side, side, device="meta")).shape[1]
        if width != spec.width:
            raise ValueError(
                f"teacher {spec.name!r}: latent {spec.latent!r} at {spec.size} pixels gives "
                f"{width} numbers ({channels} x {side} x {side}); its width is set to {spec.width}"
            )

    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors of `texts`, float16 (n, width).

        Raises ValueError for an empty text (before any work) and FloatingPointError for a vector
        that is not finite or is constant.
        """
        read = READOUTS[self.spec.latent]
        vectors = lambda part: read(self._run(part, "latent").float()).cpu().numpy()
        return in_batches(texts, self.width, self.spec.batch_size, self.name, vectors)

    def paint(self, texts: list[str]) -> list[Image.Image]:
        """The pictures whose latents `encode` returns."""
        check_texts(texts)
        step = self.spec.batch_size
        parts = (list(texts[at : at + step]) for at in range(0, len(texts), step))
        return [picture for part in parts for picture in self._run(part, "pil")]

    def truncated(self, texts: list[str]) -> int:
        """How many of `texts` are longer than the text encoder reads: their ends are not seen."""
        tokenizer = self.pipeline.tokenizer
        return count_longer(texts, tokenizer, tokenizer.model_max_length)

    def _states(self, texts: list[str]) -> torch.Tensor:
        return self.pipeline.encode_prompt(texts, self.device, 1, False)[0]

    @torch.inference_mode()
    def _run(self, texts: list[str], output_type: str) -> Any:
        spec, pipe = self.spec, self.pipeline
        with quiet.libraries(diffusers=True):
            states = self._states(texts)
            call = dict(
                prompt_embeds=states,
                negative_prompt_embeds=self._empty.expand_as(states),
                num_inference_steps=spec.steps,
                guidance_scale=spec.guidance,
                # One generator a text: the rows of a batch do not share a stream of noise.
                generator=[torch.Generator().manual_seed(seed(RECIPE, text)) for text in texts],
            )
            if spec.latent != "two-stage":
                call |= dict(
                    height=spec.size, width=spec.size, guidance_rescale=spec.guidance_rescale
                )
                return pipe(**call, output_type=output_type).images
            drawn = pipe(**call, output_type="pil").images  # at the checkpoint's native size
            small = [
                picture.resize((spec.size, spec.size), Image.Resampling.LANCZOS)
                for picture in drawn
            ]
            second = _image_to_image(pipe)
            return second(**call, image=small, strength=STRENGTH, output_type=output_type).images


def _pipeline(spec: ImageSpec, device: str, mode: str) -> Any:
    """The frozen pipeline on `device`: a hub-style checkpoint, or assembled from parts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet

    where = profiles.resolve(spec.checkpoint)
    load = dict(
        torch_dtype=torch.float16 if mode == "fp16" else torch.float32, use_safetensors=True
    )
    text = _text_encoder(spec.text_encoder, where) if spec.text_encoder else {}
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if (Path(where) / "unet").is_dir() and not (Path(where) / "model_index.json").exists():
        if not text:
            raise ValueError(
                f"teacher {spec.name!r}: {spec.checkpoint} has no text encoder; set text_encoder"
            )
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(where, subfolder="vae", **load),
            unet=UNet.from_pretrained(where, subfolder="unet", **load),
            scheduler=DDIMScheduler.from_pretrained(where, subfolder="scheduler"),
            **text,
            **none,
        )
    else:
        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                where, revision=spec.revision, **load, **text, **none
            )
        except OSError as e:
            revision = f" --revision {spec.revision}" if spec.revision else ""
            raise FileNotFoundError(
                f"teacher {spec.name!r}: the weights of {where} are not here and cannot be "
                f"fetched; get them with `hf download {where}{revision}`"
            ) from e
    pipe.set_progress_bar_config(disable=True)
    if spec.adapter:  # before what follows changes modules and `forward`
        _fuse_adapter(pipe, spec)
    pipe.to(device)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        for module in pipe.unet.modules():
            # PyTorch's CPU GroupNorm is about ten times slower on channels-last input.
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    else:
        pipe.unet.to(memory_format=torch.channels_last)
    if mode == "bf16":
        pipe.unet.forward = functools.partial(_bf16_forward, pipe.unet.forward)
    if spec.compile:
        pipe.unet.compile()
    return pipe


def _adapter_file(spec: ImageSpec) -> Path:
    """The adapter's safetensors file, on disk or from the hub."""
    what = f"teacher {spec.name!r}: the adapter {spec.adapter}"
    if not spec.adapter_file.endswith(".safetensors"):
        raise ValueError(f"{what}: adapter_file {spec.adapter_file!r} is no .safetensors file")
    where = profiles.resolve(str(spec.adapter))
    if Path(where).exists():
        file = Path(where) / spec.adapter_file
        if not file.is_file():
            raise FileNotFoundError(f"{what} has no file {spec.adapter_file} (looked for {file})")
        return file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(where, spec.adapter_file, revision=spec.adapter_revision))
    except Exception as e:  # the hub raises many kinds; all mean "not here"
        revision = f" --revision {spec.adapter_revision}" if spec.adapter_revision else ""
        raise FileNotFoundError(
            f"{what} is not here and cannot be fetched; get it with "
            f"`hf download {where} {spec.adapter_file}{revision}`"
        ) from e


def _fuse_adapter(pipe: Any, spec: ImageSpec) -> None:
    """W + scale alpha / rank B A for every layer of the LoRA (Hu et al., 2022), once.

    Afterwards the modules are those of a pipeline without an adapter: no cost per text. Raises
    ValueError for a file that is no safetensors, or of which any tensor does not fit.
    """
    file = _adapter_file(spec)
    what = f"teacher {spec.name!r}: the adapter {file}"
    other = f"{what} was made for another model than {spec.checkpoint}"
    load = dict(weight_name=file.name, use_safetensors=True)  # or pickle would be tried
    # diffusers only warns of tensors that no layer takes and of layers that get half of theirs
    try:
        tensors, _ = pipe.lora_state_dict(str(file.parent), **load)
        layers = {name for name, _ in pipe.unet.named_modules()}
        for key in sorted(tensors):
            layer = re.split(r"\.(?:lora|processor)", key.removeprefix("unet."))[0]
            if not key.startswith("text_encoder.") and layer not in layers:
                raise ValueError(f"there is no layer for {key}")
        pipe.load_lora_weights(str(file.parent), **load)
        parts = (pipe.unet, pipe.text_encoder)
        taken = sum("lora_" in key for part in parts for key, _ in part.named_parameters())
        if not tensors or taken != len(tensors):
            raise ValueError(f"its layers take {taken} tensors, the file holds {len(tensors)}")
    except SafetensorError as e:
        raise ValueError(f"{what} is no safetensors file ({e})") from e
    except (ValueError, RuntimeError, LookupError) as e:
        wrong = re.search(r"mismatch for (\S+?)(?:\.\w+)?\.weight:.*?(\[.*?]).*?(\[.*?])", str(e))
        if not wrong:
            raise ValueError(f"{other}: {str(e)[:300]}") from e
        raise ValueError(
            f"{other}: {wrong[1]} has shape {wrong[2]} in the file, {wrong[3]} in the model"
        ) from e
    pipe.fuse_lora(lora_scale=spec.adapter_scale, safe_fusing=True)
    pipe.unload_lora_weights()


def _bf16_forward(forward: Callable, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
    """The UNet alone runs in bf16: text states, guidance and the sampler stay in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        return (forward(*args, **kwargs)[0].float(),)


def _text_encoder(reference: str, where: str) -> dict[str, Any]:
    """Tokenizer and encoder in `reference`, set up as `text.json` of the checkpoint says."""
    from transformers import AutoModel, AutoTokenizer

    folder = profiles.resolve(reference)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    # diffusers passes the mask only if asked; without it, padding would change the words' states.
    encoder.config.use_attention_mask = True
    settings = Path(where) / "text.json"
    if settings.exists():
        tokenizer.model_max_length = json.loads(settings.read_text())["tokens"]
    return dict(tokenizer=tokenizer, text_encoder=encoder)


def _image_to_image(pipe: Any) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    second = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    return second
