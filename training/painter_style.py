"""Train the style adapter of the emoji painter: a LoRA that paints the same things in another style.

    npm pack @iconify-json/fluent-emoji-high-contrast@1.2.6      # or any registry client; then unpack
    python training/painter_style.py --out WORKDIR --icons package --minutes 25 --threads 1

runs every stage that is not finished yet (data, captions, style, latents, lora, export, evaluate)
and may be killed and started again at any moment. One stage alone: `--stage NAME`. `data` and
`captions` are those of `emoji_painter.py`: in its WORKDIR they are done already. Needs what that
script needs and `resvg-py`.

The painter stays as it is shipped. Every linear and convolution layer of its UNet gets an update of
rank 16 (Hu et al., 2022): text enters this UNet at 4 x 4 only, so an update of attention alone would
hardly reach lines and colours. Pictures, captions and the held-out split are the painter's; only the
style of the pictures is new, so what was held out of the painter is held out here.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_painter import ASSET as PAINTER
from emoji_painter import contiguous_groupnorm, encode, run_stages, train
from painter_data import CLDR, FONT, PIXELS, SEED, make_captions, make_data, read_json, write_json
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from resvg_py import svg_to_bytes
from safetensors.torch import load_file, save_file

ASSET = PAINTER.parent / "emoji-style"
WEIGHTS = "pytorch_lora_weights.safetensors"
RANK, BATCH, RATE = 16, 32, 2e-3
# Module names end in one of these; `time_embedding` and the norms are left alone.
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj",
)  # fmt: skip

# ---------------------------------------------------------------- pictures


def code_points(text: str) -> str:
    """`1f469-200d-1f680`: how the icon set names a sequence; variation selectors do not count."""
    return "-".join(f"{ord(c):x}" for c in text if c != "\ufe0f")


def icons(folder: Path) -> dict[str, str]:
    """Code points -> SVG text, from an unpacked `@iconify-json` package."""
    drawn, names = read_json(folder / "icons.json"), read_json(folder / "chars.json")
    aliases = drawn.get("aliases", {})
    found = {}
    for points, name in names.items():
        icon = drawn["icons"].get(name) or drawn["icons"][aliases[name]["parent"]]
        box = [
            icon.get(k, drawn.get(k, d))
            for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        ]
        found["-".join(p for p in points.split("-") if p != "fe0f")] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" color="black" width="{PIXELS}" '
            f'height="{PIXELS}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )
    return found


def draw(svg: str) -> np.ndarray:
    """One icon on white, as uint8 (64, 64, 3)."""
    png = bytes(svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def make_style(args: argparse.Namespace) -> None:
    """style.npy (m, 64, 64, 3) and style.json (m indices into pictures.json): the same concepts.

    Left out: flags, concepts the set does not draw and pictures it draws twice.
    """
    drawings, seen = icons(args.icons), set()
    pictures, indices = [], []
    for i, entry in enumerate(read_json(args.out / "pictures.json")):
        svg = drawings.get(code_points(entry["emoji"]))
        if entry["flag"] or svg is None:
            continue
        picture = draw(svg)
        if picture.tobytes() not in seen and picture.min() < 255:
            seen.add(picture.tobytes())
            pictures.append(picture)
            indices.append(i)
    np.save(args.out / "style.npy", np.stack(pictures))
    write_json(args.out / "style.json", indices)
    print(f"style: {len(indices)} pictures")


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) as float (n, 3, h, w) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def make_latents(args: argparse.Namespace) -> None:
    """Latents of both styles by the shipped autoencoder; row k of each belongs to style.json[k]."""
    vae = AutoencoderKL.from_pretrained(PAINTER / "vae", torch_dtype=torch.float32).eval()
    rows = read_json(args.out / "style.json")
    new, old = np.load(args.out / "style.npy"), np.load(args.out / "pictures.npy")[rows]
    tensors = {"new": encode(vae, to_tensor(new)), "old": encode(vae, to_tensor(old))}
    save_file(tensors, args.out / "style_latents.safetensors")


# ---------------------------------------------------------------- training


def with_lora() -> UNet2DConditionModel:
    """The shipped UNet, frozen, with a seeded LoRA that changes nothing yet."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel.from_pretrained(PAINTER / "unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    # alpha = rank: the scale is 1 for every program that reads the file
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)))
    return contiguous_groupnorm(unet)


