"""Trainings that are killed at random moments and resumed, against those that are left alone: a table of each kill.

python tests/benchmarks/kills.py --kills 20 --mode ddp
"""

import sys
from pathlib import Path

for folder in ("robustness", "support"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

from killing import main  # noqa: E402  (found on that path)

if __name__ == "__main__":
    sys.exit(min(main(), 1))
