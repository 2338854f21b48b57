"""Shared parts of the tests: one thread, a store of its own, tiny checkpoints in hub layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ARMADA_OWN"] = str(Path(__file__).with_name("no-own-profiles"))

import pytest
import torch
import yaml

from armada_lib import extraction, profiles, run_data
from armada_lib.profiles import ROOT, StudentSpec

torch.set_num_threads(1)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "over",
    "mat",
    "tree",
    "house",
    "quickly",
    "slowly",
    "red",
    "blue",
    "not",
    "is",
    "was",
    "who",
    "saw",
    "and",
    "but",
]
SENTENCES = [
    "the cat sat on the mat", "a dog ran", "the red bird flew over a blue house and under the tree",
    "who saw the dog", "the bird is not on a tree but under the house", "a cat was slowly on the mat and ran",
    "the dog", "a blue bird saw a red cat quickly",
]  # fmt: skip


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """Every test has an empty run store, and none sees the developer's settings."""
    monkeypatch.setenv("ARMADA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("ARMADA_OWN", str(tmp_path / "own"))
    for name in ("ARMADA_DATA", "ARMADA_PROFILE", "ARMADA_SAVE_EVERY", "ARMADA_NO_GPU"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "store"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, StudentSpec]:
    """Random tiny models of each family, saved as the hub lays them out."""
    from transformers import (
        AutoModel,
        BertConfig,
        BertTokenizerFast,
        DebertaV2Config,
        GPT2Config,
        OPTConfig,
    )

    root = tmp_path_factory.mktemp("checkpoints")
    vocab = root / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    size = len(WORDS) + 5
    common = dict(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    configs = {
        # a wide initialisation: outputs that hardly differ would hide mistakes
        "bert": BertConfig(**common, intermediate_size=64, max_position_embeddings=64, initializer_range=0.3),
        "deberta": DebertaV2Config(
            **common, intermediate_size=64, max_position_embeddings=64, relative_attention=True,
            position_buckets=16, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32,
            initializer_range=0.3,
        ),
        "opt": OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3),
        "gpt2": GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2),
    }  # fmt: skip
    found = {}
    for name, config in configs.items():
        torch.manual_seed(7)
        AutoModel.from_config(config).save_pretrained(root / name)
        BertTokenizerFast(vocab=str(vocab), model_max_length=64).save_pretrained(root / name)
        found[name] = StudentSpec(name=name, checkpoint=str(root / name))
    return found


def tiny_teacher(folder: Path) -> None:
    """A random StableDiffusionPipeline of a few thousand weights, as the hub lays it out."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(1)
    vocab = folder.parent / "teacher-vocab.txt"
    vocab.write_text(
        "\n".join(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                *WORDS,
                *"abcdefghijklmnopqrstuvwxyz.,?!'",
            ]
        )
    )
    text = BertModel(BertConfig(vocab_size=len(vocab.read_text().split("\n")), hidden_size=32, num_hidden_layers=1,
                                num_attention_heads=2, intermediate_size=32, initializer_range=0.5))  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
                          down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        unet=UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, layers_per_block=1,
                                  block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=32,
                                  attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), text_encoder=text,
        tokenizer=BertTokenizerFast(vocab=str(vocab), model_max_length=16),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)


@pytest.fixture(scope="session")
def root(checkpoints, tmp_path_factory) -> Path:
    """A project folder with a profile `tiny`: tiny student, tiny teacher, a few mini rows."""
    base = tmp_path_factory.mktemp("root")
    tiny_teacher(base / "teacher")
    mini = profiles.ROOT / "book" / "data" / "mini"
    for group, task in (("glue", "cola"), ("super_glue", "copa")):
        (base / "book/data/mini" / group / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = (mini / group / task / f"{split}.jsonl").read_text().splitlines()[:24]
            (base / "book/data/mini" / group / task / f"{split}.jsonl").write_text("\n".join(rows))
    raw = yaml.safe_load((profiles.ROOT / "params/profiles/mini.yaml").read_text())
    raw["about"] = "tests"
    raw["students"] = {"bert-6l": {"checkpoint": checkpoints["bert"].checkpoint}}
    raw["teachers"] = {"sd14": {"kind": "image", "checkpoint": str(base / "teacher"), "width": 64, "steps": 2,
                                "guidance": 7.5, "size": 8}}  # fmt: skip
    raw["training"]["default"] = {
        "epochs": 2,
        "batch_size": 8,
        "student_lr": 1e-3,
        "precision": "fp32",
    }
    (base / "params/profiles").mkdir(parents=True)
    (base / "params/profiles/tiny.yaml").write_text(yaml.safe_dump(raw))
    return base


@pytest.fixture
def project(root, monkeypatch):
    monkeypatch.setattr(profiles, "ROOT", root)
    profiles.load.cache_clear()
    run_data._examples.cache_clear()
    extraction.load.cache_clear()
    yield root
    profiles.load.cache_clear()
    run_data._examples.cache_clear()
    extraction.load.cache_clear()


# ------------------------------------------------------------------------------ the built book

SOURCES = ("_config.yml", "_toc.yml", "armada_lib", "book", "params")


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", source, "--path-output", out, "-W", "-n", "--keep-going"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fresh(stamp: Path) -> bool:
    """Whether the last complete build is younger than every source."""
    if not stamp.exists():
        return False
    files = [ROOT / s for s in SOURCES] + [p for s in SOURCES for p in (ROOT / s).rglob("*")]
    files = [p for p in files if p.is_file() and "__pycache__" not in p.parts]
    return max(p.stat().st_mtime for p in files) < stamp.stat().st_mtime


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """`_build/html` if `make book` finished after the last change of a source, else a new build."""
    if fresh(ROOT / "_build" / ".complete"):
        return ROOT / "_build" / "html"
    out = tmp_path_factory.mktemp("book")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def pages(site) -> list[Path]:
    found = sorted(site.rglob("*.html"))
    assert (site / "index.html") in found and (site / "book" / "intro.html") in found
    return [p for p in found if "_static" not in p.parts]
