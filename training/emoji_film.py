"""Train the emoji film: the small text-to-video diffusion model that ships with this project.

    python training/emoji_film.py --out WORKDIR --painter PAINTER_WORKDIR --minutes 80

runs every stage that is not finished yet (clips, start, film, export, evaluate) and may be killed
and started again at any moment. One stage alone: `--stage NAME`. PAINTER_WORKDIR holds the pictures
and captions of `training/emoji_painter.py` (its stages `data` and `captions` make them again).

The result is a diffusers TextToVideoSDPipeline without text encoder and autoencoder: 4 frames of
4 x 16 x 16 latents. It is the emoji painter made three-dimensional: frozen spatial weights and
autoencoder of the painter, new temporal layers, and retrained projections of its attention. Only
what was trained is stored. Everything is seeded; learning rates follow elapsed time.

Heads: UNet3DConditionModel takes one number for the width of a spatial head, the number of temporal
heads and the width of the 8 heads in `transformer_in`. The painter's spatial heads are 36 wide; that
would make `transformer_in` larger than the painter. Heads of width 4 are used instead: nine of them
share the best approximation of rank 4 of one old head's query-key product (stage `start`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet3DConditionModel
from emoji_painter import ASSET as PAINTER
from emoji_painter import UNET, contiguous_groupnorm, run_stages, train
from film_data import BATCH, FRAMES, MOTIONS, PASSING, WORDS, make_clips, sentence, text_encoder
from painter_data import SEED, TOKENS, read_json, write_json
from safetensors.torch import load_file, save_file

from armada_lib.teachers.attention import BroadcastAttention

ASSET = PAINTER.with_name("emoji-film")
RANK, PLAIN, EMPTY = 4, 0.2, 0.1
SHARES = [0 if m == "still" else 1 if m in ("turn", "shake", "bounce") else 2 for m in MOTIONS]
SPATIAL = ("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block",
           "cross_attention_dim", "norm_num_groups")  # fmt: skip
FILM = {k: UNET[k] for k in SPATIAL} | dict(
    attention_head_dim=RANK,
    down_block_types=("DownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D", "UpBlock3D"),
)
TEMPORAL = ("transformer_in.", ".temp_convs.", ".temp_attentions.")
# Besides the temporal layers: queries and keys (their heads changed), what the text brings in, and
# the last layers. More would not fit 8 MB; the middle block keeps its values for that reason.
RETRAINED = (".attn1.to_q.", ".attn1.to_k.", ".attn2.to_q.", ".attn2.to_k.", ".attn2.to_v.",
             "up_blocks.2.resnets.1.conv2.", "conv_norm_out.", "conv_out.")  # fmt: skip
KEPT = ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",)

# ---------------------------------------------------------------- the model


def trained(name: str) -> bool:
    """Whether this parameter is trained and stored here; all others are the painter's."""
    return name not in KEPT and any(part in name for part in TEMPORAL + RETRAINED)


