"""What the emoji painter can do, measured through `armada_lib.teachers` as the book uses it.

Called by the last stage of `emoji_painter.py`; writes evaluation.json, loss.png and samples.png
beside the weights. Retrieval: the painted latent of a caption against the latents of 100 pictures,
one of them its own (training mean removed, cosine). The text reference paints nothing: it takes the
training picture whose caption is nearest in the text encoder's mean-pooled space.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from armada_lib import profiles, teachers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CANDIDATES, DECISION, RESCALES = 100, 150, (0.0, 0.7)
SENTENCES = (
    "a man is playing a guitar", "the dog runs across the field", "she was very angry",
    "the ship sails over the ocean", "we ate pizza for dinner", "the economy shrank last year",
    "it is snowing in the mountains", "he sent her a letter",
)  # fmt: skip


def retrieval(vectors: np.ndarray, candidates: np.ndarray, mean: np.ndarray) -> dict:
    """Rank of each row's own candidate among all; both (n, width), row i belongs to candidate i."""
    a, b = (unit(x.astype(np.float64) - mean) for x in (vectors, candidates))
    cosine = a @ b.T
    own = np.diag(cosine)
    rank = (cosine > own[:, None]).sum(1)
    n = len(own)
    result = {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean())}
    for key in ("top1", "top5"):
        result[f"{key}_se"] = float(np.sqrt(result[key] * (1 - result[key]) / n))
    other = (cosine.sum() - own.sum()) / (n * (n - 1))
    return result | {
        "mean_rank": float(rank.mean() + 1),
        "cosine_own": float(own.mean()),
        "cosine_other": float(other),
        "n": n,
        "ranks": (rank + 1).tolist(),
    }


def paired(a: dict, b: dict) -> dict[str, list[float]]:
    """Difference a - b over the same captions, with its standard error."""
    x, y = np.array(a["ranks"]), np.array(b["ranks"])
    differences = {
        "top1": (x <= 1) * 1.0 - (y <= 1),
        "top5": (x <= 5) * 1.0 - (y <= 5),
        "mean_rank": (x - y) * 1.0,
    }
    return {
        k: [float(d.mean()), float(d.std(ddof=1) / len(d) ** 0.5)] for k, d in differences.items()
    }


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pick(table: dict, indices: list[int], n: int, seed: str) -> list[tuple[int, str]]:
    """`n` pictures and for each one of its captions that hold the whole name; seeded."""
    rng = random.Random(seed)
    return [
        (i, rng.choice([text for text, named in table[str(i)] if named]))
        for i in rng.sample(indices, n)
    ]


