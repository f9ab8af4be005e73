"""The recorded vectors of the public code, all of them, where they are at hand."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.conformance.__main__ import cases, run

DEFAULT = PROJECT_ROOT.parent / "shared" / "conformance"
VECTORS = Path(os.environ.get("LATENT_REASONING_CONFORMANCE", DEFAULT))


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the recorded vectors are not at hand")
def test_every_recorded_case_passes() -> None:
    torch.set_num_threads(1)
    verdicts = {case.name: run(case, verbose=False) for case in cases(VECTORS)}
    assert {n: reason for n, (verdict, reason) in verdicts.items() if verdict == "FAIL"} == {}
    assert Counter(verdict for verdict, _ in verdicts.values())["PASS"] >= 350
