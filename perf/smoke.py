"""The first half minute on a GPU: `python -m perf.smoke`, the first step of `perf.gpu` that runs a model.

It prints versions, the attention kernels that PyTorch has for the shapes of decoding, and whether a tiny model on CUDA
graphs gives the tokens of transformers. It needs neither a network nor the packages of the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig

from specdecode import FixedK, ModelDrafter, NoDraft, generate, load
from specdecode.backends.device import synchronise
from specdecode.backends.graph import CudaGraphs
from specdecode.bench.measure.counters import host_reads
from specdecode.cli.output import say, standard_streams
from specdecode.models.architectures import config_of
from specdecode.models.devices import choose_device, leave_out_cudnn
from specdecode.models.loading import TINY, choose_dtype
from specdecode.support.environment import environment

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""PyTorch's kernels of attention by name."""

_SHAPE = "pythia-2.8b"
_CACHED_TOKENS = 512
_CALLS = 10
_PROMPT_TOKENS, _NEW_TOKENS, _K = 12, 24, 4


def versions(device: torch.device) -> dict[str, object]:
    """Return the versions and the hardware that a measurement depends on, by name."""
    values: dict[str, object] = dict(environment())
    values["triton"] = "there" if importlib.util.find_spec("triton") else "not installed"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        values["compute capability"] = f"{about.major}.{about.minor}"
        values["memory"] = f"{about.total_memory / 2**30:.0f} GiB"
        values["cudnn"] = torch.backends.cudnn.version()
    return values


def attention_kernels(device: torch.device) -> list[str]:
    """Return a line for each shape of attention in decoding: the kernel that PyTorch takes for it as models are loaded
    here, and the milliseconds of each kernel that it has, where the first call may plan."""
    config = config_of(_SHAPE)
    heads = config.num_attention_heads
    kind = {"dtype": choose_dtype(None, device), "device": device}
    lines = []
    for name, rows, slots in (
        ("1 row with a mask", 1, _CACHED_TOKENS),
        ("8 rows with a mask", 8, _CACHED_TOKENS),
        ("a prompt without a mask", _CACHED_TOKENS, _CACHED_TOKENS),
    ):
        sizes = (rows, slots, slots)
        inputs = [torch.randn(1, heads, length, config.hidden_size // heads, **kind) for length in sizes]
        mask = None if rows == slots else torch.zeros(1, 1, rows, slots, **kind)
        # The choice among the kernels, for a call that names none.
        taken = SDPBackend(torch._fused_sdp_choice(*inputs, attn_mask=mask, is_causal=mask is None))
        times = ", ".join(f"{kernel} {_milliseconds(kind_of, inputs, mask)}" for kernel, kind_of in KERNELS.items())
        chosen = next((kernel for kernel, kind_of in KERNELS.items() if kind_of == taken), taken.name)
        lines.append(f"attention of {name}: PyTorch takes {chosen}. In ms, and the first call: {times}")
    return lines


def _milliseconds(kernel: SDPBackend, inputs: Sequence[Tensor], mask: Tensor | None) -> str:
    """Return the median time of a kernel in words, with that of its first call; "none" if there is no such kernel."""

    def call() -> object:
        return scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=mask is None)

    device = inputs[0].device
    with warnings.catch_warnings():  # PyTorch warns of the reasons why it has none
        warnings.simplefilter("ignore")
        try:
            with sdpa_kernel(kernel):
                first, *others = [1e3 * _seconds(call, device) for _ in range(1 + _CALLS)]
        except RuntimeError:
            return "none"
    return f"{statistics.median(others):.3f} ({first:.1f})"


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def decodes(device: torch.device) -> bool:
    """Decode with a tiny model, plainly and with drafts, and print what was counted.

    Returns:
        Whether both give the tokens of transformers and, on a GPU, run captured forwards.
    """
    eager = load(TINY, device=device, dtype="float32", backend="eager")
    prompt = [(7 * place + 3) % eager.vocab_size for place in range(_PROMPT_TOKENS)]
    ids = torch.tensor([prompt], device=device)
    settings = GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
    output = eager.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
    expected = output[0, len(prompt) :].tolist()
    target = eager.with_backend("auto")
    say(f"backend: {target.backend}")
    right = device.type != "cuda" or target.static is not None
    if not right:
        say("NOTHING IS CAPTURED: all that is measured here would run eagerly")
    for name, drafter in (("plain decoding", NoDraft()), ("drafts", ModelDrafter(target.subset([0, 1])))):
        captures = []
        for _ in range(2):
            captured = CudaGraphs.count
            with host_reads(device) as reads:
                result = generate(target, prompt, drafter=drafter, controller=FixedK(_K), max_new_tokens=_NEW_TOKENS)
            captures.append(CudaGraphs.count - captured)
        same = result.tokens == expected
        right = right and same
        say(
            f"{name}: tokens are {'those of transformers' if same else f'WRONG: {result.tokens}, not {expected}'};"
            f" {len(result.steps)} steps, {reads[0] / len(result.steps):.1f} host reads in each;"
            f" {captures[0]} captures, then {captures[1]}"
        )
    return right


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found. Return 1 if tokens are wrong, or if nothing is captured on a GPU; else 0."""
    parser = argparse.ArgumentParser(prog="python -m perf.smoke", description="Try out a GPU in half a minute.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu to rehearse [cuda]")
    try:
        device = choose_device(parser.parse_args(arguments).device)
    except ValueError as error:
        parser.error(str(error))
    for name, value in versions(device).items():
        say(f"{name}: {value}")
    leave_out_cudnn(device)  # as `load` does
    for line in attention_kernels(device):
        say(line)
    return 0 if decodes(device) else 1


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
