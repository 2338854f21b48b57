"""The TS Aligner: a small network that learns the task from the vectors of a frozen teacher.

    h_t (b, m) -> map -> hidden (b, h) -> output head    -> logits (b, c)
                           |
                           +-> orthogonal projection (b, k) -> auxiliary head -> aux_logits (b, c)

Projections are plain weights that `retract_` brings back to the orthogonal matrices after an
optimiser step (every step, or every few): starting orthogonal does not keep them so, and a
parametrisation costs up to several times the step. Tags such as [A1] name choices the paper
leaves open.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATION = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
# What a form means unless the caller says otherwise [A1, A19, A34].
FORM: dict[str, dict[str, Any]] = {
    "bottleneck": {"hidden": 768, "dropout": 0.0, "activation": "tanh"},
    "direct": {"hidden": 768, "dropout": 0.0, "activation": "tanh"},
    "projected": {"hidden": 768, "dropout": 0.0, "activation": "tanh"},
    "released": {"hidden": 512, "dropout": 0.1, "activation": "relu"},
}
BOTTLENECK = 128
# A square map of the raw vector: 8192 × 8192 is 268 MB and its QR takes minutes on a CPU.
RELEASED_MAX_WIDTH = 8192


@torch.no_grad()
def retract_(weight: Tensor) -> Tensor:
    """Replace `weight` (rows, columns) by the orthogonal factor of its QR decomposition, in place.

    Tall: orthonormal columns, W'W = I. Wide: orthonormal rows, WW' = I. Signs follow the diagonal
    of R, so an orthogonal matrix stays what it is and a small step stays a small step. Computed in
    float32. ValueError if `weight` is not a matrix. Keeps the paper's projections orthogonal [A16].
    """
    if weight.ndim != 2:
        raise ValueError(f"only a matrix can be orthogonal, got shape {tuple(weight.shape)}")
    tall = weight.shape[0] > weight.shape[1]
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Not linalg.qr, which also copies R out; a transposed view is LAPACK's own layout.
    a, tau = torch.geqrf(w if tall else w.T)
    q = torch.linalg.householder_product(a, tau).mul_(torch.where(a.diagonal() < 0, -1.0, 1.0))
    return weight.copy_(q if tall else q.T)


@torch.no_grad()
def drift(weight: Tensor) -> float:
    """Largest |W'W - I| (|WW' - I| if wide) of `weight` (rows, columns).

    0 for an orthogonal matrix [A16], about 1e-6 in float32.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    gram = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
    return float((gram - torch.eye(len(gram), dtype=w.dtype, device=w.device)).abs().max())