def pooled_training_captions(out: Path, table: dict, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Mean-pooled states of all training captions (m, 384) and the picture of each (m,)."""
    data = load_file(out / "states.safetensors")
    owner = np.repeat(data["pictures"].numpy(), data["offsets"][:, 1].numpy())
    texts = [text for i in data["pictures"].tolist() for text, _ in table[str(i)]]
    tokens = data["states"].shape[1]
    length = torch.tensor([min(len(row), tokens) for row in tokenizer(texts).input_ids])
    mask = (torch.arange(tokens) < length[:, None]).float()
    sums = [
        torch.einsum("bte,bt->be", s.float(), m)
        for s, m in zip(data["states"][1:].split(512), mask.split(512), strict=True)
    ]
    return (torch.cat(sums) / length[:, None]).numpy(), owner


def pool(teacher, texts: list[str]) -> np.ndarray:
    pipe = teacher.pipeline
    batch = pipe.tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
        max_length=pipe.tokenizer.model_max_length,
    )
    with torch.inference_mode():
        states = pipe.text_encoder(batch.input_ids, attention_mask=batch.attention_mask)[0]
    mask = batch.attention_mask[..., None]
    return ((states * mask).sum(1) / mask.sum(1)).numpy()


def evaluate(out: Path, asset: Path, seed: int) -> dict:
    entries = json.loads((out / "pictures.json").read_text())
    captions = json.loads((out / "captions.json").read_text())
    pictures = np.load(out / "pictures.npy")
    latents = load_file(out / "latents.safetensors")["latents"].flatten(1).numpy()
    groups = {
        "training": [int(i) for i in captions if not entries[int(i)]["held_out"]],
        "held_out": [int(i) for i in captions if entries[int(i)]["held_out"]],
    }
    mean = latents[groups["training"]].mean(0)
    spec = profiles.load("mini").teacher("sd14")
    spec = spec.model_copy(update={"checkpoint": str(asset)})

    # What guidance_rescale would change, on training captions only; the profile's own value is used.
    decision = pick(captions, groups["training"], DECISION, f"{seed}:decision")
    choice = {}
    for rescale in RESCALES:
        one = teachers.load(spec.model_copy(update={"guidance_rescale": rescale}))
        vectors = one.encode([text for _, text in decision])
        choice[rescale] = retrieval(vectors, latents[[i for i, _ in decision]], mean)
    teacher = teachers.load(spec)

    results, samples = {}, {}
    for name, indices in groups.items():
        samples[name] = pick(captions, indices, CANDIDATES, f"{seed}:{name}")
        own = [i for i, _ in samples[name]]
        texts = [text for _, text in samples[name]]
        vectors = teacher.encode(texts)
        results[name] = retrieval(vectors, latents[own], mean)
        results[name]["deviation"] = float(vectors.astype(np.float64).std())
        results[name]["deviation_of_pictures"] = float(latents[own].std())
        if name == "held_out":
            train = unit(latents[groups["training"]] - mean)
            for key, rows in (("painted", vectors), ("true", latents[own])):
                nearest = (unit(rows.astype(np.float64) - mean) @ train.T).max(1)
                results[name][f"nearest_training_cosine_{key}"] = float(nearest.mean())
            pooled, owner = pooled_training_captions(out, captions, teacher.pipeline.tokenizer)
            near = owner[(unit(pool(teacher, texts)) @ unit(pooled).T).argmax(1)]
            results["held_out_text_nearest"] = retrieval(latents[near], latents[own], mean)

    texts = [text for _, text in samples["training"]][:64]
    teacher.encode(texts[:32])
    began, busy = time.perf_counter(), time.process_time()
    teacher.encode(texts)
    seconds = (time.perf_counter() - began) / len(texts)
    # On a shared machine the wall clock measures the neighbours; processor time does not.
    busy = (time.process_time() - busy) / len(texts)

    result = {
        "retrieval": results,
        "held_out_minus_text_nearest": paired(
            results["held_out"], results["held_out_text_nearest"]
        ),
        "candidates": CANDIDATES,
        "chance": {
            "top1": 1 / CANDIDATES,
            "top5": 5 / CANDIDATES,
            "mean_rank": (CANDIDATES + 1) / 2,
        },
        "guidance_rescale": spec.guidance_rescale,
        "guidance_rescale_choice_on_training_captions": choice,
        "settings": {
            "steps": spec.steps,
            "guidance": spec.guidance,
            "precision": teacher.precision,
        },
        "seconds_per_text": seconds,
        "processor_seconds_per_text": busy,
        "threads": torch.get_num_threads(),
        "vae_psnr_held_out": psnr(teacher, pictures, entries),
        "pictures": {k: len(v) for k, v in groups.items()},
        "captions": sum(len(captions[str(i)]) for i in groups["training"]),
        "training": training_record(out),
        "bytes": {
            str(p.relative_to(asset)): p.stat().st_size
            for p in sorted(asset.rglob("*.safetensors"))
        },
        "parameters": {
            k: sum(p.numel() for p in getattr(teacher.pipeline, k).parameters())
            for k in ("vae", "unet")
        },
    }
    (asset / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    fill_card(asset / "README.md", table(result))
    draw_losses(out, asset / "loss.png")
    draw_samples(teacher, pictures, samples, asset / "samples.png")
    return result


ROWS = {
    "training": "painted from training captions",
    "held_out": "painted from held-out captions",
    "held_out_text_nearest": "held-out captions, nearest training caption's picture (no painting)",
}


def table(result: dict) -> str:
    """The measured part of the model card, as Markdown."""
    chance = result["chance"]
    lines = [
        f"| {result['candidates']} captions | top-1 | top-5 | mean rank | cosine own / other |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, label in ROWS.items():
        r = result["retrieval"][key]
        shares = " | ".join(f"{r[k]:.2f} ± {r[k + '_se']:.2f}" for k in ("top1", "top5"))
        cosines = " / ".join(f"{round(r[f'cosine_{k}'], 2) + 0:.2f}" for k in ("own", "other"))
        lines.append(f"| {label} | {shares} | {r['mean_rank']:.1f} | {cosines} |")
    lines.append(
        f"| chance | {chance['top1']:.2f} | {chance['top5']:.2f} | {chance['mean_rank']:.1f} | |"
    )
    gain = ", ".join(
        f"{k.replace('_', ' ')} {d:+.2f} ± {se:.2f}"
        for k, (d, se) in result["held_out_minus_text_nearest"].items()
    )
    held, used = result["retrieval"]["held_out"], result["settings"]
    nearest = [held[f"nearest_training_cosine_{k}"] for k in ("painted", "true")]
    choice = ", ".join(
        f"{k}: {v['top1']:.2f} / {v['top5']:.2f}"
        for k, v in result["guidance_rescale_choice_on_training_captions"].items()
    )
    facts = {
        "settings": f"{used['steps']} steps, guidance {used['guidance']}, "
        f"guidance_rescale {result['guidance_rescale']}, {used['precision']}",
        f"guidance_rescale, top-1 / top-5 on {DECISION} other training captions": choice,
        "held out, painted minus nearest text (paired)": gain,
        "pictures with captions": f"{result['pictures']['training']} trained, "
        f"{result['pictures']['held_out']} held out; {result['captions']} training captions",
        "training": "; ".join(
            f"{k} {v['steps']} steps, {v['minutes']:.0f} minutes"
            for k, v in result["training"].items()
        ),
        "parameters": ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in result["parameters"].items()),
        "weights": f"{sum(result['bytes'].values()) / 1e6:.2f} MB (fp16)",
        "autoencoder, held-out pictures": f"{result['vae_psnr_held_out']:.1f} dB PSNR",
        "seconds a text, batch 32": f"{result['processor_seconds_per_text']:.3f} by processor, "
        f"{result['seconds_per_text']:.3f} by the clock of a shared machine "
        f"({result['threads']} thread)",
        "deviation of painted / true latents": f"{held['deviation']:.2f} / "
        f"{held['deviation_of_pictures']:.2f} (held out)",
        "nearest training latent, cosine": f"painted {nearest[0]:.2f}, true held-out pictures "
        f"{nearest[1]:.2f} (a copy would be near 1)",
    }
    lines += ["", "| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())]
    return "\n".join(lines)


def fill_card(path: Path, measured: str) -> None:
    """Put `measured` between the two marks of the model card."""
    start, end = "<!-- measured -->", "<!-- /measured -->"
    text = path.read_text()
    head, tail = text.split(start)[0], text.split(end)[1]
    path.write_text(f"{head}{start}\n\n{measured}\n\n{end}{tail}")


@torch.inference_mode()
def psnr(teacher, pictures: np.ndarray, entries: list[dict]) -> float:
    """Mean over held-out pictures of the reconstruction's PSNR in dB, exported weights."""
    x = torch.from_numpy(pictures[[e["held_out"] for e in entries]]).permute(0, 3, 1, 2) / 127.5 - 1
    vae = teacher.pipeline.vae
    again = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample for b in x.split(64)])
    error = (again.clamp(-1, 1) - x).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


