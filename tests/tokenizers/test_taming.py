"""taming's tokenizers against transformers' own code of the same parts, on random weights.

Chameleon's VQ-VAE has taming's encoder with attention at chosen sizes and its nearest-row
quantizer, Janus's has the decoder, with attention at the smallest size alone.
"""

import dataclasses
import sys
import types

import pytest
import torch
import yaml
from torch import nn
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.taming import TamingConfig, TamingTokenizer
from tests.helpers.commands import fails, tool

SMALL = TamingConfig(
    image_size=32, channels=32, attention_sizes=(4,), latent_dim=16, code_dim=16, num_codes=50
)
F8 = TamingConfig()


def random_weights(config, seed=0):
    """A tokenizer whose every weight matters, norms' among them."""
    tokenizer = TamingTokenizer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tokenizer.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data += 1
    return tokenizer


def chameleon(tokenizer):
    """transformers' encoder and quantizer with the same weights."""
    config = tokenizer.config
    model = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=config.code_dim,
            num_embeddings=config.num_codes,
            latent_channels=config.latent_dim,
            resolution=config.image_size,
            base_channels=config.channels,
            channel_multiplier=list(config.multipliers),
            num_res_blocks=config.num_blocks,
            attn_resolutions=list(config.attention_sizes),
        )
    )
    weights = {n: t for n, t in tokenizer.state_dict().items() if n.startswith(("enc", "quant"))}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    gumbel = tokenizer.config.quantizer == "gumbel"
    assert [n for n in missing if not n.startswith("post")] == (
        ["quantize.embedding.weight"] if gumbel else []
    )
    assert set(unexpected) == (
        {"quantize.proj.weight", "quantize.proj.bias", "quantize.embed.weight"} if gumbel else set()
    )
    return model.eval()


def janus(tokenizer):
    """transformers' decoder with the same weights; it lists its levels from the smallest on."""
    config = tokenizer.config
    decoder = JanusVQVAEDecoder(
        JanusVQVAEConfig(
            latent_channels=config.latent_dim,
            base_channels=config.channels,
            channel_multiplier=list(config.multipliers),
            num_res_blocks=config.num_blocks,
        )
    )
    last, weights = len(config.multipliers) - 1, {}
    for name, tensor in tokenizer.decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":
            parts[1] = str(last - int(parts[1]))
        weights[".".join(parts)] = tensor
    decoder.load_state_dict(weights)
    return decoder.eval()


