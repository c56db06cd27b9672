"""Peaks are those of known devices alone; MFU is the share of them."""

import pytest

from megatron_jam.planning.devices import peak_flops, speed
from megatron_jam.planning.flops import Flops

A100 = "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        (A100, 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_devices(name: str, bf16: float) -> None:
    assert peak_flops(name, precision="bf16") == pytest.approx(bf16 * 1e12)


@pytest.mark.parametrize(
    "name",
    ["x86_64", "", "NVIDIA H100", "NVIDIA GeForce RTX 4090 D", "NVIDIA A1000", "Tesla T4"],
)
def test_of_others_nothing_is_guessed(name: str) -> None:
    assert peak_flops(name, precision="bf16") is None


def test_the_peak_is_that_of_the_products() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert peak_flops(name, precision="fp32") == 67e12
    assert peak_flops(name, precision="bf16", fp8="delayed") == pytest.approx(1978.9e12)
    assert peak_flops(A100, precision="bf16", fp8="delayed") is None  # it has no such products


def test_speed() -> None:
    """3,000 tokens a second on 2 devices of 10 TFLOP/s, at 1 and 1.5 GFLOPs a token forward."""
    causal, full = (Flops(layers=n, bridges=0, outside=0) for n in (10**9, 15 * 10**8))
    found = speed(3000, causal=causal, full=full, ranks=2, peak=10e12)
    assert found.tflops == pytest.approx(4.5)
    assert found.tflops_full == pytest.approx(6.75)
    assert found.mfu == pytest.approx(0.45)
    assert speed(3000, causal=causal, full=full, ranks=2, peak=None).mfu is None
