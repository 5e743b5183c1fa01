"""What all tests share: one thread each, and nothing loaded from the network."""

import os

# Two torch processes on two cores slow each other down many times over when each spins one thread per core;
# the variables must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.support import processes  # noqa: F401  # hides the GPUs from this process, so that it can be forked


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
