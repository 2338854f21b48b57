"""Text-to-video teachers: a thin wrapper around diffusers' TextToVideoSDPipeline.

The teacher's vector is read from one film drawn from the text (paper, section 4: 64 frames, 20
steps, guidance 7.5; the readings of "the first frame, 512 × 512" are register A3). The same class runs
ModelScope's 1.7B model and a small film model that shares the layers of an image model.

Noise: the initial latents of a text come from a CPU generator seeded by a hash of the text, so
batch size, order and process count change nothing but rounding.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from armada_lib import profiles, quiet
from armada_lib.teacher_settings import VideoSpec
from armada_lib.teachers import common
from armada_lib.teachers.attention import NARROW, BroadcastAttention
from armada_lib.teachers.common import missing
from armada_lib.teachers.image import _bf16_forward, _text_encoder

RECIPE = "video-1"  # raise it when code below changes the vectors
WEIGHTS = "diffusion_pytorch_model.safetensors"
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue: ITU-R BT.601
MATTER = {"kind", "steps", "guidance", "frames", "size", "readout", "side", "project", "width"}
BLOCK = 4096  # rows of the random projection in memory at a time; it numbers their seeds


def fingerprint(spec: VideoSpec, device: str = "cpu") -> str:
    """sha256 over all that changes the vectors; reads files but loads no weights.

    Raises FileNotFoundError for a checkpoint that is neither on disk nor within reach.
    """
    facts = {
        "recipe": RECIPE,
        "checkpoint": common.identity(spec.checkpoint, spec.revision),
        "spatial": spec.spatial and common.identity(spec.spatial, None),
        "text_encoder": spec.text_encoder and common.identity(spec.text_encoder, None),
        "precision": common.precision(device),
        "settings": spec.model_dump(include=MATTER),
    }
    return common.digest(facts)


def load(spec: VideoSpec, device: str = "cpu") -> VideoTeacher:
    """See `armada_lib.teachers.load`."""
    return VideoTeacher(spec, device)


class VideoTeacher:
    """A frozen text-to-video model as an encoder of texts. See `armada_lib.teachers`.

    ValueError for settings that do not fit the checkpoint, FileNotFoundError without its weights.
    """

    def __init__(self, spec: VideoSpec, device: str = "cpu") -> None:
        self.spec, self.name, self.width, self.device = spec, spec.name, spec.width, device
        self.fingerprint = fingerprint(spec, device)
        self.precision = common.precision(device)
        with quiet.libraries(diffusers=True):
            _check_settings(spec)
            self.pipeline = _pipeline(spec, device, self.precision)
        with torch.inference_mode(), quiet.libraries(diffusers=True):
            self._empty = self._states([""])

    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors of `texts`, float16 (n, width).

        Raises ValueError for an empty text (before any work) and FloatingPointError for a vector
        that is not finite or is constant.
        """

        def vectors(part: list[str]) -> np.ndarray:
            found = self._read(self._latents(part)).cpu().numpy()
            return project(found, self.width) if self.spec.project else found

        return common.in_batches(texts, self.width, self.spec.batch_size, self.name, vectors)

    @torch.inference_mode()
    def film(self, texts: list[str]) -> list[list[Image.Image]]:
        """The films whose latents `encode` reads: for every text, its frames."""
        common.check_texts(texts)
        show = self.pipeline.video_processor.postprocess_video
        latents = (self._latents([text]) for text in texts)  # one film in memory at a time
        return [show(self.pipeline.decode_latents(z), output_type="pil")[0] for z in latents]

    def truncated(self, texts: list[str]) -> int:
        """How many of `texts` are longer than the text encoder reads: their ends are not seen."""
        tokenizer = self.pipeline.tokenizer
        return common.count_longer(texts, tokenizer, tokenizer.model_max_length)

    def _states(self, texts: list[str]) -> torch.Tensor:
        return self.pipeline.encode_prompt(texts, self.device, 1, False)[0]

    @torch.inference_mode()
    def _latents(self, texts: list[str]) -> torch.Tensor:
        """Final latents (n, channels, frames, h, w), drawn but not decoded."""
        with quiet.libraries(diffusers=True):
            states = self._states(texts)
            return self.pipeline(
                prompt_embeds=states,
                negative_prompt_embeds=self._empty.expand_as(states),
                num_inference_steps=self.spec.steps,
                guidance_scale=self.spec.guidance,
                num_frames=self.spec.frames,
                height=self.spec.size,
                width=self.spec.size,
                # One generator a text: the rows of a batch do not share a stream of noise.
                generator=[
                    torch.Generator().manual_seed(common.seed(RECIPE, text)) for text in texts
                ],
                output_type="latent",
            ).frames

    @torch.inference_mode()
    def _read(self, latents: torch.Tensor) -> torch.Tensor:
        """The readout of latents (n, channels, frames, h, w), float32 (n, numbers); register A3.

        "first-grey": the first frame, decoded, in grey between 0 (black) and 1 (white), resized to
        side x side. The other frames are never decoded.
        """
        if self.spec.readout == "latents":
            return latents.float().flatten(1)
        first = latents[:, :, 0]
        if self.spec.readout == "first-latent":
            return first.float().flatten(1)
        vae = self.pipeline.vae
        picture = (vae.decode(first / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(
            0, 1
        )
        grey = torch.einsum("nchw,c->nhw", picture, picture.new_tensor(GREY))[:, None]
        sized = torch.nn.functional.interpolate(
            grey, (self.spec.side,) * 2, mode="bilinear", antialias=True
        )
        return sized.flatten(1)


def project(vectors: np.ndarray, width: int) -> np.ndarray:
    """A seeded random projection of `vectors` (n, numbers) to (n, width), float32.

    y = R x / sqrt(width) with independent random signs R: E |y|^2 = |x|^2 (Achlioptas 2003). R is
    drawn in blocks as it is used, since 262144 × 1024 signs as numbers take a gigabyte.
    """
    numbers = vectors.shape[1]
    out = np.zeros((len(vectors), width), np.float32)
    for at in range(0, numbers, BLOCK):
        rows = vectors[:, at : at + BLOCK].astype(np.float32)
        stream = np.random.default_rng(common.seed(RECIPE, f"projection {numbers} {width} {at}"))
        bits = stream.integers(0, 256, (rows.shape[1], -(-width // 8)), np.uint8)
        signs = np.unpackbits(bits, axis=1, count=width).astype(np.float32) * 2 - 1
        out += rows @ signs
    return out / np.float32(np.sqrt(width))


def _check_settings(spec: VideoSpec) -> None:
    """Raise ValueError for a size or width that does not fit, from the configurations alone."""
    from diffusers import AutoencoderKL
    from diffusers import UNet3DConditionModel as UNet

    where = profiles.resolve(spec.checkpoint)
    home = profiles.resolve(spec.spatial) if spec.spatial else where
    try:
        hub = dict(revision=spec.revision)
        unet = UNet.load_config(where, subfolder="unet", **hub)
        vae = AutoencoderKL.load_config(home, subfolder="vae", **(hub if home == where else {}))
    except OSError as e:
        raise missing(e, where, spec.revision) from e
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    multiple = max(8, factor * 2 ** (len(unet["block_out_channels"]) - 1))
    if spec.size % multiple:
        raise ValueError(f"teacher {spec.name!r}: size {spec.size} is no multiple of {multiple}")
    channels, side = unet["out_channels"], spec.size // factor
    shape = {
        "first-grey": (spec.side, spec.side),
        "first-latent": (channels, side, side),
        "latents": (channels, spec.frames, side, side),
    }[spec.readout]
    numbers = int(np.prod(shape))
    if spec.width > numbers if spec.project else spec.width != numbers:
        raise ValueError(
            f"teacher {spec.name!r}: readout {spec.readout!r} gives {numbers} numbers "
            f"({' x '.join(map(str, shape))}); its width is set to {spec.width}"
            + (", and a projection only makes fewer" if spec.project else "")
        )


def _pipeline(spec: VideoSpec, device: str, mode: str) -> Any:
    """The frozen pipeline on `device`: a hub-style checkpoint, or assembled from parts."""
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline

    where = profiles.resolve(spec.checkpoint)
    load: dict[str, Any] = dict(
        torch_dtype=torch.float16 if mode == "fp16" else torch.float32, use_safetensors=True
    )
    text = _text_encoder(spec.text_encoder, where) if spec.text_encoder else {}
    home = profiles.resolve(spec.spatial) if spec.spatial else None
    if home or (
        (Path(where) / "unet").is_dir() and not (Path(where) / "model_index.json").exists()
    ):
        if not text:
            raise ValueError(
                f"teacher {spec.name!r}: {spec.checkpoint} has no text encoder; set text_encoder"
            )
        pipe = TextToVideoSDPipeline(
            unet=assemble_unet(where, home).to(load["torch_dtype"]),
            vae=AutoencoderKL.from_pretrained(home or where, subfolder="vae", **load),
            scheduler=DDIMScheduler.from_pretrained(where, subfolder="scheduler"),
            **text,
        )
    else:
        # Half-precision weights may be there under the name of a variant (ModelScope's are).
        pipe, errors = None, []
        for variant in ("fp16", None) if mode == "fp16" else (None, "fp16"):
            try:
                pipe = pipe or TextToVideoSDPipeline.from_pretrained(
                    where, revision=spec.revision, variant=variant, **load, **text
                )
            except (OSError, ValueError) as e:  # either, for files that are not there
                errors.append(e)
        if pipe is None:
            raise missing(errors[0], where, spec.revision) from errors[0]
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.vae.enable_slicing()  # frames one by one: memory, and no frame depends on its batch
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        for module in pipe.unet.modules():
            # PyTorch's CPU GroupNorm is about ten times slower on channels-last input.
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        if pipe.unet.config.attention_head_dim <= NARROW:
            pipe.unet.set_attn_processor(BroadcastAttention())
    if mode == "bf16":
        pipe.unet.forward = functools.partial(_bf16_forward, pipe.unet.forward)
    if spec.compile:
        pipe.unet.compile()
    return pipe


def spatial_weights(unet: Any, spatial: str | Path, own: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of the image model in the folder `spatial`, by their name and shape in the 3D `unet`.

    diffusers gives a layer that treats every frame by itself the same name in both models; only a
    1x1 convolution may have become a linear map. Raises ValueError where the number of attention
    heads differs: no shape would show it.
    """
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    folder = Path(spatial) / "unet"
    with torch.device("meta"):
        image = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    here = dict(unet.named_modules())
    for name, module in image.named_modules():
        heads = [getattr(m, "heads", None) for m in (module, here.get(name))]
        narrowed = {f"{name}.to_q.weight", f"{name}.to_k.weight"} <= own.keys()
        if heads[0] != heads[1] and not narrowed:
            raise ValueError(f"{spatial}: layer {name!r} has {heads} heads in image, video model")
    slots = unet.state_dict()
    return {
        name: weight.flatten(1) if name in slots and slots[name].ndim == 2 else weight
        for name, weight in load_file(folder / WEIGHTS).items()
    }


def assemble_unet(folder: str | Path, spatial: str | Path | None) -> Any:
    """The UNet3DConditionModel of `folder`, fp32: weights of an image model, then its own on top.

    `folder` has `unet/config.json` and, in `unet/diffusion_pytorch_model.safetensors`, only the
    weights that differ from the image model in the folder `spatial` (None: all of them). Raises
    ValueError naming the weights that are in neither, or that have no place in the model.
    """
    from diffusers import UNet3DConditionModel
    from safetensors.torch import load_file

    where = Path(folder) / "unet"
    unet = UNet3DConditionModel.from_config(UNet3DConditionModel.load_config(where))
    own = load_file(where / WEIGHTS)
    weights = spatial_weights(unet, spatial, own) | own if spatial else own
    slots = {name: slot.shape for name, slot in unet.state_dict().items()}
    misfits = {
        "in neither model": [name for name in slots if name not in weights],
        "without a place": [n for n, w in weights.items() if slots.get(n) != w.shape],
    }
    for what, names in misfits.items():
        if names:
            raise ValueError(f"{folder}: {len(names)} weights are {what}: {', '.join(names[:8])}")
    unet.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return unet