def read_losses(out: Path) -> dict[str, list[dict]]:
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    return {stage: [x for x in lines if x["stage"] == stage] for stage in ("vae", "unet")}


def training_record(out: Path) -> dict[str, dict]:
    """Steps and minutes of both trainings from their checkpoints, and the last logged losses."""
    found = {}
    for stage, lines in read_losses(out).items():
        with safe_open(out / f"{stage}.checkpoint.safetensors", "pt") as saved:
            steps, seconds = saved.get_tensor("step").item(), saved.get_tensor("elapsed").item()
        last = float(np.mean([x["loss"] for x in lines[-10:]]))
        found[stage] = {"steps": steps, "minutes": seconds / 60, "loss_of_last_500_steps": last}
    return found


def draw_losses(out: Path, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    titles = {"vae": "Autoencoder: |e| + e² + KL", "unet": "UNet: squared error of v"}
    for axis, (stage, lines) in zip(axes, read_losses(out).items(), strict=True):
        loss = np.array([x["loss"] for x in lines])
        minutes = [x["minutes"] for x in lines]
        axis.plot(minutes, loss, color="0.8", lw=0.8)
        smooth = np.convolve(np.pad(loss, 4, mode="edge"), np.ones(9) / 9, "valid")
        axis.plot(minutes, smooth, color="C0")
        axis.set(
            title=titles[stage], xlabel="minutes of training", yscale="log", ylim=(None, loss[1])
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(teacher, pictures: np.ndarray, samples: dict, path: Path) -> None:
    """The first captions of each seeded sample, none left out: true picture, painted picture."""
    rows = [(text, pictures[i]) for i, text in samples["held_out"][:20]]
    rows += [(text, pictures[i]) for i, text in samples["training"][:12]]
    rows += [(text, None) for text in SENTENCES]
    painted = teacher.paint([text for text, _ in rows])
    figure, axes = plt.subplots(10, 8, figsize=(9.6, 13.2), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for k, ((text, true), own) in enumerate(zip(rows, painted, strict=True)):
        left, right = axes[k // 4, 2 * (k % 4)], axes[k // 4, 2 * (k % 4) + 1]
        if true is not None:
            left.imshow(true)
        right.imshow(own)
        words = text if len(text) < 44 else text[:42] + " ..."
        words = words.encode("ascii", "replace").decode()  # the figure's font has no other script
        right.set_title(words, fontsize=6.5, loc="right")
    figure.suptitle(
        "Left true, right painted. Rows 1-5: held-out captions. 6-8: training captions. "
        "9-10: ordinary sentences (no true picture).",
        fontsize=8,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
