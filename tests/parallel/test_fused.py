"""Which fused kernels are found and used, with stand-ins present and absent."""

import json
import sys
from types import ModuleType
from typing import Any

import megatron.core.optimizer
import pytest
import torch

from megatron_jam.parallel import cpu, fused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def module(name: str, **values: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(values)
    return made


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts stand-ins where Python looks for modules; None is a module that is not there."""
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        monkeypatch.setitem(sys.modules, name, None)

    def put(name: str, **values: Any) -> None:
        monkeypatch.setitem(sys.modules, name, module(name, **values))

    return put


def test_what_is_absent_says_why(install: Any) -> None:
    assert str(fused.find_transformer_engine()) == "no Transformer Engine"
    assert str(fused.find_apex_adam()) == "no apex"
    assert str(fused.find_apex_gradients()) == (
        "no apex's CUDA kernel fused_weight_gradient_mlp_cuda"
    )


def test_what_is_present_gives_its_version(install: Any) -> None:
    install("transformer_engine", __version__="2.9.0")
    install("transformer_engine.pytorch")
    install("apex", __version__="0.1")
    install("apex.optimizers", FusedAdam=object)
    install("amp_C")
    install("fused_weight_gradient_mlp_cuda")
    found = [fused.find_transformer_engine(), fused.find_apex_adam(), fused.find_apex_gradients()]
    assert [each.version for each in found] == [
        "Transformer Engine 2.9.0",
        "apex 0.1",
        "apex's kernel",
    ]
    assert not any(each.missing for each in found)


def test_another_projects_apex_is_told_apart(install: Any) -> None:
    install("apex", __version__="0.9.10")
    assert fused.find_apex_adam().missing == "the apex that is installed is not NVIDIA's"
    install("apex.optimizers", FusedAdam=object)
    assert fused.find_apex_adam().missing == "no apex's CUDA kernel amp_C"


def test_a_package_that_breaks_says_how(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError("libcudart.so.12: cannot open shared object file\nand more")

    monkeypatch.setattr(fused.importlib, "import_module", broken)
    assert fused.find_transformer_engine().missing == (
        "Transformer Engine cannot be imported: OSError: libcudart.so.12: cannot open shared"
        " object file"
    )


def test_weight_gradients_are_fused_on_a_gpu_with_apex_alone(install: Any) -> None:
    assert fused.fuses_weight_gradients(CPU)
    assert not fused.fuses_weight_gradients(CUDA)
    install("fused_weight_gradient_mlp_cuda")
    assert fused.fuses_weight_gradients(CUDA)


@pytest.mark.parametrize("has_cuda", [True, False])
def test_cuda_kernels_are_known_by_the_operator(
    has_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def has_kernel(operator: str, key: str) -> bool:
        asked.append((operator, key))
        return has_cuda

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", has_kernel)
    missing = fused.find_cuda_kernels().missing
    assert missing == ("" if has_cuda else "megatron_jam._C was built without CUDA")
    assert asked == [("megatron_jam::guided_sample", "CUDA")]
    uses = {device: fused.fused_parts(device, "torch")[-1].uses for device in (CPU, CUDA)}
    assert uses == {CPU: "CPU kernels", CUDA: "CUDA kernels" if has_cuda else "CPU kernels"}


def test_parts_of_a_run(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fused_weight_gradient_mlp_cuda")
    monkeypatch.setattr(megatron.core.optimizer, "Adam", torch.optim.AdamW)
    parts = fused.fused_parts(CUDA, "transformer_engine")
    uses = [(part.name, part.uses, part.found) for part in parts[:3]]
    assert uses == [
        ("layers", "transformer_engine", "no Transformer Engine"),
        ("Adam", "torch.optim.adamw.AdamW", "no Transformer Engine; no apex"),
        ("weight gradients", "added within the product", "apex's kernel"),
    ]
    line = fused.describe_parts(parts)
    assert line.startswith("layers: transformer_engine (found: no Transformer Engine) | Adam: ")
    assert "\n" not in line


def test_deepspeed_brings_its_own_adam_and_no_fused_gradients(install: Any) -> None:
    install("fused_weight_gradient_mlp_cuda")
    for device in (CPU, CUDA):
        parts = fused.fused_parts(device, "torch", "deepspeed")
        assert [part.uses for part in parts[1:3]] == ["torch.optim.adamw.AdamW", "added apart"]


def test_environment_is_json(install: Any) -> None:
    values = json.loads(json.dumps(fused.environment(CPU, "torch")))
    assert values["torch"] == torch.__version__
    assert values["megatron_core"].startswith("0.")
    assert [part["name"] for part in values["parts"]] == [
        "layers",
        "Adam",
        "weight gradients",
        "csrc",
    ]
    assert values["parts"][2]["uses"] == "added within the product"


@pytest.mark.parametrize(
    ("owner", "has_kernels", "expected"),
    [
        ("apex.optimizers.fused_adam", True, "theirs"),
        ("apex.optimizers.fused_adam", False, "ours"),
        ("transformer_engine.pytorch.optimizers", False, "theirs"),
    ],
)
def test_an_apex_without_kernels_falls_back_to_our_adam(
    owner: str, has_kernels: bool, expected: str, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.optimizer import distrib_optimizer

    theirs = type("FusedAdam", (), {"__module__": owner})
    for where in (megatron.core.optimizer, distrib_optimizer):
        monkeypatch.setattr(where, "Adam", theirs, raising=False)
    monkeypatch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    for name in ("HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"):
        monkeypatch.setattr(distrib_optimizer, name, False, raising=False)
    if has_kernels:
        install("apex")
        install("apex.optimizers", FusedAdam=theirs)
        install("amp_C")
    cpu.provide_adam(CUDA)
    assert (megatron.core.optimizer.Adam is theirs) == (expected == "theirs")
