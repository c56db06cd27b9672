"""A model's description: saved, read, and refused by the name of the wrong setting."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import BridgeConfig, ModelConfig, TowerConfig

TOWER: dict[str, Any] = {"num_layers": 2, "hidden_size": 8, "num_heads": 2}
MODEL: dict[str, Any] = {"towers": {"main": TOWER}, "vocab_size": 10, "max_positions": 16}
PAIR: dict[str, Any] = {**MODEL, "towers": {"image": TOWER, "text": {**TOWER, "num_heads": 4}}}
UNEQUAL: dict[str, Any] = {
    **MODEL,
    "towers": {"image": TOWER, "text": {"num_layers": 4, "hidden_size": 12, "num_heads": 3}},
}


def test_defaults_are_cm3leons() -> None:
    config = ModelConfig.from_dict(MODEL)
    (tower,) = config.towers.values()
    assert (tower.inner_size, tower.activation) == (32, "relu")
    assert not tower.bias
    assert not tower.affine_norm
    assert (config.position_offset, config.init_std) == (2, 0.006)
    assert (config.is_pair, config.tower_names, config.joint_size) == (False, ("main",), 8)


def test_pair() -> None:
    config = ModelConfig.from_dict({**PAIR, "bridges": {"every": 1, "start": "zero"}})
    assert config.tower_names == ("image", "text")
    assert (config.hidden_size, config.joint_size, config.num_layers) == (8, 16, 2)
    assert config.bridges == BridgeConfig(every=1, start="zero")
    assert [config.bridges_into(i) for i in range(2)] == [("image", "text")] * 2
    assert ModelConfig.from_dict(MODEL).bridges_into(0) == ()
    listed = ModelConfig.from_dict({**PAIR, "bridges": {"layers": [1], "into": "text"}})
    assert [listed.bridges_into(i) for i in range(2)] == [(), ("text",)]


def test_unequal_towers() -> None:
    config = ModelConfig.from_dict(UNEQUAL)
    assert (config.hidden_size, config.joint_size, config.num_layers) == (12, 20, 4)
    assert config.projected_towers == ("image",)
    assert config.readers == config.table_names == ("main",)
    assert [config.tower_layer("text", i) for i in range(4)] == [0, 1, 2, 3]
    assert [config.tower_layer("image", i) for i in range(4)] == [0, None, 1, None]
    mapped = ModelConfig.from_dict({**UNEQUAL, "alignment": [1, 3]})
    assert [mapped.tower_layer("image", i) for i in range(4)] == [None, 0, None, 1]
    own = ModelConfig.from_dict({**UNEQUAL, "tables": "per_tower", "text_ids": [0, 5]})
    assert own.readers == own.table_names == ("image", "text")
    assert own.projected_towers == ()
    assert [own.table_width(name) for name in own.table_names] == [8, 12]


@pytest.mark.parametrize("values", [MODEL, PAIR])
def test_saved_description_is_read_back(values: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig.from_dict(values)
    config.save(tmp_path / "config.json")
    read = ModelConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert read == config
    assert dataclasses.asdict(read) == dataclasses.asdict(config)


def tower(**changes: Any) -> dict[str, Any]:
    return {"towers": {"main": {**TOWER, **changes}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 3}, "unknown key `vocab` in ModelConfig"),
        (tower(heads=3), "unknown key `heads` in TowerConfig"),
        ({"bridges": {"each": 2}}, "unknown key `each` in BridgeConfig"),
        ({"towers": {"main": {"num_layers": 2}}}, "TowerConfig: .*'hidden_size' and 'num_heads'"),
        ({"towers": {"text": TOWER}}, r"towers are \['text'\]; give either"),
        ({"towers": ["main"]}, r"towers is \['main'\]"),
        ({"towers": {"main": 3}}, "TowerConfig is 3"),
        (tower(num_heads=3), "num_heads 3 does not divide hidden_size 8"),
        (tower(num_layers=0), "num_layers is 0; it must be at least 1"),
        (tower(num_layers=10**9), "num_layers is 1000000000; it must be 10,000 or less"),
        (tower(num_heads="2"), "num_heads is '2'; it must be a whole number"),
        (tower(hidden_size=8.0), "hidden_size is 8.0; it must be a whole number"),
        (tower(bias="no"), "bias is 'no'; it must be true or false"),
        (tower(activation="swish"), "activation is 'swish'; choose one of relu, gelu"),
        (tower(norm_epsilon="1e-5"), "norm_epsilon is '1e-5'; it must be a number, such as 1.0e-5"),
        ({"bridges": {"every": -1}}, "bridges.every is -1"),
        ({"bridges": {"start": "zeros"}}, "bridges.start is 'zeros'; choose one of random, zero"),
        ({"projection_start": "mean"}, "projection_start is 'mean'; choose one of random, half"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_positions": None}, "max_positions is None"),
        (tower(num_kv_heads=3), "num_kv_heads 3 does not divide num_heads 2"),
        (tower(num_kv_heads=-1), "num_kv_heads -1 does not divide num_heads 2"),
        (tower(hidden_size=6, positions="rope"), r"head size 3 .* is odd"),
        (tower(norm_groups=0), "tower norm_groups 0 does not divide hidden_size"),
        (tower(norm_groups=7), "tower norm_groups 7 does not divide hidden_size"),
        (tower(ffn_size=-4), "ffn_size is -4; it must be 0 .4 d. or more"),
        (tower(norm_epsilon=-1.0), "norm_epsilon is -1.0; it must be above 0"),
        (tower(rope_base=0.0), "rope_base is 0.0; it must be above 0"),
        (
            {"bridges": {"layers": [1, 0]}},
            r"bridges.layers is \[1, 0\]; give a list of layers from 0 on",
        ),
        ({"bridges": {"into": "main"}}, "bridges.into is 'main'; choose one of both, image, text"),
        ({**PAIR, "bridges": {"layers": [0, 2]}}, r"\[0, 2\], but the towers have layers 0 to 1"),
        (
            {"towers": {"image": TOWER, "text": {**TOWER, "positions": "rope"}}},
            "towers image and text differ in positions; set tables: per_tower",
        ),
        ({"head": "wide", "text_ids": [4, 5]}, "tables, head and alignment are for towers image"),
        ({"alignment": [0]}, "tables, head and alignment are for towers image and text"),
        ({**PAIR, "head": "wide"}, r"text_ids: .* within vocab_size 10, not \[0, 0\]"),
        ({**PAIR, "head": "wide", "text_ids": [4, 7]}, r"vocab_size 10, not \[4, 7\]"),
        ({**PAIR, "tables": "per_tower", "text_ids": ["4", 5]}, r"10, not \['4', 5\]"),
        ({**PAIR, "alignment": [0, 1]}, "alignment is for towers of unlike depth"),
        ({**UNEQUAL, "alignment": [0, 4]}, "give 2 layers of 0 to 3"),
        ({**UNEQUAL, "alignment": [0, 1, 2]}, "give 2 layers of 0 to 3"),
        ({**UNEQUAL, "alignment": [2, 1]}, "list of layers from 0 on, rising"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ModelConfig.from_dict({**MODEL, **changes})
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_numbers() -> None:
    config = ModelConfig.from_dict({**MODEL, "init_std": 1})
    assert config.init_std == 1
    with pytest.raises(UsageError, match="init_std is True"):
        ModelConfig.from_dict({**MODEL, "init_std": True})
    with pytest.raises(dataclasses.FrozenInstanceError):
        TowerConfig(**TOWER).num_layers = 3  # type: ignore[misc]
