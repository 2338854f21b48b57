"""Run as a script: a teacher's vectors in another process, fp32, written to a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from armada_lib import teachers
from armada_lib.teacher_settings import TeacherSpec
from armada_lib.teachers import common


def elsewhere(spec: TeacherSpec, texts: list[str], folder: Path) -> np.ndarray:
    """`encode(texts)` of the teacher, as another process computes it with as many threads."""
    out, threads = folder / "vectors.npy", str(torch.get_num_threads())
    command = [
        sys.executable,
        __file__,
        spec.model_dump_json(),
        json.dumps(texts),
        threads,
        str(out),
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subprocess.run(command, check=True, env=env)
    return np.load(out)


if __name__ == "__main__":
    given, sentences, number, path = sys.argv[1:]
    torch.set_num_threads(int(number))
    common.precision = lambda device: "fp32"
    who = TypeAdapter(TeacherSpec).validate_json(given)
    module = teachers._module(who)
    if hasattr(module, "precision"):
        module.precision = common.precision
    np.save(path, teachers.load(who).encode(json.loads(sentences)))
