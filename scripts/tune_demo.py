"""Choose the demo's learning rate on the validation split; the held-out split is never opened.

python scripts/tune_demo.py --steps 150 --rates 2e-3 4e-3 8e-3
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from taid import demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=demo.STEPS)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    arguments = parser.parse_args()
    for rate in arguments.rates:
        with tempfile.TemporaryDirectory() as folder:
            results = demo.run(Path(folder), steps=arguments.steps, learning_rate=rate, evaluate_on="validation")
        for result in results:
            print(f"{rate:g} {result.name:15} {result.cross_entropy:.4f} KL {result.kl:.4f}", flush=True)


if __name__ == "__main__":
    main()
