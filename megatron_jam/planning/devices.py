"""Peak speeds of known devices, which MFU is measured against; of others nothing is guessed.

Figures are the vendors' for dense matrix products (their data sheets' headlines are for 2:4 sparse
ones, twice as high), at boost clocks. fp32 is without tensor cores, as torch computes by default.
"""

import re
from dataclasses import dataclass

from megatron_jam.planning.flops import Flops


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Dense TFLOP/s of a device; 0 where it has no such products."""

    fp32: float
    bf16: float
    fp8: float = 0.0


# The first pattern that is found in the name that CUDA gives a device decides.
_PEAKS = (
    (r"\bGB200\b", Peak(fp32=80, bf16=2500, fp8=5000)),
    (r"\bB200\b", Peak(fp32=75, bf16=2250, fp8=4500)),
    (r"\bH200 NVL\b", Peak(fp32=60, bf16=835.5, fp8=1671)),
    (r"\b(H200|GH200)\b", Peak(fp32=67, bf16=989.4, fp8=1978.9)),
    (r"\bH100 NVL\b", Peak(fp32=60, bf16=835.5, fp8=1671)),
    (r"\bH100 PCIe\b", Peak(fp32=51, bf16=756, fp8=1513)),
    (r"\b(H100 \d+GB HBM3|H800)\b", Peak(fp32=67, bf16=989.4, fp8=1978.9)),
    (r"\b(A100|A800)\b", Peak(fp32=19.5, bf16=312)),
    (r"\bA40\b", Peak(fp32=37.4, bf16=149.7)),
    (r"\bA30\b", Peak(fp32=10.3, bf16=165)),
    (r"\bL40S\b", Peak(fp32=91.6, bf16=362, fp8=733)),
    (r"\bL40\b", Peak(fp32=90.5, bf16=181, fp8=362)),
    (r"\bL4\b", Peak(fp32=30.3, bf16=121, fp8=242)),
    (r"\bRTX 4090\b(?! D)", Peak(fp32=82.6, bf16=165.2, fp8=330.3)),
    (r"\bRTX 3090\b(?! Ti)", Peak(fp32=35.6, bf16=71)),
)


def peak_flops(device_name: str, *, precision: str, fp8: str = "none") -> float | None:
    """Dense peak in FLOP/s of a device for the products of a run; None for an unknown device.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: fp32 or bf16.
        fp8: the FP8 recipe; with any but none the products' peak is that of 8 bits.
    """
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name):
            kind = precision if fp8 == "none" else "fp8"
            return getattr(peak, kind) * 1e12 or None
    return None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a speed in tokens amounts to."""

    tflops: float
    """Model TFLOP/s of a device, attention counted as causal."""

    tflops_full: float
    """The same with whole score matrices counted."""

    mfu: float | None
    """Share of the device's dense peak, of `tflops`; None where the peak is not known."""


def speed(
    tokens_per_second: float, *, causal: Flops, full: Flops, ranks: int, peak: float | None
) -> Speed:
    """TFLOP/s of a device and MFU.

    Args:
        tokens_per_second: of all ranks together.
        causal: FLOPs a token.
        full: the same with attention counted as full.
        ranks: devices.
        peak: of `peak_flops`.
    """
    a_rank = tokens_per_second / ranks
    tflops = a_rank * causal.training / 1e12
    return Speed(
        tflops=tflops,
        tflops_full=a_rank * full.training / 1e12,
        mfu=None if peak is None else tflops * 1e12 / peak,
    )
