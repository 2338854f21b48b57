"""Predictions of every head, and the paper's metrics (all × 100)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from armada_lib import autocast
from armada_lib.batching import Encoded
from armada_lib.methods import Method
from armada_lib.results import decide_each
from armada_lib.students import Student

EVAL_BATCH = 64
COLLAPSED = 0.995  # share of one predicted class from which a run counts as collapsed


@torch.no_grad()
def predict(student: Student, method: Method, data: Encoded, bf16: bool) -> dict[str, np.ndarray]:
    """Outputs of each head on a split: `student`, `student_aux`, `aligner`, `aligner_aux`.

    Class and multilabel tasks (n, c), choice tasks (n, 2), regression (n,), float32, in the order of
    the data.
    The student reads texts only; the aligner heads need the split's teacher vectors.
    """
    student.eval()
    device = next(student.parameters()).device
    length = data.lengths.reshape(len(data), -1).max(1)
    order = np.argsort(-length, kind="stable")
    found: dict[str, list[np.ndarray]] = {}
    rows_seen = []
    for i in range(0, len(order), EVAL_BATCH):
        batch = data.batch(order[i : i + EVAL_BATCH], student.packs).to(device)
        with autocast.to_bf16(device, bf16):
            out = student(method.inputs(batch))
        heads = {
            "student": out.logits,
            "student_aux": out.aux_logits,
            **method.other_heads(batch.teacher),
        }
        for name, logits in heads.items():
            if logits is not None:
                found.setdefault(name, []).append(method.shape(logits).float().cpu().numpy())
        rows_seen.append(batch.rows)
    back = np.argsort(np.concatenate(rows_seen), kind="stable")
    return {name: np.concatenate(parts)[back] for name, parts in found.items()}


def decide(outputs: np.ndarray) -> np.ndarray:
    """Predicted class of (n, c) outputs; a regression score as it is."""
    return outputs.argmax(-1) if outputs.ndim == 2 else outputs


def metric(name: str, outputs: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> float:
    """`accuracy` (%), `mcc` or `pearson` (x 100). A constant prediction has MCC and Pearson 0.

    `outputs` (n, c), of a regression (n,), and `labels` (n,). ValueError for another name.

    Of several labels, (n, c) logits and (n, c) of 0 and 1: `micro_f1`, over all n c decisions, and
    `macro_f1`, the mean of the labels' own; a label that is neither there nor predicted has F1 0.
    """
    if name in ("micro_f1", "macro_f1"):
        from sklearn.metrics import f1_score

        said = decide_each(outputs, threshold)
        return float(f1_score(labels > 0, said, average=name[:5], zero_division=0) * 100)
    predicted = decide(outputs)
    if name == "accuracy":
        return float((predicted == labels).mean() * 100)
    if name == "mcc":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(labels, predicted) * 100)
    if name == "pearson":
        # in float32 the mean of equal numbers is rounded, and their spread is not zero
        x, y = predicted.astype(np.float64), labels.astype(np.float64)
        if x.std() < 1e-8 or y.std() < 1e-8:
            return 0.0
        return float(np.corrcoef(x, y)[0, 1] * 100)
    raise ValueError(f"unknown metric {name!r}; valid: accuracy, mcc, pearson, micro_f1, macro_f1")


def behaviour(outputs: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> dict[str, Any]:
    """Does the model still tell examples apart? A collapsed run is flagged, never dropped.

    `outputs` and `labels` as `metric` takes them: (n, c) or (n,).

    `majority_share`: largest share of one predicted class; for regression, `spread`: standard
    deviation of the scores relative to that of the labels. Of several labels a class is a set of
    them, and `said`, `gold`: how many an example is given and has, on average.
    """
    if labels.ndim == 2:
        sets = decide_each(outputs, threshold)
        largest = lambda x: float(np.unique(x, axis=0, return_counts=True)[1].max() / len(x))
        share = largest(sets)
        return {"majority_share": share, "gold_majority": largest(labels > 0),
                "said": float(sets.sum(1).mean()), "gold": float(labels.sum(1).mean()),
                "collapsed": share >= COLLAPSED}  # fmt: skip
    if outputs.ndim == 2:
        counts = np.bincount(decide(outputs), minlength=outputs.shape[1])
        share = float(counts.max() / counts.sum())
        gold = float(np.bincount(labels.astype(int)).max() / len(labels))
        return {"majority_share": share, "gold_majority": gold, "collapsed": share >= COLLAPSED}
    spread = float(outputs.std() / max(float(labels.std()), 1e-8))
    return {"spread": spread, "collapsed": spread <= 1 - COLLAPSED}
