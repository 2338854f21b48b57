"""What a run reads: the examples of its task, or the items of its suite, and its teacher's texts."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache

from armada_lib import gentasks, profiles
from armada_lib.examples import Examples, splits
from armada_lib.methods import METHODS
from armada_lib.profiles import Profile, Training
from armada_lib.results import RunSpec
from armada_lib.settings import OwnTask
from armada_lib.tasks import TASKS, Task, get


def tasks_of(p: Profile) -> list[str]:
    """The names of the tasks that a profile can run: the paper's and its own."""
    return [*TASKS, *p.tasks]


def task_of(p: Profile, name: str) -> Task:
    """A task of the paper or of the profile, or `profiles.Unknown` listing both."""
    return get(profiles.check(name, tasks_of(p), "task"), own=p.tasks.get(name))


def read(p: Profile, task: str, t: Training) -> tuple[Examples, Examples]:
    """(training, evaluation) examples of a task under these settings, read once in a process."""
    own, stamps = p.tasks.get(task), []
    for path in filter(None, (own.train, own.validation) if own else ()):
        with contextlib.suppress(OSError):  # whoever reads it says what is wrong
            stamps.append(os.stat(path).st_mtime_ns)
    return _examples(
        task, p.data, t.train_size, t.eval_size, t.split, t.copa, own, tuple(stamps)
    )  # fmt: skip


@lru_cache(maxsize=32)
def _examples(
    task: str, data: str, train: int | None, n: int | None, split: str, copa: str,
    own: OwnTask | None, stamps: tuple[int, ...],
) -> tuple[Examples, Examples]:  # fmt: skip
    # `stamps`: a table of one's own may be mended while a notebook is open
    return splits(task, data, train, n, split, copa, own)


@lru_cache(maxsize=8)
def suite_of(name: str, data: str, train: int | None, test: int | None) -> gentasks.Suite:
    """That many training and test items of a generating task, read once in a process."""
    return gentasks.suite(name, data, train, test, tests=gentasks.available(name, data))


def suite(s: RunSpec) -> gentasks.Suite:
    """Training and test items of a run of a generating student."""
    t = s.training
    return suite_of(s.task, profiles.load(s.profile).data, t.train_size, t.test_size)


def teacher_texts(s: RunSpec) -> list[str]:
    """Every text that the teacher of a run has to see."""
    if s.task in gentasks.SUITES:
        return [i.teacher_text for i in suite(s).train]
    if METHODS[s.method].stage:  # no evaluated text is ever pictured
        return examples(s)[0].teacher_texts
    return [text for e in examples(s) for text in e.teacher_texts]


def examples(s: RunSpec) -> tuple[Examples, Examples]:
    """(training, evaluation) examples of a run."""
    return read(profiles.load(s.profile), s.task, s.training)
