"""Kill a study at random moments and let it go on. Run by test_runs.py: `kills.py ROOT KILLS`.

The parent loads everything once and forks a child for every attempt, which it kills after a random
while; a child that ends by itself ends the game. Prints the number of kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time


def wanted():
    from armada_lib import specs

    return specs.grid(
        "tiny",
        ["cola", "copa"],
        ["undistilled", "armada"],
        seeds=(0, 1),
        readings=("paper", "released"),
    )


def main(kills: int) -> None:
    import torch

    from armada_lib import runs, teachers  # noqa: F401

    torch.set_num_threads(1)
    rng, done, longest = random.Random(1), 0, 0.6
    while True:
        child = os.fork()
        if child == 0:
            runs.study(wanted(), workers=1, progress=False)
            os._exit(0)
        deadline = time.monotonic() + rng.uniform(0.02, longest) if done < kills else float("inf")
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                if status:
                    sys.exit(f"the study itself failed with status {status}")
                print(done)
                return
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
                longest = min(longest * 1.02, 1.5)
                break
            time.sleep(0.002)


if __name__ == "__main__":
    main(int(sys.argv[1]))
