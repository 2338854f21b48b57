"""A text encoder as a teacher: the upper control, information without a second modality."""

from __future__ import annotations

import numpy as np
import torch

from armada_lib import profiles, quiet
from armada_lib.teacher_settings import TextSpec
from armada_lib.teachers import common

RECIPE = "text-1"  # raise it when code below changes the vectors


def fingerprint(spec: TextSpec, device: str = "cpu") -> str:
    """sha256 over all that changes the vectors; reads files but loads no weights."""
    return common.digest({
        "recipe": RECIPE,
        "checkpoint": profiles.identity(spec.checkpoint, spec.revision),
        "settings": spec.model_dump(include={"kind", "width"}),
    })  # fmt: skip


def load(spec: TextSpec, device: str = "cpu") -> TextTeacher:
    """See `armada_lib.teachers.load`."""
    return TextTeacher(spec, device)


class TextTeacher:
    """The mean of a frozen encoder's token vectors. See `armada_lib.teachers`.

    ValueError for a width that is not the checkpoint's, FileNotFoundError without its weights.
    """

    def __init__(self, spec: TextSpec, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name, self.width, self.batch_size = spec.name, spec.width, spec.batch_size
        self.fingerprint = fingerprint(spec, device)
        with quiet.libraries():
            self.tokenizer = common.pretrained(AutoTokenizer, spec.checkpoint, spec.revision)
            self.model = common.model(AutoModel, spec.checkpoint, spec.revision, device)
        config = self.model.config
        self.limit = min(self.tokenizer.model_max_length, config.max_position_embeddings)
        if config.hidden_size != spec.width:
            raise ValueError(
                f"teacher {spec.name!r}: {spec.checkpoint} gives {config.hidden_size} numbers; "
                f"its width is set to {spec.width}"
            )

    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors of `texts`, float16 (n, width). Raises ValueError for an empty text."""
        return common.in_batches(texts, self.width, self.batch_size, self.name, self._vectors)

    @torch.inference_mode()
    def _vectors(self, texts: list[str]) -> np.ndarray:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(self.model.device)
        states, mask = self.model(**inputs).last_hidden_state, inputs.attention_mask[..., None]
        return ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()

    def truncated(self, texts: list[str]) -> int:
        """How many of `texts` are longer than the encoder reads."""
        return common.count_longer(texts, self.tokenizer, self.limit)
