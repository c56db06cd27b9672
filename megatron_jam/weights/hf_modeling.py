"""A model of megatron_jam in transformers, by the code that an exported folder carries.

The folder has this file and reference.py, which it runs; neither needs megatron_jam. Load it with
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_jam.weights.reference import reference_logits


class JamConfig(PretrainedConfig):
    """Settings of an exported model."""

    model_type = "megatron_jam"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        shapes: dict[str, list[int]] | None = None,
        **settings: Any,
    ) -> None:
        """Keep the settings.

        Args:
            model: what the weights folder's config.json says.
            shapes: shape of each tensor by name.
            settings: those that transformers knows; `num_hidden_layers` counts the attentions that
                keep keys and values, each of which has a place in the cache.
        """
        self.model = model or {}
        self.shapes = shapes or {}
        super().__init__(**settings)


class JamForCausalLM(PreTrainedModel, GenerationMixin):
    """Any model of megatron_jam: one or two towers, bridges and a head."""

    config_class = JamConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, config: JamConfig) -> None:
        """Make the tensors; fresh ones are random."""
        super().__init__(config)
        self._settings = _as_attributes(config.model)
        for name, shape in config.shapes.items():
            *rooms, last = name.split(".")
            module: nn.Module = self
            for room in rooms:
                if room not in module._modules:
                    module.add_module(room, nn.Module())
                module = module.get_submodule(room)
            module.register_parameter(last, nn.Parameter(torch.randn(shape) * 0.02))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = True,
        **others: Any,
    ) -> Any:
        """Logits of the next tokens.

        Args:
            input_ids: int64 [B, S]; with a cache those that it has not seen.
            attention_mask: [B, all tokens], 0 for padding, which stands in front.
            past_key_values: a cache that grows (transformers' DynamicCache).
            use_cache: return a cache also where none was given.
            labels: int64 [B, S], -100 where nothing is to be learned: gives the loss.
            logits_to_keep: of so many last tokens alone; 0 means of all.
            return_dict: a tuple in place of the output's class where it is False.
            others: what generate() gives to every model.
        """
        if any(others.get(name) is not None for name in ("inputs_embeds", "position_ids")):
            raise ValueError("give input_ids and attention_mask; positions follow from them")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("static caches are not supported: leave out cache_implementation")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        logits = reference_logits(
            self._settings,
            self.get_parameter,
            input_ids,
            cache=past_key_values,
            mask=attention_mask,
            last=logits_to_keep,
        )
        loss = None
        if labels is not None:
            size = logits.shape[-1]
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()


def _as_attributes(settings: dict[str, Any]) -> SimpleNamespace:
    """config.json as the reference reads it."""
    towers = {name: SimpleNamespace(**tower) for name, tower in settings["towers"].items()}
    bridges = SimpleNamespace(**settings["bridges"])
    return SimpleNamespace(**{**settings, "towers": towers, "bridges": bridges})
