import dataclasses

import pytest

from megatron_jam.config.data import Cm3Config, DataConfig, DataSetConfig
from megatron_jam.config.errors import UsageError

TEXT = DataSetConfig(name="text", path="sets/text", weight=0.5)


def test_defaults():
    config = DataConfig(sets=[TEXT])
    assert (config.objective, config.packing, config.loss_on) == ("causal", "stream", "all")
    assert config.cm3 == Cm3Config(mean_spans=1.0, max_spans=16, mask_whole_caption=0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.objective = "cm3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sets": []}, "data.sets"),
        ({"sets": [TEXT, TEXT]}, "data.sets"),
        (
            {"objective": "cm3", "loss_on": "answers", "packing": "documents"},
            "data.objective=cm3 .* data.loss_on=answers",
        ),
        ({"loss_on": "answers"}, "data.packing=documents"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**{"sets": [TEXT], **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean_spans": -0.1}, "mean_spans"),
        ({"max_spans": 0}, "max_spans"),
        ({"mask_whole_caption": 1.1}, "mask_whole_caption"),
        ({"mask_whole_caption": float("nan")}, "mask_whole_caption"),
    ],
)
def test_cm3_refuses(settings, message):
    with pytest.raises(UsageError, match=message):
        Cm3Config(**settings)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_refuses_weights(weight):
    with pytest.raises(UsageError, match="weight of 'text'"):
        dataclasses.replace(TEXT, weight=weight)
