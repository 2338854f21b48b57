"""The schema of every settings block: what may be set, its bounds and its default.

An unknown key is an error, and so is a number outside its bounds. Ambiguities of the paper are named
by their number in the register (A1, A2, ...), which the book lists.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

READINGS = ("paper", "released")
MANIFOLDS = ("cosine", "euclid", "elementwise")


class Unknown(ValueError):
    """A name that does not exist here; the message lists the names that do."""


def check(name: str, valid: Any, what: str) -> str:
    """Return `name`, or raise `Unknown` naming the valid choices and the closest one."""
    names = [str(v) for v in valid]
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise Unknown(f"unknown {what} {name!r}{hint} Valid: {', '.join(sorted(names))}")


class Strict(BaseModel):
    """Base of every settings block: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Strict):
    """The adapter through which a generating student is tuned (A23; the paper gives the rank)."""

    rank: int = Field(8, gt=0)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "v_proj")


class StudentSpec(Strict):
    """A language model to be taught. `pooling` None = what the checkpoint's family uses (A14).

    `layers`: the encoder layers of the checkpoint that are kept, from 0; None = all. With `lora` it
    is a causal model that generates. `gguf`: the file to unpack in a folder without safetensors;
    `bits`: 4 loads it quantised, on a GPU. ValueError for `layers` that do not ascend.
    """

    name: str
    checkpoint: str
    revision: str | None = None
    pooling: Literal["cls", "last", "mean"] | None = None
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    lora: Lora | None = None
    gguf: str | None = None
    bits: Literal[4] | None = None
    checkpointing: bool = False
    stands_for: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _ascending(self) -> StudentSpec:
        if self.layers and (min(self.layers) < 0 or sorted(set(self.layers)) != [*self.layers]):
            raise ValueError("layers must be numbers of 0 or more, each once, in ascending order")
        return self


class OwnTask(Strict):
    """A task of one's own: a table of texts and labels, as .csv, .jsonl or .parquet.

    `train` and `validation` are files, relative to the profile's; without `validation` the share
    `held_out` of the rows is kept for it, drawn once. `texts`: one column, or two that are read
    together. `labels`: the classes, in the order of the outputs; or `scale`: (lowest, highest) of a
    score that is predicted. `metric` None: accuracy, or Pearson's correlation of a score.

    ValueError unless it has either `labels` (two or more, each once) or `scale` (in order), and
    for a `metric` beside a scale.
    """

    train: str
    validation: str | None = None
    texts: tuple[str, ...] = Field(("text",), min_length=1, max_length=2)
    label: str = "label"
    labels: tuple[str, ...] = ()
    scale: tuple[float, float] | None = None
    held_out: float = Field(0.25, gt=0, lt=1)
    metric: Literal["accuracy", "mcc"] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> OwnTask:
        if bool(self.labels) == bool(self.scale):
            raise ValueError("give either `labels`, the names of the classes, or `scale`")
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"`labels` must be two names or more, each once, got {self.labels}")
        if self.scale and not self.scale[0] < self.scale[1]:
            raise ValueError(f"`scale` must be (lowest, highest), got {self.scale}")
        if self.scale and self.metric:
            raise ValueError("a score is judged by Pearson's correlation: leave out `metric`")
        return self


class Training(Strict):
    """The budget and the recipe of one run; every field reaches the run's key."""

    epochs: int = Field(10, gt=0)
    batch_size: int = Field(32, gt=0)
    student_lr: float = Field(2e-5, gt=0, allow_inf_nan=False)
    aligner_lr: float = Field(3e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    warmup: float = Field(0.1, ge=0, le=1)
    schedule: Literal["linear", "constant"] = "linear"
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    max_length: int = Field(128, gt=2)
    train_size: int | None = Field(None, gt=0)
    eval_size: int | None = Field(None, gt=0)
    split: Literal["validation", "holdout"] = "validation"
    select: Literal["last", "best"] = "last"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    dropout: float | None = Field(None, ge=0, lt=1)
    copa: Literal["choice", "pair"] = "choice"
    retract_every: int = Field(10, gt=0)
    aligner: Literal["bottleneck", "direct", "projected", "released"] | None = None
    soft: Literal["norm", "squared", "frobenius", "kl", "mse"] | None = (
        None  # A6; None: the reading's
    )
    distance: Literal["plain", "squared", "literal"] | None = None  # of the manifold losses (A8)
    manifold_to: Literal["student", "both"] = "student"  # A11
    aligner_pretrain: int = Field(0, ge=0)
    projection: Literal["orthogonal", "fixed", "free"] | None = None
    detach: bool = True
    noise: float = Field(0.0, ge=0, allow_inf_nan=False)  # sd added to standardised vectors (A24)
    compile: bool = False
    threshold: float = Field(0.5, gt=0, lt=1)  # of several labels: what probability counts as yes
    # of students that generate:
    template: Literal["alpaca", "plain", "chat"] | None = None
    protocol: Literal["generate", "likelihood", "sample"] | None = None
    new_tokens: int | None = Field(None, gt=0)
    test_size: int | None = Field(None, gt=0)
    # of baselines:
    anchors: int = Field(5, gt=0)  # RCO: checkpoints of the mentor's route
    normalised: bool = True  # PKD: first-token vectors are brought to length 1
    partner_lr: float | None = Field(None, gt=0, allow_inf_nan=False)  # None: the method's own
    layer_epochs: int | None = Field(None, ge=0)  # TinyBERT: epochs of step 1; None: 10 in 13
    pilot_lr: float = Field(5e-5, gt=0, allow_inf_nan=False)  # MetaDistil
    # of baselines that read pictures:
    stage_epochs: int | None = Field(None, gt=0)  # before fine-tuning; None: as many, at least 2
    stage_lr: float | None = Field(
        None, gt=0, allow_inf_nan=False
    )  # None: the profile's student_lr
    regions: int = Field(16, gt=0)  # that a picture is cut into
    match_epochs: int | None = Field(None, ge=0)  # vokens: of the match model; None: a quarter
    vokens: int = Field(50_000, gt=0)  # pictures that a word may be given, at most
    first_epochs: int | None = Field(None, gt=0)  # VidLanKD, X-adapter: of part 1; None: half
    text_encoder: str | None = None  # X-adapter: what its T-expert reads; None: the student's own


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Loss = Literal["cosine", "euclid", "elementwise"]


class Weights(Strict):
    """alpha, beta, gamma and tau of Eq. 2 and the total loss; beta may differ by manifold loss.

    `tasks`: another beta for single tasks, whose task loss has gradients of another size.
    """

    alpha: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    beta: Amount | dict[Loss, Amount] = 1.0
    gamma: Amount = 1.0
    tau: float = Field(5.0, gt=0, allow_inf_nan=False)

    tasks: dict[str, Amount | dict[Loss, Amount]] = {}

    def of(self, manifold: str, task: str = "") -> float:
        """beta of that manifold loss on that task."""
        beta = self.tasks.get(task, self.beta)
        return dict(beta)[manifold] if isinstance(beta, dict) else beta  # type: ignore[index]
