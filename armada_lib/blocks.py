"""What each chapter runs when it is not told otherwise: the blocks of a profile, named like the chapters."""

# ruff: noqa: RUF012  (pydantic copies what a field holds at first)

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from armada_lib.settings import Amount, Loss, Strict


class _Compared(Strict):
    """What every chapter names that sets ARMADA beside its controls."""

    student: str
    methods: list[str]
    manifolds: list[Loss]
    controls: list[Loss] = ["euclid"]  # the manifold losses that the controls use
    seeds: list[int]


class Nlu(_Compared):
    """What the NLU chapter runs when it is not told otherwise."""

    tasks: list[str]
    readings: list[Literal["paper", "released"]]


class Share(Strict):
    """The weights that a baseline has; what each is, its class in `methods/` says."""

    alpha: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    beta: Amount | None = None
    gamma: Amount | None = None
    tau: float | None = Field(None, gt=0, allow_inf_nan=False)


class Pictured(Strict):
    """What the chapter on baselines runs of those that read pictures (Table 8).

    `video` and `frames` are names of teachers: what plays the videos that the video baselines of
    the paper read as pixels, and what plays features of frames or pictures. `text_encoder`: the
    checkpoint that X-adapter reads beside the student; None: the student's own.
    """

    student: str
    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    video: str
    frames: str
    text_encoder: str | None = None


class Baselines(Strict):
    """What the chapter on baselines runs when it is not told otherwise.

    `mentor` and `assistant` are names of students: the model that a baseline learns from, and the
    one between mentor and student (TAKD). `weights`: for a method whose own are not wanted. `grid`:
    training settings with the values to choose from, for each method, by the mean score on held-out
    training rows of `grid_tasks` (empty: all of them); the grid of both tables.
    """

    student: str
    mentor: str
    assistant: str
    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    weights: dict[str, Share] = {}
    grid: dict[str, list[Any]] = {}
    grid_tasks: list[str] = []
    multimodal: Pictured | None = None


class Tuning(_Compared):
    """What a chapter on students that generate runs when it is not told otherwise.

    `mentor`: the name of the student that writes the responses of SeqKD.
    """

    mentor: str | None = None
    suites: list[str]
    teachers: list[str]


class Multimodal(_Compared):
    """What the chapter on MM-IMDb runs when it is not told otherwise."""

    teacher: str
    readings: list[Literal["paper", "released"]]


class TuningGrid(Strict):
    """Figures 5 and 6: every combination of weights, for a student that generates."""

    student: str
    suites: list[str]
    manifolds: list[Loss]
    betas: list[Amount]
    gammas: list[Amount]
    seeds: list[int]


class Ablation(Strict):
    """What the chapter on ablations runs when it is not told otherwise.

    `alphas`, `betas`, `gammas`: every combination (Figure 3), with the losses `grid`; `manifolds`:
    the losses of Figure 4. `factors`: by name of a factor, the levels that differ from the base,
    each run on `factor_tasks`. A level is a value, or several fields of `specs.spec` with theirs.
    """

    student: str
    tasks: list[str]
    manifolds: list[Loss]
    alphas: list[Annotated[float, Field(ge=0, le=1)]]
    betas: list[Amount]
    gammas: list[Amount]
    grid: list[Loss] = ["euclid"]
    factor_tasks: list[str]
    factors: dict[str, list[Any]]
    seeds: list[int]
    instruction: TuningGrid | None = None


class Analysis(Strict):
    """What the chapter on analyses runs when it is not told otherwise.

    `tasks` may hold suites of students that generate, which `generator` plays: only noise is looked
    at there. `main`: the manifold loss of controls and noise. `noisy`: methods run at every level of
    `sigmas`, the standard deviation of the noise.
    """

    student: str
    generator: str
    tasks: list[str]
    methods: list[str]
    manifolds: list[Loss]
    main: Loss = "euclid"
    noisy: list[str]
    sigmas: list[Amount] = [0.0, 1.0, 2.0, 5.0]
    seeds: list[int]
    generation_seeds: list[int]
