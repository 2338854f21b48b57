"""Export of a project's student: a plain transformers checkpoint with a model card that says it all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from armada_lib import own, profiles, quiet, run_data, runs
from armada_lib.files import write_text
from armada_lib.own import Project
from armada_lib.results import Result, RunStore

WEIGHTS, ABOUT = "model.safetensors", "run.json"  # the checkpoint, and which run it is
AGREE = 0.98  # of predictions; training may be in bf16, the plain checkpoint predicts in fp32


def export(
    p: Project, found: Sequence[Result], folder: str | Path, store: RunStore | None = None
) -> Path:
    """Write the distilled student of the first seed to `folder`, with a model card; returns the folder.

    It is trained once more, as its run was, and then read back with plain transformers: RuntimeError
    unless that predicts what the run predicted. An older export is replaced when all is done, one of the
    same run is kept and gets a new card; ValueError for a folder that holds anything else.
    """
    folder, s = Path(folder), p.best
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds other files: export to a new folder")
    stored = next(r for r in found if r.spec.key == s.key)
    if (share := _exported(folder, s.key)) is not None:
        write_text(folder / "README.md", card(p, found, share))
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        new = Path(beside) / "student"
        student = runs.trained_student(s, store)
        with quiet.libraries():
            student.save_pretrained(new)
            share = agreement(new, p, stored)
        if share < AGREE:
            raise RuntimeError(
                f"the exported checkpoint agrees with its run on {share:.0%} of the examples only: on "
                "this machine training does not repeat; run it again here, then export"
            )
        write_text(new / "README.md", card(p, found, share))
        about = {"run": s.key, "agreement": share, "weights": _digest(new / WEIGHTS)}
        write_text(new / ABOUT, json.dumps(about) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    return folder


def _exported(folder: Path, key: str) -> float | None:
    """The agreement of an earlier export of this run; None if there is none, or if it was changed."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        same = about["run"] == key and about["weights"] == _digest(folder / WEIGHTS)
        return float(about["agreement"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:  # not `profiles.file_digest`, which remembers a path's first answer
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def agreement(folder: str | Path, p: Project, stored: Result) -> float:
    """Share of held-out examples for which plain transformers predicts what the run did.

    A score counts if it is within 5 % of the labels' standard deviation of the run's.
    """
    # transformers' modelling code takes seconds to import, and a kept export does not need it
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    held = run_data.examples(stored.spec)[1]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = stored.spec.training.max_length
    said = []
    for at in range(0, len(held), 32):
        pick = slice(at, at + 32)
        second = held.second[pick] if held.second else None
        inputs = tokenizer(
            held.first[pick], second, truncation=True, max_length=longest, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        logits = model(**inputs).logits.numpy()
        said.append(logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1))
    plain, run = np.concatenate(said), stored.predictions()
    if held.task.kind == "regression":
        return float((abs(plain - run) <= 0.05 * held.labels.std()).mean())
    return float((plain == run).mean())


def card(p: Project, found: Sequence[Result], share: float) -> str:
    """The model card: what it is, what it scored beside its controls, how to load it, what it is not."""
    s = p.best
    train, held = run_data.examples(s)
    task, who, taught = held.task, p.profile.student(s.student), p.profile.teacher(str(s.teacher))
    about = {"library_name": "transformers", "pipeline_tag": "text-classification",
             "tags": ["cross-modal-distillation", "armada"]}  # fmt: skip
    if not Path(profiles.resolve(who.checkpoint)).exists():
        about["base_model"] = who.checkpoint
    rows = own.table(found)
    lines = ["| trained as | seeds | mean | sd |", "|:--|--:|--:|--:|"]
    lines += [
        f"| {r['trained as']} | {r['seeds']} | {r['mean']:.1f} | {r['sd']:.1f} |"
        for r in rows.to_dict("records")
    ]
    said = own.answer(found)[1]
    stored = next(r for r in found if r.spec.key == s.key)
    low, high = task.own.scale if task.own and task.own.scale else (0.0, 1.0)
    outputs = (
        f"one, the score, where 0 stands for {low:g} and 5 for {high:g}"
        if task.kind == "regression"
        else ", ".join(task.labels)
    )
    source = Path(task.own.train).name if task.own else task.title
    metric = f"{task.metric} {'in %' if task.metric == 'accuracy' else 'x 100'}"
    t = s.training
    settings = (
        f"{s.manifold} loss, alpha {s.alpha:g}, beta {s.beta:g}, gamma {s.gamma:g}, tau {s.tau:g}; "
        f"{t.epochs} epochs, learning rate {t.student_lr:g}, seed {s.seed}, {t.precision}"
    )
    pair = ', "the second text"' if len(task.columns) > 1 else ""
    return f"""---
{yaml.safe_dump(about, sort_keys=False).strip()}
---

# {p.name}

A text classifier, distilled from {taught.note or taught.checkpoint} with ARMADA (Sengupta et al., 2026,
[arXiv 2603.10877](https://arxiv.org/abs/2603.10877)). At use it reads text alone; the teacher is not needed.

* **Started from:** {who.note or who.checkpoint}
* **Trained on:** {len(train):,} examples, {source}; {" + ".join(task.columns)} → {task.target}
* **Outputs:** {outputs}
* **Settings:** {settings}

## Scores

{metric} on {len(held):,} held-out examples, means over seeds. This checkpoint is
that of seed {s.seed}, not the best one; its run scored {stored.score:.1f}. Plain transformers agrees
with that run on {share:.0%} of the examples.

{chr(10).join(lines)}

**Did the teacher help, beyond regularisation?** {said}

The criterion, stated beforehand: {own.CRITERION}.

## Use

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")          # this folder
model = AutoModelForSequenceClassification.from_pretrained(".")
logits = model(**tokenizer("a text"{pair}, return_tensors="pt")).logits
```

## Limits

Held-out examples come from the same table as the training examples: texts of another kind may be read
worse. The checkpoint inherits the licence and the biases of what it started from.
"""