def train_lora(args: argparse.Namespace) -> None:
    data, rows = load_file(args.out / "states.safetensors"), read_json(args.out / "style.json")
    # The painter's training pictures that the new style has: its held-out ones are not in `states`.
    at = {picture: k for k, picture in enumerate(rows)}
    owned = [k for k, picture in enumerate(data["pictures"].tolist()) if picture in at]
    picked = [at[data["pictures"][k].item()] for k in owned]
    latents = load_file(args.out / "style_latents.safetensors")["new"][picked]
    states, offsets = data["states"], data["offsets"][owned]
    scheduler = DDIMScheduler.from_pretrained(PAINTER / "scheduler")
    unet = with_lora()
    adapter = torch.nn.ParameterList([p for p in unet.parameters() if p.requires_grad])
    count = sum(p.numel() for p in adapter)
    print(f"lora: {count} parameters, {len(latents)} pictures", flush=True)

    def loss_at(_, generator):
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        first, captions = offsets[index].unbind(1)
        row = first + (torch.rand(BATCH, generator=generator) * captions).long()
        row = torch.where(torch.rand(BATCH, generator=generator) < 0.1, 0, row)  # the empty text
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator)
        noisy = scheduler.add_noise(latents[index], noise, t)
        target = scheduler.get_velocity(latents[index], noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, t, states[row].float()).sample
        return F.mse_loss(predicted.float(), target)

    averaged = train(args, "lora", adapter, loss_at, args.minutes, RATE, 0.0, 50, 0.998)
    with torch.no_grad():
        for own, average in zip(adapter, averaged, strict=True):
            own.copy_(average)
    save_lora(unet, args.out / "lora")


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """fp16 weights in the layout of `StableDiffusionPipeline.load_lora_weights`."""
    weights = {k: v.half().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    (folder / WEIGHTS).chmod(0o644)


def export(args: argparse.Namespace) -> None:
    """The adapter into the asset folder; before training ends, from its last checkpoint."""
    if (args.out / "lora").exists():
        args.asset.mkdir(parents=True, exist_ok=True)
        (args.asset / WEIGHTS).write_bytes((args.out / "lora" / WEIGHTS).read_bytes())
    else:
        unet, saved = with_lora(), load_file(args.out / "lora.checkpoint.safetensors")
        with torch.no_grad():
            for i, own in enumerate(p for p in unet.parameters() if p.requires_grad):
                own.copy_(saved[f"ema.{i}"])
        save_lora(unet, args.asset)
        print(f"early export: step {int(saved['step'])}")
    write_json(args.out / "style_exported.json", {"bytes": (args.asset / WEIGHTS).stat().st_size})


def evaluate(args: argparse.Namespace) -> None:
    from style_evaluation import evaluate as measure

    result = measure(args.out, args.asset, SEED)
    write_json(args.out / "style_evaluated.json", result)
    print(json.dumps(result["retrieval"], indent=1))


STAGES = dict(  # name -> (function, the file or folder that shows it is done)
    data=(make_data, "pictures.json"),
    captions=(make_captions, "states.safetensors"),
    style=(make_style, "style.json"),
    latents=(make_latents, "style_latents.safetensors"),
    lora=(train_lora, "lora"),
    export=(export, "style_exported.json"),
    evaluate=(evaluate, "style_evaluated.json"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for data, checkpoints and logs"
    )
    parser.add_argument(
        "--icons", type=Path, required=True, help="folder with icons.json and chars.json"
    )
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--asset", type=Path, default=ASSET, help="folder that gets the adapter")
    parser.add_argument("--font", default=FONT)
    parser.add_argument("--cldr", default=CLDR)
    run_stages(parser, STAGES)


if __name__ == "__main__":
    main()
