"""Models wrapped by other libraries: compiled, dispatched, offloaded, quantised, or never loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdecode import LM, ModelDrafter, PromptLookup, SinkWindow, StaticTree, UnsupportedModelError, generate
from tests.helpers.models import ARCHITECTURES, DEVICE, build, config, continuation, logits, prompt

LENGTH = 16
SHAPE = ARCHITECTURES["llama"] | {"num_hidden_layers": 2}
LAYERS = [1]


def compiled(model: PreTrainedModel, folder: Path) -> Any:
    return torch.compile(model, backend="eager")


def compiled_forward(model: PreTrainedModel, folder: Path) -> Any:
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    return model


def compiled_in_place(model: PreTrainedModel, folder: Path) -> Any:
    model.compile(backend="eager", dynamic=True)
    return model


def dispatched(model: PreTrainedModel, folder: Path) -> Any:
    return dispatch_model(model, {"": DEVICE}, force_hooks=True)


def offloaded(model: PreTrainedModel, folder: Path) -> Any:
    cpu_offload(model, execution_device=torch.device(DEVICE))
    return model


def offloaded_to_disk(model: PreTrainedModel, folder: Path) -> Any:
    disk_offload(model, str(folder), execution_device=torch.device(DEVICE))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, about the compiled code
@pytest.mark.parametrize(
    "wrap", [compiled, compiled_forward, compiled_in_place, dispatched, offloaded, offloaded_to_disk]
)
def test_a_wrapped_model_decodes_as_it_does_alone(
    wrap: Callable[[PreTrainedModel, Path], Any], tmp_path: Path, unchecked: None
) -> None:
    """Guards against a wrapper's own signature, weights that are absent between two forwards, and drafts of some layers
    that run all of them, because a wrapped forward is bound to its original module.
    """
    plain = LM(build(SHAPE))
    target = LM(wrap(build(SHAPE), tmp_path), name="wrapped")
    assert target.device.type == torch.device(DEVICE).type
    draft = target.subset(LAYERS)
    text = [*prompt()]
    torch.testing.assert_close(logits_of(draft, text), logits_of(plain.subset(LAYERS), text))
    torch.testing.assert_close(logits_of(target, text), logits(plain.model, text)[-1])
    expected = continuation(plain.model, text, LENGTH)
    for drafter in (PromptLookup(), ModelDrafter(draft, StaticTree((2, 2)))):
        assert generate(target, text, drafter=drafter, max_new_tokens=LENGTH).tokens == expected
    policy = SinkWindow(12)
    assert (
        generate(target, text, policy=policy, max_new_tokens=LENGTH).tokens
        == generate(plain, text, policy=policy, max_new_tokens=LENGTH).tokens
    )


def logits_of(target: LM, text: list[int]) -> torch.Tensor:
    return target.forward(target.new_slots(len(text)), torch.tensor(text))[-1]


def test_weights_that_were_never_loaded_are_told() -> None:
    """Guards against an error that blames the architecture for weights that were never loaded."""
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config(ARCHITECTURES["llama"]))
    with pytest.raises(
        UnsupportedModelError, match=r"embed_tokens.weight, are on the device .meta. and were never loaded"
    ):
        LM(empty)
    half = build(ARCHITECTURES["llama"])
    half.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"its weights, such as lm_head.weight, are on the device .meta."):
        LM(half)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_told(value: float) -> None:
    """Guards against an error that blames positions and masks for weights of NaN."""
    model = build(ARCHITECTURES["llama"])
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(
        UnsupportedModelError, match=r"logits that are NaN or infinite: its weights are damaged.*float64"
    ):
        LM(model)


class Linear8bitLt(torch.nn.Linear):
    """A layer that rounds by the other tokens of a forward, as the layers of this name in bitsandbytes do."""

    threshold = 0.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        outliers = input.abs().flatten(0, -2).amax(0) > self.threshold
        return super().forward(torch.where(outliers, input, (input * 4).round() / 4))


@pytest.mark.parametrize("threshold", [1.0, 1e9])
def test_layers_that_mix_the_tokens_of_a_forward_are_told(threshold: float) -> None:
    """Guards against an error that blames positions and masks, and against a refusal by the class name alone."""
    model = build(ARCHITECTURES["llama"])
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Linear8bitLt
        layer.mlp.down_proj.threshold = threshold
    if threshold > 1e6:
        assert LM(model).vocab_size
        return
    with pytest.raises(
        UnsupportedModelError, match=r"bitsandbytes choose their outliers among all tokens of a forward"
    ):
        LM(model)
