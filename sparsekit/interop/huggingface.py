"""Any model of ours as one of transformers': importing this lets ``AutoModelForCausalLM`` load what ``export`` wrote.

A spec that one of the known families expresses is exported as that family and needs nothing of this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.build import as_model_spec
from sparsekit.model.decoder import Decoder


class SparsekitConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """A config.json that holds a whole model spec under ``spec``."""

    model_type = "sparsekit"

    def __init__(self, spec: dict[str, Any] | None = None, **kwargs: Any):
        self.spec = spec or {}
        kwargs.setdefault("use_cache", False)
        kwargs.setdefault("tie_word_embeddings", False)  # where they are, there is no second table
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int | None:
        return self.spec.get("vocab_size")

    @property
    def hidden_size(self) -> int | None:
        return self.spec.get("d_model")

    @property
    def num_hidden_layers(self) -> int | None:
        return self.spec.get("n_layers")

    @property
    def max_position_embeddings(self) -> int | None:
        return self.spec.get("max_seq_len")


class SparsekitForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The decoder of a spec, called as transformers calls models.

    ``attention_mask`` is [batch, tokens], 0 for padding on either side. Without a cache, as each of our attentions has
    one of its own kind; ``sparsekit generate`` uses it.
    """

    config_class = SparsekitConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: SparsekitConfig):
        super().__init__(config)
        self.model = Decoder(as_model_spec(config.spec))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def _init_weights(self, module: Any) -> None:
        """Fills what no file holds: the tables of positions, counters, and all of a fresh model."""
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        read = {n: t.detach().clone() for n, t in own.items() if getattr(t, "_is_hf_initialized", False)}
        with torch.no_grad():
            for counter in getattr(module, "counters", ()):
                own[counter].zero_()
            if hasattr(module, "reset_parameters") and len(read) < len(own):
                module.reset_parameters()
            for name, tensor in read.items():
                own[name].copy_(tensor)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, tokens, vocabulary], and the loss where there are labels (-100 counts for nothing)."""
        context = ForwardContext()
        if attention_mask is not None and not bool(attention_mask.all()):
            real_BT = attention_mask.long()  # padding is a document of its own, which no token of the other sees
            context = ForwardContext(positions_BT=(real_BT.cumsum(-1) - 1).clamp(min=0), documents_BT=real_BT)
        logits = self.model(input_ids, context)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, kept])

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register("sparsekit", SparsekitConfig, exist_ok=True)
AutoModelForCausalLM.register(SparsekitConfig, SparsekitForCausalLM, exist_ok=True)
