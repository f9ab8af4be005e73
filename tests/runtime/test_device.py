"""What a process takes of its machine."""

from __future__ import annotations

import pytest
import torch

from latent_reasoning.config import ConfigError
from latent_reasoning.runtime.device import resolve_device


@pytest.mark.parametrize(
    ("name", "has_gpu", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_device_is_a_gpu_where_there_is_one_and_its_attention_is_not_cudnn_s(
    monkeypatch, name, has_gpu, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert resolve_device(name) == torch.device(device)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda was asked for"):
        resolve_device("cuda")
