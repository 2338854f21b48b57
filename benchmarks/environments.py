"""Environments for peers that the library does not depend on: made once, kept beside its store.

Each is a venv that holds the peer and what it alone needs, pinned. All else (torch, transformers,
numpy) it takes from the interpreter that runs the benchmark, so that both sides run the same builds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from filelock import FileLock

from armada_lib import profiles

PINS = {
    "textbrewer": ("textbrewer==0.2.1.post1", "tensorboardX==2.6.5", "protobuf==7.36.2"),
    # the torchvision that belongs to the pinned torch
    "torchdistill": ("torchdistill==1.1.5", "torchvision==0.28.0"),
}


class Unavailable(RuntimeError):
    """A peer that cannot be had here, so that its benchmark cannot be run."""


def python(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made, or made anew if its pins changed.

    Raises `Unavailable` where it cannot be made, with pip's own words.
    """
    home = Path(os.environ.get("ARMADA_STORE") or profiles.ROOT / ".armada").resolve() / "bench"
    folder, stamp = home / peer, home / peer / "complete"
    shared = dict.fromkeys(sysconfig.get_path(p) for p in ("purelib", "platlib"))
    wanted = "\n".join([*PINS[peer], sys.version, *shared])
    within = lambda name: Path(sysconfig.get_path(name, "venv", {"base": str(folder)}))
    interpreter = within("scripts") / f"python{sysconfig.get_config_var('EXE') or ''}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{peer}.lock"):
            if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
                print(f"making {folder} with {', '.join(PINS[peer])}", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
                venv.create(folder, with_pip=True)
                _install(interpreter, PINS[peer])
                # last in the path: what the peer's own folder holds goes before it
                path = "".join(f"{p}\n" for p in shared)
                (within("purelib") / "shared.pth").write_text(path, encoding="utf-8")
                stamp.write_text(wanted, encoding="utf-8")
    except (OSError, subprocess.SubprocessError) as e:
        raise Unavailable(f"the environment of {peer} could not be made: {_said(e)}") from e
    return interpreter


def _install(interpreter: Path, pins: tuple[str, ...]) -> None:
    # without dependencies: pip would look for a torch of its own
    command = ["-m", "pip", "install", "-q", "--no-deps", "--retries", "1", *pins]
    subprocess.run(
        [str(interpreter), *command], check=True, text=True, capture_output=True, timeout=900
    )


def _said(error: Exception) -> str:
    """The last line that says what went wrong."""
    text = getattr(error, "stderr", None) or str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    wrong = [x for x in lines if x.startswith("ERROR")] or lines or [repr(error)]
    return wrong[-1]