def narrow_heads(weights: dict, inputs: dict[str, tuple], heads: int) -> dict:
    """Queries and keys for heads of width RANK in place of the painter's `heads` wide ones.

    The score x' B y of each old head is replaced by its best approximation of rank RANK under the
    second moments of the layer's `inputs`, (queries, keys) by name; a part of y common to all keys
    does not count, as softmax does not see it. Values and outputs keep their order.
    """

    def root(rows):  # square root of the second moment, and its inverse
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        values = values.clamp(min=values.max() * 1e-6).sqrt()
        return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T

    found = {}
    for name, (x, y) in inputs.items():
        (rx, ix), (ry, iy) = (
            root(x.flatten(0, 1)),
            root((y - y.mean(1, keepdim=True)).flatten(0, 1)),
        )
        both = [weights[f"{name}.to_{k}.weight"].double().chunk(heads) for k in "qk"]
        rows = {"q": [], "k": []}
        for q, k in zip(*both, strict=True):
            u, s, v = torch.linalg.svd(rx @ (q.T @ k / math.sqrt(len(q))) @ ry)
            size = s[:RANK, None].sqrt() * RANK**0.25
            for key, part in (("q", u.T[:RANK] @ ix), ("k", v[:RANK] @ iy)):
                rows[key] += [size * part] * (len(q) // RANK)
        found |= {f"{name}.to_{key}.weight": torch.cat(part).float() for key, part in rows.items()}
    return found


@torch.inference_mode()
def make_start(args: argparse.Namespace) -> None:
    """start.safetensors: the painter as a video model that treats every frame by itself."""
    painter = UNet2DConditionModel.from_pretrained(PAINTER / "unet", torch_dtype=torch.float32)
    data, inputs = load_file(args.out / "clips.safetensors"), {}
    table, count = read_json(args.painter / "captions.json"), 256

    def keep(name):
        def hook(_, positional, named):
            x, y = positional[0], named.get("encoder_hidden_states")
            inputs[name] = (x.double(), (x if y is None else y).double())

        return hook

    for name, module in painter.named_modules():
        if name.endswith((".attn1", ".attn2")):
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
    rng, generator = random.Random(f"{SEED}:start"), torch.Generator().manual_seed(SEED)
    rows = torch.randint(len(data["pictures"]), (count,), generator=generator)
    texts = [rng.choice(table[str(int(i))])[0] for i in data["pictures"][rows]]
    states = text_encoder()([t if i % 5 else "" for i, t in enumerate(texts)])
    t = torch.randint(1000, (count,), generator=generator)
    noise = torch.randn((count, 4, 16, 16), generator=generator)
    scheduler = DDIMScheduler.from_pretrained(PAINTER / "scheduler")
    noisy = scheduler.add_noise(data["clips"][rows, 0, 0].float(), noise, t)
    true = painter(noisy, t, states).sample
    torch.manual_seed(SEED)
    film = UNet3DConditionModel(**FILM)
    weights = {k: v.flatten(1) if "proj_" in k and v.ndim == 4 else v
               for k, v in painter.state_dict().items()}  # fmt: skip
    slots = film.state_dict()
    own = {k: v for k, v in slots.items() if k not in weights}
    # Without a last layer, a temporal transformer adds nothing (temp_convs start so by themselves).
    own |= {k: torch.zeros_like(v) for k, v in own.items() if ".proj_out." in f".{k}"}
    own |= narrow_heads(weights, inputs, UNET["attention_head_dim"])
    film.load_state_dict(weights | own)
    same = film(noisy[:, :, None].repeat(1, 1, FRAMES, 1, 1), t, states).sample
    error = ((same - true[:, :, None]).norm() / same.norm()).item()
    print(f"start: velocity differs from the painter's by {error:.3f} of its size (heads narrowed)")
    if error > 0.05 or (same - same[:, :, :1]).abs().max() > 1e-3:
        raise RuntimeError("the inflated model does not paint what the painter paints")
    save_file(
        {k: v.contiguous() for k, v in film.state_dict().items()}, args.out / "start.safetensors"
    )
    write_json(args.out / "start.json", dict(relative_error=error))


def build(args: argparse.Namespace) -> tuple[UNet3DConditionModel, torch.nn.ParameterDict]:
    """The model at its start, and a module of the trained parameters alone (shared with it)."""
    film = UNet3DConditionModel(**FILM)
    film.load_state_dict(load_file(args.out / "start.safetensors"))
    film.set_attn_processor(BroadcastAttention())
    film.requires_grad_(False).eval()  # eval: no dropout in temp_convs, the painter had none
    own = {
        n.replace(".", "/"): p.requires_grad_() for n, p in film.named_parameters() if trained(n)
    }
    return contiguous_groupnorm(film), torch.nn.ParameterDict(own)


def train_film(args: argparse.Namespace) -> None:
    film, own = build(args)
    data, states = load_file(args.out / "clips.safetensors"), text_encoder()
    table, entries = (
        read_json(args.painter / "captions.json"),
        read_json(args.painter / "pictures.json"),
    )
    scheduler = DDIMScheduler.from_pretrained(PAINTER / "scheduler")

    def draw(generator) -> tuple[int, int, str]:
        """Row of `clips`, motion and text of one training example."""
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        row = rng.randrange(len(data["pictures"]))
        picture = int(data["pictures"][row])
        motion = 0 if rng.random() < PLAIN else rng.choices(range(len(MOTIONS)), SHARES)[0]
        verbs = WORDS[MOTIONS[motion]][:-1]
        if MOTIONS[motion] in ("left", "right") and rng.random() < 0.2:
            verbs = PASSING
        if rng.random() < EMPTY:
            return row, motion, ""
        if motion == 0 and rng.random() < 0.8:
            return row, motion, rng.choice(table[str(picture)])[0]
        args_ = (entries[picture], table[str(picture)], MOTIONS[motion], rng.choice(verbs), rng)
        return row, motion, sentence(*args_)

    def loss_at(_, generator):
        rows, motions, texts = zip(*(draw(generator) for _ in range(BATCH)), strict=True)
        clips = (
            data["clips"][list(rows), list(motions)].float().transpose(1, 2)
        )  # (b, 4, F, 16, 16)
        # The noisy end counts most: there the frames settle what moves where, and the frozen
        # painter knows the rest. A quarter of the clips has any noise level, the others 8 t^7.
        share = torch.rand(BATCH, generator=generator)
        t = (
            (1000 * torch.where(torch.arange(BATCH) % 4 > 0, share ** (1 / 8), share))
            .long()
            .clamp(max=999)
        )
        noise = torch.randn(clips.shape, generator=generator)
        noisy, target = (
            scheduler.add_noise(clips, noise, t),
            scheduler.get_velocity(clips, noise, t),
        )
        with torch.autocast("cpu", torch.bfloat16):
            predicted = film(noisy, t, states(list(texts)).float()).sample
        return F.mse_loss(predicted.float(), target)

    ema = train(args, "film", own, loss_at, args.minutes, 1.5e-3, 0.01, 100, 0.997)
    save_own(ema, args.out / "film.safetensors", torch.float32)


def save_own(own: torch.nn.ParameterDict, path: Path, dtype: torch.dtype) -> None:
    save_file(
        {n.replace("/", "."): p.detach().to(dtype).contiguous() for n, p in own.items()}, path
    )


# ---------------------------------------------------------------- export and evaluation


def export(args: argparse.Namespace) -> None:
    """fp16 weights into the asset folder; before the training is finished, from its checkpoint."""
    film, own = build(args)
    if (args.out / "film.safetensors").exists():
        averages = load_file(args.out / "film.safetensors")
        weights = {n: averages[n.replace("/", ".")] for n in own}
    else:
        saved = load_file(args.out / "film.checkpoint.safetensors")
        weights = {n: saved[f"ema.{i}"] for i, n in enumerate(own)}
        print(f"early export: step {int(saved['step'])}")
    own.load_state_dict(weights)
    folder = args.asset / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    film.save_config(folder)
    save_own(own, folder / "diffusion_pytorch_model.safetensors", torch.float16)
    (folder / "diffusion_pytorch_model.safetensors").chmod(0o644)
    DDIMScheduler.from_pretrained(PAINTER / "scheduler").save_pretrained(args.asset / "scheduler")
    write_json(args.asset / "text.json", dict(tokens=TOKENS))
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    if size > 8e6:
        raise RuntimeError(f"the weights take {size / 1e6:.2f} MB, more than 8")
    stored = sum(p.numel() for p in own.values())
    write_json(args.out / "exported.json", dict(bytes=size, parameters=stored))


def evaluate(args: argparse.Namespace) -> None:
    from film_evaluation import evaluate as measure

    result = measure(args.out, args.painter, args.asset, SEED)
    write_json(args.out / "evaluated.json", result)
    print(json.dumps({k: r["by_motion"] for k, r in result["motion"].items()}, indent=1))


STAGES = dict(  # name -> (function, the file that shows it is done)
    clips=(make_clips, "clips.safetensors"),
    start=(make_start, "start.json"),
    film=(train_film, "film.safetensors"),
    export=(export, "exported.json"),
    evaluate=(evaluate, "evaluated.json"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for clips, checkpoints, logs"
    )
    parser.add_argument("--painter", type=Path, required=True, help="--out of emoji_painter.py")
    parser.add_argument("--minutes", type=float, default=80, help="of training")
    parser.add_argument("--asset", type=Path, default=ASSET, help="folder that gets the weights")
    run_stages(parser, STAGES)


if __name__ == "__main__":
    main()
