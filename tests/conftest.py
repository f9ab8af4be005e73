"""What every test's process needs: one thread, and Ctrl-C as programs in a terminal know it."""

import signal

import pytest
import torch

# The tests' models are so small that a second thread only costs.
torch.set_num_threads(1)

# A shell starts what runs in its background with SIGINT ignored, which all children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def log() -> list[str]:
    """The lines that a training says."""
    return []