@torch.no_grad()
def orthogonal_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill `weight` (rows, columns) with a random (semi-)orthogonal matrix, in place [A16].

    Uniformly distributed.
    """
    return retract_(weight.normal_(generator=generator))


class AlignerOutput(NamedTuple):
    """What the aligner gives for b teacher vectors."""

    logits: Tensor  # (b, c), o_ts
    hidden: Tensor  # (b, h), h'_ts
    projection: Tensor  # (b, k), p_ts
    aux_logits: Tensor  # (b, c), a_ts


class TSAligner(nn.Module):
    """Teacher vectors (b, width) -> `AlignerOutput`. Four readings of the paper [A1]:

    * "bottleneck" (default): Linear(m, 128), act, Linear(128, hidden), act; the learned projection
      is `shared` x `hidden`. For m = 1024: 819,200 weights, the "0.8M" of the paper.
    * "direct": Linear(m, hidden), act; the projection is fixed (a buffer): 786,432 weights.
    * "projected": a fixed random map m -> 128, the width of Table 1, then Linear(128, hidden), act:
      688,128 trained weights.
    * "released": Linear(m, 512), ReLU, dropout, twice; weights N(0, 0.02), biases 0; the learned
      projection is m x m and maps the *raw* vector, so the shared width is m.

    `outputs` is c: classes, labels, 1 for regression, or m to reconstruct the vector [A31].
    `hidden`, `dropout`, `activation` and `shared` left at None take the values of the form (768,
    0.0, "tanh", 768; released 512, 0.1, "relu", m). `projection_bias` adds a bias to the
    projection, which is then affine and no longer inverted by its transpose.

    Construction draws from `seed` alone and leaves the global random state untouched: adding an
    aligner never changes a student built, or trained with dropout, after it.

    ValueError: unknown form or activation, sizes below 1, dropout outside [0, 1), `shared` other
    than m or m above 8192 for "released".
    """

    projection: Tensor
    reduce: Tensor

    def __init__(
        self,
        width: int,
        outputs: int,
        form: str = "bottleneck",
        hidden: int | None = None,
        shared: int | None = None,
        dropout: float | None = None,
        activation: str | None = None,
        projection_bias: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if form not in FORM:
            raise ValueError(f"unknown aligner form {form!r}; choose one of {sorted(FORM)}")
        released = form == "released"
        hidden = FORM[form]["hidden"] if hidden is None else hidden
        dropout = FORM[form]["dropout"] if dropout is None else dropout
        activation = FORM[form]["activation"] if activation is None else activation
        if activation not in ACTIVATION:
            raise ValueError(f"unknown activation {activation!r}; choose of {sorted(ACTIVATION)}")
        if released and shared not in (None, width):
            raise ValueError(
                f"form 'released' projects the raw vector, so its shared width is {width}, "
                f"not {shared}; leave `shared` out, or choose form 'bottleneck' or 'direct'"
            )
        shared = (width if released else 768) if shared is None else shared
        if min(width, outputs, hidden, shared) < 1:
            raise ValueError(f"sizes must be >= 1, got {width=}, {outputs=}, {hidden=}, {shared=}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if released and width > RELEASED_MAX_WIDTH:
            raise ValueError(
                f"form 'released' needs a {width} x {width} projection ({width**2 * 4 / 1e9:.1f} "
                f"GB; at most {RELEASED_MAX_WIDTH} wide): choose form 'bottleneck' or 'direct', "
                "or first reduce the teacher vectors, for example to 1024 by a random projection"
            )
        self.width, self.outputs, self.form = width, outputs, form
        self.hidden, self.shared = hidden, shared

        sizes = {
            "bottleneck": [BOTTLENECK, hidden],
            "direct": [hidden],
            "projected": [hidden],
            "released": [hidden] * 2,
        }
        source = width if released else hidden
        # On the CPU whatever the default device, and seeding only the CPU generator:
        # torch.manual_seed would also reseed every GPU, which the fork does not restore.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            layers: list[nn.Module] = []
            before = width
            if form == "projected":
                before = BOTTLENECK
                # unit variance in, unit variance out
                self.register_buffer("reduce", torch.randn(BOTTLENECK, width) / width**0.5)
            for size in sizes[form]:
                layers += [nn.Linear(before, size), ACTIVATION[activation]()]
                if dropout:
                    layers.append(nn.Dropout(dropout))
                before = size
            self.map = nn.Sequential(*layers)
            self.output_head = nn.Linear(hidden, outputs)
            self.aux_head = nn.Linear(shared, outputs)
            if released:
                for module in (*self.map, self.output_head, self.aux_head):
                    if isinstance(module, nn.Linear):
                        nn.init.normal_(module.weight, std=0.02)
                        nn.init.zeros_(module.bias)
            weight = orthogonal_(torch.empty(shared, source))
            bias = torch.zeros(shared) if projection_bias else None
        if form == "direct":
            self.register_buffer("projection", weight)
        else:
            self.projection = nn.Parameter(weight)
        self.projection_bias = None if bias is None else nn.Parameter(bias)

    def forward(self, h_t: Tensor) -> AlignerOutput:
        """`h_t` (b, m) of any float type; ValueError for another width."""
        if h_t.ndim != 2 or h_t.shape[1] != self.width:
            raise ValueError(f"expected vectors (b, {self.width}), got {tuple(h_t.shape)}")
        h_t = h_t.to(self.projection.dtype)  # stored as float16
        hidden = self.map(F.linear(h_t, self.reduce) if self.form == "projected" else h_t)
        source = h_t if self.form == "released" else hidden
        projection = F.linear(source, self.projection, self.projection_bias)
        return AlignerOutput(
            self.output_head(hidden), hidden, projection, self.aux_head(projection)
        )

    def orthogonal_weights(self) -> list[nn.Parameter]:
        """The weights to `retract_` after optimiser steps; empty if the projection is fixed."""
        return [self.projection] if isinstance(self.projection, nn.Parameter) else []
