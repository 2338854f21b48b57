"""Shared parts of the tests: one thread, a store of its own, tiny checkpoints in hub layout."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from armada_lib.profiles import StudentSpec

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
