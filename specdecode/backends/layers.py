"""Where a model holds its decoder layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that decodes text, without those that read pictures or sound."""
    decoder: nn.Module = model.get_decoder()
    words = model.get_input_embeddings()
    # Some models call another module their decoder, such as the layer of their logits.
    return decoder if any(module is words for module in decoder.modules()) else model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return a model's list of decoder layers; None if the model does not hold them in one list."""
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    return next((m for m in text_decoder(model).modules() if isinstance(m, nn.ModuleList) and len(m) == total), None)
