"""What the style adapter does, measured through `armada_lib.teachers` as the book uses it.

Called by the last stage of `painter_style.py`; writes evaluation.json, loss.png and samples.png
beside the adapter and the measured part of its card. Retrieval is that of `painter_evaluation.py`:
the painted latent of a caption among the latents of 100 pictures, one of them its own, once with the
pictures in the new style and once with the same concepts in the painter's own style.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from painter_evaluation import (
    CANDIDATES,
    SENTENCES,
    fill_card,
    paired,
    pick,
    pool,
    pooled_training_captions,
    retrieval,
    unit,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from armada_lib import profiles, teachers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHTS = "pytorch_lora_weights.safetensors"
STYLES, ADAPTER = ("new", "old"), ("with", "without")


def evaluate(out: Path, asset: Path, seed: int) -> dict:
    captions = json.loads((out / "captions.json").read_text())
    entries = json.loads((out / "pictures.json").read_text())
    rows = json.loads((out / "style.json").read_text())
    at = {picture: k for k, picture in enumerate(rows)}
    latents = {
        k: v.flatten(1).numpy() for k, v in load_file(out / "style_latents.safetensors").items()
    }
    pictures = {"new": np.load(out / "style.npy"), "old": np.load(out / "pictures.npy")[rows]}
    groups = {
        "training": [i for i in rows if not entries[i]["held_out"]],
        "held_out": [i for i in rows if entries[i]["held_out"]],
    }
    trained = [at[i] for i in groups["training"]]
    mean = {style: latents[style][trained].mean(0) for style in STYLES}
    spec = profiles.load("mini").teacher("sd14")
    painters = {
        "with": teachers.load(spec.model_copy(update={"adapter": str(asset)})),
        "without": teachers.load(spec),
    }

    samples, found, colour = {}, {}, {}
    for group, indices in groups.items():
        samples[group] = pick(captions, indices, CANDIDATES, f"{seed}:style:{group}")
        own = [at[i] for i, _ in samples[group]]
        colour[group] = {f"true_{style}": colourfulness(pictures[style][own]) for style in STYLES}
        found[group] = {}
        for adapter, painter in painters.items():
            vectors = painter.encode([text for _, text in samples[group]])
            found[group][adapter] = {
                style: retrieval(vectors, latents[style][own], mean[style]) for style in STYLES
            }
            colour[group][adapter] = colourfulness(decode(painter, vectors))
    own = [at[i] for i, _ in samples["held_out"]]
    near = nearest_text(out, captions, at, painters["with"], [t for _, t in samples["held_out"]])
    nearest = retrieval(latents["new"][near], latents["new"][own], mean["new"])

    result = {
        "retrieval": found,
        "held_out_text_nearest": nearest,
        "held_out_minus_text_nearest": paired(found["held_out"]["with"]["new"], nearest),
        "candidates": CANDIDATES,
        "chance": {"top1": 1 / CANDIDATES, "top5": 5 / CANDIDATES},
        "colourfulness": colour,
        "settings": {
            "steps": spec.steps,
            "guidance": spec.guidance,
            "guidance_rescale": spec.guidance_rescale,
            "adapter_scale": spec.adapter_scale,
            "precision": painters["with"].precision,
        },
        "processor_seconds_per_text": {
            k: seconds(p, [text for _, text in samples["training"]][:64])
            for k, p in painters.items()
        },
        "vae_psnr_held_out": {
            style: psnr(painters["with"], pictures[style][own]) for style in STYLES
        },
        "pictures": {k: len(v) for k, v in groups.items()},
        "captions": sum(len(captions[str(i)]) for i in groups["training"]),
        "training": training_record(out),
        "parameters": sum(v.numel() for v in load_file(asset / WEIGHTS).values()),
        "bytes": (asset / WEIGHTS).stat().st_size,
    }
    (asset / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    fill_card(asset / "README.md", table(result))
    draw_losses(out, asset / "loss.png")
    draw_samples(painters, pictures, at, samples, asset / "samples.png")
    return result


def nearest_text(out: Path, captions: dict, at: dict, painter, texts: list[str]) -> np.ndarray:
    """Painting nothing: for each text the row of the training picture with the nearest caption."""
    pooled, owner = pooled_training_captions(out, captions, painter.pipeline.tokenizer)
    drawn = np.isin(owner, list(at))
    best = (unit(pool(painter, texts)) @ unit(pooled[drawn]).T).argmax(1)
    return np.array([at[i] for i in owner[drawn][best].tolist()])


@torch.inference_mode()
def decode(painter, vectors: np.ndarray) -> np.ndarray:
    """The pictures (n, 64, 64, 3) uint8 of the latents `vectors` (n, 1024)."""
    latents = torch.from_numpy(vectors.astype(np.float32)).view(len(vectors), 4, 16, 16)
    vae = painter.pipeline.vae
    drawn = torch.cat([vae.decode(z).sample for z in latents.split(32)]).clamp(-1, 1)
    return ((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def colourfulness(pictures: np.ndarray) -> float:
    """Mean over all pixels of the largest minus the smallest of red, green, blue, in 0..1."""
    return float((pictures.max(-1).astype(float) - pictures.min(-1)).mean() / 255)


def seconds(painter, texts: list[str]) -> float:
    """Processor seconds a text; on a shared machine the wall clock measures the neighbours."""
    painter.encode(texts[:32])
    began = time.process_time()
    painter.encode(texts)
    return (time.process_time() - began) / len(texts)


@torch.inference_mode()
def psnr(painter, pictures: np.ndarray) -> float:
    """Mean over pictures of the autoencoder's PSNR in dB."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    vae = painter.pipeline.vae
    again = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample for b in x.split(32)])
    error = (again.clamp(-1, 1) - x).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


