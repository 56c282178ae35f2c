"""The MTP layer of a checkpoint as a draft head (multi-token prediction, DeepSeek-V3, 2024)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from specdecode.backends.kernels import restore_layers
from specdecode.core.errors import ModelFileError, UnsupportedModelError, first_line
from specdecode.core.transfer import moved
from specdecode.heads.parts import Store
from specdecode.models.variants import final_norm, shared_copy


@dataclass(frozen=True, slots=True)
class MtpShape:
    """The sizes of an MTP layer.

    Attributes:
        hidden: width of the target's hidden states and of the layer's states.
        layers: the target's last layer. The MTP layer reads its output after the target's final norm.
    """

    hidden: int
    layers: tuple[int, ...]

    @property
    def target_hidden(self) -> int:
        return self.hidden


class MtpHead(nn.Module):
    """A head that predicts token i + 1 from the embedding of token i and the target's normalised hidden state at token
    i - 1.

    If the target has not computed this hidden state, the layer's own normalised state replaces it. The modules are
    transformers' own. If a checkpoint has several MTP layers, the first is used at every depth.

    Args:
        target: the target's model. The weights of its MTP layers must be in its folder or on the hub.

    Attributes:
        window: width of the layer's sliding-window attention, in positions; None if it attends to all tokens.

    Raises:
        UnsupportedModelError: the target has no MTP layers, or this version of transformers cannot load them.
        ModelFileError: the weights of the MTP layers are missing or damaged.
    """

    tokens: Int[Tensor, " V"]

    def __init__(self, target: Any) -> None:
        super().__init__()
        config = target.config.get_text_config(decoder=True)
        norm = final_norm(target)
        if not getattr(config, "num_mtp_layers", None) or norm is None:
            raise UnsupportedModelError(
                f"{config.name_or_path or config.model_type} comes with no MTP layers: draft with a model, a head or a"
                " lookup"
            )
        layers = _load(target)
        self.shape = MtpShape(config.hidden_size, (config.num_hidden_layers - 1,))
        self.register_buffer("tokens", torch.arange(config.vocab_size), persistent=False)
        self._rotary, self._layer = layers.rotary_emb, layers.layers[0]
        # `LM` may wrap a model that was converted after it was loaded. Buffers keep their type, as the target's do.
        for weight in self._layer.parameters():
            weight.data = weight.data.to(target.dtype)
        kind = (getattr(layers.config, "layer_types", None) or ["full_attention"])[0]
        self.window: int | None = layers.config.sliding_window if kind == "sliding_attention" else None
        self._rotary_options = {"layer_type": kind} if layers.has_per_layer_rope else {}
        # In a tuple, so that PyTorch does not register the target's norm as a part of this head.
        self._norm = (norm,)
        # The head shares both with its target.
        self.embed_tokens = self.lm_head = None

    def fused(self, hidden_states: Float[Tensor, "*b n H"]) -> Float[Tensor, "*b n H"]:
        """Return the target's hidden states after its final norm."""
        normed: Tensor = self._norm[0](hidden_states)
        return moved(normed, hidden_states.device)  # the target's norm may lie elsewhere

    def forward(
        self,
        embedded: Float[Tensor, "b n H"],
        state: Float[Tensor, "b n H"],
        positions: Int[Tensor, " n"],
        store: Store,
        visible: Bool[Tensor, "n s"],
    ) -> Float[Tensor, "b n H"]:
        """Return the states at some tokens, which the next draft step reads; see `Eagle3Head.forward`."""
        mask = torch.zeros(visible.shape, dtype=embedded.dtype, device=visible.device)
        mask.masked_fill_(~visible, torch.finfo(embedded.dtype).min)
        places = positions[None]
        states: Tensor = self._layer(
            embedded,
            state,
            position_embeddings=self._rotary(embedded, position_ids=places, **self._rotary_options),
            position_ids=places,
            attention_mask=mask[None, None],
            past_key_values=_Cache(store),
        )
        return states

    def normed(self, state: Float[Tensor, "*b n H"]) -> Float[Tensor, "*b n H"]:
        """Return the states unchanged, as the MTP layer has normalised them for the output layer."""
        return state


class _Cache:
    """A cache for transformers' decoder layers, with the only method that they call."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._store(keys, values, layer)


def _load(target: Any) -> Any:
    """Return transformers' module with a target's MTP layers.

    Raises:
        UnsupportedModelError: this version of transformers cannot load them.
        ModelFileError: the weights are missing or damaged.
    """
    try:
        from transformers.modeling_layers import MtpModel
    except ImportError as error:
        raise UnsupportedModelError(
            "this version of transformers cannot load MTP layers: install 5.23 or later"
        ) from error
    patterns = target._keys_to_ignore_on_load_unexpected or []
    if any(re.search(r"layers\\\.\d", pattern) for pattern in patterns):
        # transformers finds the MTP layers by their numbers, and lists only the numbers in models of published sizes.
        config = target.config.get_text_config()
        numbers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
        patterns = [*patterns, *(rf"\.layers\.{number}\." for number in numbers)]
        target._keys_to_ignore_on_load_unexpected = patterns
    try:
        return MtpModel.from_pretrained(_with_its_own_layers(target), device_map={"": target.device})
    except Exception as error:  # no file on the hub, a missing tensor, or a family without such layers
        raise ModelFileError(
            f"cannot load the MTP layers of {target.config.name_or_path}: {first_line(error)}"
        ) from error


def _with_its_own_layers(target: Any) -> Any:
    """Return a copy of a target without kernels. transformers builds MTP layers of the classes of the target's modules,
    from sizes, and loads their weights by name. A module with a kernel has other arguments and other names."""
    copied = shared_copy(target)
    restore_layers(copied)
    return copied
