"""Trainings that are killed at random moments and resumed, against those that are left alone: a table of each kill.

python tests/benchmarks/kills.py --kills 20 --mode ddp
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.robustness.killing import main

if __name__ == "__main__":
    sys.exit(min(main(), 1))