def pictures(config, count, dtype):
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, config.image_size, config.image_size)
    return torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance", "count"),
    [
        pytest.param(SMALL, torch.float64, 1e-12, 3, id="small"),
        pytest.param(F8, torch.float32, 1e-4, 1, id="vqgan_gumbel_f8", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_gumbel_codes_and_pictures(config, dtype, tolerance, count):
    tokenizer = random_weights(config).to(dtype)
    pixels = pictures(config, count, dtype)
    other = chameleon(tokenizer).to(dtype)
    grid = other.quant_conv(other.encoder(pixels))
    quantize = tokenizer.state_dict()
    weight = quantize["quantize.proj.weight"][:, :, 0, 0]
    logits = torch.einsum("bchw,nc->bhwn", grid, weight) + quantize["quantize.proj.bias"]
    codes = tokenizer.encode(pixels)
    assert codes.tolist() == logits.argmax(-1).flatten(1).tolist()
    assert codes.shape == (count, config.grid_size**2)
    assert len(codes.unique()) > 8
    vectors = quantize["quantize.embed.weight"][codes].transpose(1, 2)
    grid = vectors.reshape(count, -1, config.grid_size, config.grid_size)
    expected = janus(tokenizer).to(dtype)(tokenizer.post_quant_conv(grid))
    assert torch.allclose(tokenizer.drawn(codes), expected, rtol=tolerance, atol=tolerance)
    assert tokenizer.decode(codes).abs().max() <= 1


def test_the_sizes_of_vqgan_gumbel_f8():
    with torch.device("meta"):
        tokenizer = TamingTokenizer(F8)
    assert (tokenizer.tokens_per_image, tokenizer.num_codes, tokenizer.image_size) == (
        1024,
        8192,
        256,
    )
    shapes = {name: list(t.shape) for name, t in tokenizer.state_dict().items()}
    assert shapes["quantize.proj.weight"] == [8192, 256, 1, 1]
    assert shapes["quantize.embed.weight"] == [8192, 256]
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == [256, 128, 1, 1]
    assert shapes["encoder.down.3.attn.1.proj_out.weight"] == [512, 512, 1, 1]
    assert shapes["decoder.up.3.attn.2.q.weight"] == [512, 512, 1, 1]
    assert shapes["decoder.up.1.upsample.conv.weight"] == [128, 128, 3, 3]
    assert shapes["encoder.down.0.downsample.conv.weight"] == [128, 128, 3, 3]
    assert "encoder.down.3.downsample.conv.weight" not in shapes
    assert "decoder.up.0.upsample.conv.weight" not in shapes


@torch.no_grad()
def test_nearest_codes():
    config = dataclasses.replace(SMALL, quantizer="nearest", attention_sizes=(16, 4))
    tokenizer = random_weights(config).double()
    pixels = pictures(config, 3, torch.float64)
    expected = chameleon(tokenizer).double().encode(pixels).image_tokens
    assert tokenizer.encode(pixels).tolist() == expected.reshape(3, -1).tolist()


def lightning_checkpoint(tokenizer, path, monkeypatch):
    """last.ckpt as Lightning's trainer writes it, loss network and callbacks included."""
    name = "pytorch_lightning.callbacks"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    loss = {"loss.discriminator.main.0.weight": torch.ones(2)}
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, name, module)
    torch.save(
        {
            "epoch": 3,
            "state_dict": {**tokenizer.state_dict(), **loss},
            "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(1.0)}},
        },
        path,
    )


def model_yaml(config):
    names = {"gumbel": "GumbelVQ", "nearest": "VQModel"}
    shape = {
        "double_z": False,
        "z_channels": config.latent_dim,
        "resolution": config.image_size,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.num_blocks,
        "attn_resolutions": list(config.attention_sizes),
        "dropout": 0.0,
    }
    params = {"embed_dim": config.code_dim, "n_embed": config.num_codes, "ddconfig": shape}
    target = f"taming.models.vqgan.{names[config.quantizer]}"
    return {"model": {"target": target, "params": params}}


def test_a_checkpoint_is_converted(tmp_path, monkeypatch):
    tokenizer = random_weights(SMALL)
    lightning_checkpoint(tokenizer, tmp_path / "last.ckpt", monkeypatch)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model_yaml(SMALL)))
    arguments = ("convert_vqgan", "last.ckpt", "out", "--settings", "model.yaml")
    done = tool(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = load_image_tokenizer(tmp_path / "out")
    assert loaded.config == SMALL
    assert loaded.sha256 == tokenizer.sha256
    pixels = pictures(SMALL, 2, torch.float32)
    assert loaded.encode(pixels).tolist() == tokenizer.encode(pixels).tolist()
    fails(
        tool("convert_vqgan", "last.ckpt", "other", cwd=tmp_path),
        "last.ckpt does not fit config.json",
    )
    assert not (tmp_path / "other").exists()


def test_other_models_are_refused():
    for change, message in (
        ({"double_z": True}, "double_z is True; only False"),
        ({"resolution": "x"}, "image_size is 'x'"),
        ({"ch": 40}, "multiple of 32"),
    ):
        settings = model_yaml(SMALL)
        settings["model"]["params"]["ddconfig"] |= change
        with pytest.raises(UsageError, match=message):
            TamingConfig.from_taming(settings)
    for wrong in ({}, {"model": 3}, {"model": {"target": "x.Net2Net", "params": {}}}):
        with pytest.raises(UsageError, match=r"no model\.yaml"):
            TamingConfig.from_taming(wrong)
    assert TamingConfig.from_taming(model_yaml(F8)) == F8
    assert isinstance(TamingTokenizer(SMALL).encoder, nn.Module)
