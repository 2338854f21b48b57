"""Students that generate: a causal language model with LoRA, and ARMADA's branch beside it.

Only the adapter is trained and saved: a distilled student is a plain peft adapter of its base
checkpoint, which loads without this library.
"""

from __future__ import annotations

import contextlib
import io
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from torch import nn

from armada_lib import profiles, quiet
from armada_lib.families import Family, text_mean
from armada_lib.packing import packed
from armada_lib.profiles import StudentSpec
from armada_lib.students import Student, StudentOutput

# Families whose attention goes through transformers' interface and is given the batch's packing.
ARCHITECTURES = ("llama", "mistral", "qwen2", "opt")


FAMILY = Family(
    encoder=lambda m: m.get_base_model().model,
    transform=lambda m, x: x,
    dropout=lambda m, x: x,
    head=lambda m: m.get_base_model().lm_head,
    pooling="mean",
    packs=True,
)


class Decoder(Student):
    """`model` (a `PeftModel`) + training branch.

    forward takes a `Sequences` batch's inputs. In its output `logits` (N, vocabulary) stand for the
    N answer tokens alone, `hidden` (b, d) is the mean over each prompt's tokens (A14), and
    `aux_logits` (b, m) is what the auxiliary head makes of the teacher's vector (A31).
    """

    def __init__(self, model: Any, tokenizer: Any, reconstructs: int) -> None:
        nn.Module.__init__(self)
        self.model, self.tokenizer, self.regression = model, tokenizer, False
        self.family, self.pooling, self.early = FAMILY, FAMILY.pooling, False
        self.width = model.get_base_model().config.hidden_size
        self.outputs = reconstructs
        self.branch: nn.ModuleDict | None = None
        self._full = self._used = None

    def forward(self, inputs: dict[str, Any]) -> StudentOutput:
        own = ("asked", "asked_text", "predict")
        asked, text, predict = (inputs[k] for k in own)
        encoder = self.family.encoder(self.model)
        read = {k: v for k, v in inputs.items() if k not in own}
        states = encoder(**read, use_cache=False).last_hidden_state[0]
        logits = self.family.head(self.model)(states.index_select(0, predict))
        with torch.autocast(states.device.type, enabled=False):
            h = text_mean(states.index_select(0, asked).float(), text, len(inputs["packing"].first))
            if self.branch is None:
                return StudentOutput(logits.float(), h, None, None)
            p = self.branch["projection"](h)
            return StudentOutput(logits.float(), h, p, self.branch["aux_head"](p))

    def prompt_ids(self, text: str) -> np.ndarray:
        """Tokens of a prompt, int64, with the start token once: a chat template writes its own."""
        start = self.tokenizer.bos_token
        special = not (start and text.startswith(start))
        ids = self.tokenizer(text, add_special_tokens=special).input_ids
        return np.asarray(ids, dtype=np.int64)

    def answer_ids(self, text: str) -> np.ndarray:
        """Tokens of what follows a prompt, int64, without special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return np.asarray(ids, dtype=np.int64)

    @property
    def context(self) -> int:
        """How many tokens the model reads at most."""
        return self.model.get_base_model().config.max_position_embeddings

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain peft adapter and the tokenizer; `PeftModel.from_pretrained` reads it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load(
    spec: StudentSpec,
    reconstructs: int,
    seed: int,
    dropout: float | None = None,
    precision: str = "fp32",
) -> Decoder:
    """The causal model behind a student's name with a fresh LoRA adapter drawn from `seed`.

    `dropout` replaces the adapter's own. With precision "bf16" the frozen weights are held in bf16:
    half the memory, and autocast need not cast them anew at every step. The adapter stays in fp32.
    Raises ValueError for an architecture that cannot be packed or a spec without `lora`, before
    weights are read.
    """
    from peft import LoraConfig, get_peft_model

    if spec.lora is None:
        raise ValueError(f"student {spec.name!r} generates and needs a block `lora`")
    where = checkpoint(spec)
    config = transformers.AutoConfig.from_pretrained(where, revision=spec.revision)
    profiles.check(config.model_type, ARCHITECTURES, "generating student architecture")
    options: dict[str, Any] = {}
    if spec.bits == 4:
        from transformers import BitsAndBytesConfig

        if not torch.cuda.is_available():
            raise ValueError(f"student {spec.name!r}: bits 4 needs a CUDA GPU; leave `bits` out")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    with quiet.libraries():
        base = transformers.AutoModelForCausalLM.from_pretrained(
            where,
            revision=spec.revision,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            attn_implementation=packed(),
            **options,
        )
        tokenizer = load_tokenizer(spec)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"student {spec.name!r}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{base.get_input_embeddings().num_embeddings}"
        )
    base.requires_grad_(False)
    if spec.checkpointing:
        base.gradient_checkpointing_enable()
    lora = spec.lora
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout if dropout is None else dropout,
        target_modules=list(lora.targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():  # peft asks transformers for a name that it is about to drop
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, settings)
    return Decoder(model, tokenizer, reconstructs)


def load_tokenizer(spec: StudentSpec) -> Any:
    """The student's tokenizer; where it has no padding token, the end token pads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint(spec), revision=spec.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def checkpoint(spec: StudentSpec) -> str:
    """Where the weights are; a GGUF file is unpacked once, to bf16 safetensors in the store."""
    where = profiles.resolve(spec.checkpoint)
    if spec.gguf is None:
        return where
    root = Path(os.environ.get("ARMADA_STORE") or profiles.ROOT / ".armada")
    digest = profiles.file_digest(str(Path(where) / spec.gguf))[:16]
    home = root / "models" / f"{Path(spec.gguf).stem}-{digest}"
    if not (home / "config.json").exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{home}.lock"):  # two workers would hold the model in memory four times
            if not (home / "config.json").exists():
                _unpack(Path(where), spec.gguf, home)
    return str(home)


def _unpack(folder: Path, file: str, home: Path) -> None:
    """A model read from GGUF refuses to be saved: it is built again from its configuration."""
    # transformers' bar for GGUF heeds no setting: it would stand in the middle of a page
    with quiet.libraries(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32
        )
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)
        plain = type(read)(type(read.config).from_dict(settings))
        plain.load_state_dict(read.state_dict())
        temporary = home.with_name(f"{home.name}.{uuid.uuid4().hex}.tmp")
        plain.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    temporary.rename(home)