def read_losses(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "lora"]


def training_record(out: Path) -> dict:
    """Steps and minutes from the checkpoint, and the first and last logged losses."""
    losses = [line["loss"] for line in read_losses(out)]
    with safe_open(out / "lora.checkpoint.safetensors", "pt") as saved:
        steps, spent = saved.get_tensor("step").item(), saved.get_tensor("elapsed").item()
    return {
        "steps": steps,
        "minutes": spent / 60,
        "loss_of_first_50_steps": losses[0],
        "loss_of_last_500_steps": float(np.mean(losses[-10:])),
    }


def table(result: dict) -> str:
    """The measured part of the model card, as Markdown."""
    lines = [
        f"| {result['candidates']} captions | adapter | new style: top-1 | top-5 | mean rank "
        "| painter's style: top-1 | top-5 | mean rank |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group, label in (("training", "training"), ("held_out", "held-out")):
        for adapter in ADAPTER:
            cells = " | ".join(
                f"{r['top1']:.2f} ± {r['top1_se']:.2f} | {r['top5']:.2f} ± {r['top5_se']:.2f} "
                f"| {r['mean_rank']:.1f}"
                for r in (result["retrieval"][group][adapter][style] for style in STYLES)
            )
            lines.append(f"| {label} | {adapter} | {cells} |")
    near, chance, colour = (result[k] for k in ("held_out_text_nearest", "chance", "colourfulness"))
    lines.append(
        "| held-out, nearest training caption's picture (no painting) | | "
        f"{near['top1']:.2f} ± {near['top1_se']:.2f} | {near['top5']:.2f} ± {near['top5_se']:.2f} "
        f"| {near['mean_rank']:.1f} | | | |"
    )
    lines.append(f"| chance | | {chance['top1']:.2f} | {chance['top5']:.2f} | | | | |")
    cosine = {
        adapter: [result["retrieval"]["held_out"][adapter][s]["cosine_own"] for s in STYLES]
        for adapter in ADAPTER
    }
    held, spent, used = colour["held_out"], result["training"], result["settings"]
    gain = ", ".join(
        f"{k.replace('_', ' ')} {d:+.2f} ± {se:.2f}"
        for k, (d, se) in result["held_out_minus_text_nearest"].items()
    )
    facts = {
        "held out, painted minus nearest text (paired)": gain,
        "cosine with the own picture in the new / the painter's style, held out": ", ".join(
            f"{k} adapter {new:.2f} / {old:.2f}" for k, (new, old) in cosine.items()
        ),
        "colourfulness (mean of largest minus smallest channel, 0 to 1), held out": (
            f"painted with {held['with']:.3f}, without {held['without']:.3f}; true new style "
            f"{held['true_new']:.3f}, painter's style {held['true_old']:.3f}"
        ),
        "settings": f"{used['steps']} steps, guidance {used['guidance']}, guidance_rescale "
        f"{used['guidance_rescale']}, adapter_scale {used['adapter_scale']}, {used['precision']}",
        "pictures": f"{result['pictures']['training']} trained, {result['pictures']['held_out']} "
        f"held out; {result['captions']} training captions",
        "training": f"{spent['steps']} steps, {spent['minutes']:.0f} minutes by the clock of a "
        f"shared machine; loss {spent['loss_of_first_50_steps']:.2f} to "
        f"{spent['loss_of_last_500_steps']:.2f}",
        "parameters, file": f"{result['parameters'] / 1e6:.2f} M, {result['bytes'] / 1e6:.2f} MB "
        "(fp16)",
        "autoencoder on held-out pictures": "new style {new:.1f} dB PSNR, painter's style "
        "{old:.1f} dB".format(**result["vae_psnr_held_out"]),
        "processor seconds a text, batch 32, one thread": "with {with:.3f}, without "
        "{without:.3f}".format(**result["processor_seconds_per_text"]),
    }
    lines += ["", "| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())]
    return "\n".join(lines)


def draw_losses(out: Path, path: Path) -> None:
    lines = read_losses(out)
    figure, axis = plt.subplots(figsize=(4.2, 2.6), layout="constrained")
    axis.plot([x["step"] for x in lines], [x["loss"] for x in lines])
    axis.set(title="Adapter: squared error of v", xlabel="step", ylabel="mean of 50 steps")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(painters: dict, pictures: dict, at: dict, samples: dict, path: Path) -> None:
    """The first captions of each seeded sample, none left out: both styles, true and painted."""
    rows = [(text, at[i]) for i, text in samples["held_out"][:18]]
    rows += [(text, at[i]) for i, text in samples["training"][:12]]
    rows += [(text, None) for text in SENTENCES[:6]]
    painted = {k: painter.paint([text for text, _ in rows]) for k, painter in painters.items()}
    blank = np.full((64, 64, 3), 255, np.uint8)
    figure, axes = plt.subplots(12, 3, figsize=(9.6, 11.6), layout="constrained")
    for k, (axis, (text, own)) in enumerate(zip(axes.flat, rows, strict=True)):
        true = [blank if own is None else pictures[style][own] for style in STYLES]
        strip = (true[1], painted["without"][k], true[0], painted["with"][k])
        axis.imshow(np.concatenate([np.asarray(p) for p in strip], 1))
        axis.axis("off")
        words = text if len(text) < 48 else text[:46] + " ..."
        axis.set_title(words.encode("ascii", "replace").decode(), fontsize=6.5)
    figure.suptitle(
        "Each: true picture in the painter's style, painted without the adapter; true picture in the "
        "new style, painted with it.\nRows 1-6: held-out captions. 7-10: training captions. 11-12: "
        "ordinary sentences (no true picture).",
        fontsize=8,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
