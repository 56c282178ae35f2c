"""The Triton kernels against their references, and the backend that runs them: `tox -e triton`, or on a GPU."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from specdecode import (
    LM,
    Chain,
    DraftTree,
    FixedK,
    HeadDrafter,
    ModelDrafter,
    NoDraft,
    StaticTree,
    backends,
    generate,
    generate_batch,
    load_mtp,
)
from specdecode.backends import cache_views, prepare
from specdecode.backends.kernels import BY_KERNEL, TYPES, KernelModule, interpreted
from specdecode.backends.static import StaticRunner
from specdecode.controllers.base import Limit
from specdecode.core.errors import UnsupportedModelError
from specdecode.drafters.base import Context
from specdecode.drafters.tree_shapes import TreeShape
from specdecode.heads.bound import BoundHead, untrained
from specdecode.models.quantize import quantizer, weight_bytes
from specdecode.models.quantized_linear import Int8Linear
from tests.helpers import models
from tests.helpers.heads import write_mtp
from tests.helpers.last_bits import off
from tests.helpers.models import ARCHITECTURES, build, moved, prompt
from tests.helpers.pretended_tensors import launches
from tests.helpers.root import ROOT
from tests.helpers.strategies import trees

ON_GPU = torch.device(models.DEVICE).type == "cuda" and "tests.helpers.pretended" not in sys.modules
RUNS = interpreted() or (ON_GPU and find_spec("triton") is not None)
if RUNS:
    from specdecode.backends.kernels import attention, cache, linear, norms, rows

pytestmark = pytest.mark.skipif(
    not RUNS, reason="needs the package triton, and a GPU or its interpreter: tox -e triton"
)

LENGTH = 10
DIMS = (16, 64, 80, 96, 128)
DTYPES = st.sampled_from(TYPES)


@pytest.fixture(scope="module", autouse=True)
def _small_and_interpreted() -> Iterator[None]:
    """Let products of few outputs take the blocks of many. And let Triton's interpreter multiply bfloat16, whose 16
    bits it takes for an integer (3.7.1), and sum all rows of a product in the same order. A GPU's instruction does so,
    and NumPy's library does not.
    """
    with pytest.MonkeyPatch.context() as patch:
        if RUNS:
            patch.setattr(linear, "_MANY", 64)
        if RUNS and interpreted():
            from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

            def in_float32(handle: Any) -> np.ndarray[Any, Any]:
                if handle.dtype.scalar != tl.bfloat16:
                    return np.asarray(handle.data, dtype="float32")
                return np.asarray((handle.data.astype("uint32") << 16).view("float32"))

            def dot(self: Any, left: Any, right: Any, added: Any, *_: Any) -> Any:
                product = np.einsum("ik,kj->ij", in_float32(left), in_float32(right), optimize=False)
                return TensorHandle(product + added.data, added.dtype.scalar)

            patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@dataclass(frozen=True, slots=True)
class Attended:
    """The inputs of an attention.

    Attributes:
        tensors: query, key, value, mask, start and first.
        visible: [W, span] the slots that each row attends to.
    """

    tensors: tuple[Any, ...]
    visible: Tensor


@st.composite
def attended(draw: st.DrawFn, widths: st.SearchStrategy[int]) -> Attended:
    """Draw any mask behind slots that all rows share. Slots that no row attends to hold NaN, and so do those behind the
    span.
    """
    dtype, dim, width = draw(DTYPES), draw(st.sampled_from(DIMS)), draw(widths)
    shared, groups, span = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 400))
    start = draw(st.integers(0, span))
    first = draw(st.none() | st.integers(0, start))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    visible = torch.rand(width, span, generator=random) < draw(st.sampled_from([0.02, 0.5, 1.0]))
    mask = torch.zeros(width, span).masked_fill(~visible, torch.finfo(dtype).min)
    visible[:, : first or 0] = True
    visible[:, start + width :] = False
    query, key, value = (
        torch.randn(1, heads, size, dim, generator=random).to(dtype)
        for heads, size in ((shared * groups, width), (shared, span + 3), (shared, span + 3))
    )
    unseen = (~nn.functional.pad(visible, (0, 3)).any(0)).nonzero()[:, 0]
    for tensor in (key, value):
        tensor[:, :, unseen] = torch.nan
    places = (torch.tensor(start), None if first is None else torch.tensor(first))
    tensors = (query, key[:, :, :span], value[:, :, :span], mask.to(dtype)[None, None], *places)
    return Attended(tuple(one if one is None else one.to(models.DEVICE) for one in tensors), visible)


@settings(max_examples=60)
@given(inputs=st.one_of(attended(st.integers(1, 16)), attended(st.sampled_from([17, 32, 48, 72]))))
def test_attention_is_its_reference(inputs: Attended) -> None:
    """Guards against a length that is no multiple of a block, rows that read another head's keys or another row's mask,
    parts of a context that count wrongly, and slots that nothing attends to but whose NaN arrive all the same.
    """
    query, _, value = inputs.tensors[:3]
    scale = query.shape[3] ** -0.5
    output = attention.attend_to_slots(*inputs.tensors, scale)
    expected = attention.attend_to_slots_reference(*inputs.tensors, scale)
    assert (output.shape, output.dtype) == (expected.shape, query.dtype)
    assert expected.isfinite().all()
    assert not expected[0, ~inputs.visible.any(1).to(expected.device)].any()
    # Weights and outputs are rounded: each by half a unit of the greatest value at most, the outputs of both.
    rounding = 1e-5 if query.dtype == torch.float32 else 1.5 * torch.finfo(query.dtype).eps
    assert (output - expected).abs().max() <= rounding * value.nan_to_num().abs().max().clamp_min(1)


@settings(max_examples=60)
@given(
    dtype=DTYPES,
    dim=st.sampled_from(DIMS),
    sizes=st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 4, 20]), st.integers(1, 2), st.integers(1, 20)),
    length=st.integers(1, 600),
    share=st.sampled_from([0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_a_row_attends_as_if_it_were_alone(
    dtype: torch.dtype, dim: int, sizes: tuple[int, int, int, int], length: int, share: float, seed: int
) -> None:
    """Guards against sums whose order depends on the other rows, or on the slots between those that a row sees; and
    against NaN in slots that it does not see.
    """
    random = torch.Generator().manual_seed(seed)
    shared, groups, batch, width = sizes
    visible = torch.rand(batch, 1, width, length, generator=random) < share
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(dtype).min)
    query, key, value = (
        torch.randn(batch, heads, size, dim, generator=random).to(models.DEVICE, dtype)
        for heads, size in ((shared * groups, width), (shared, length + 3), (shared, length + 3))
    )
    key, value = (tensor[:, :, :length] for tensor in (key, value))
    for unseen, *tensors in zip(~visible.any(2)[:, 0], key, value, strict=True):
        for tensor in tensors:
            tensor[:, unseen.nonzero()[:, 0]] = torch.nan
    mask = mask.to(models.DEVICE, dtype)
    output = rows.attend_row_by_row(query, key, value, mask, dim**-0.5)
    for i in range(batch):
        places = (torch.tensor(length, device=models.DEVICE), None, dim**-0.5)
        tensors = [tensor[i : i + 1] for tensor in (query, key, value, mask)]
        expected = attention.attend_to_slots_reference(*tensors, *places)
        rounding = 1e-5 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
        assert (output[i] - expected[0]).abs().max() <= rounding * value.nan_to_num().abs().max().clamp_min(1)
        for row in range(0, width, 7):
            seen = visible[i, 0, row].nonzero()[:, 0].to(models.DEVICE)
            if not len(seen):
                assert not output[i, row].any()
                continue
            parts = (query[i : i + 1, :, row : row + 1], key[i : i + 1, :, seen], value[i : i + 1, :, seen])
            alone = rows.attend_row_by_row(*parts, mask.new_zeros(1, 1, 1, len(seen)), dim**-0.5)
            assert torch.equal(output[i, row], alone[0, 0])


def test_many_rows_attend_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against rows of a prompt that read or write those of another launch."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 11, 16, device=models.DEVICE) for heads in (4, 2, 2))
    mask = torch.zeros(2, 1, 11, 11, device=models.DEVICE).masked_fill(torch.rand(2, 1, 11, 11) < 0.5, -1.0)
    at_once = rows.attend_row_by_row(query, key, value, mask, 0.25)
    monkeypatch.setattr(rows, "_MOST_BYTES", 3 * 4 * 4 * 16)
    assert torch.equal(rows.attend_row_by_row(query, key, value, mask, 0.25), at_once)


@settings(max_examples=60)
@given(
    dtype=DTYPES,
    rows=st.integers(1, 40),
    inputs=st.sampled_from([16, 40, 256, 300, 513]),
    outputs=st.sampled_from([1, 16, 33, 80]),
    bias=st.booleans(),
    int8=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_product_is_its_reference(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool, int8: bool, seed: int
) -> None:
    """Guards against rows and features behind the last full block, scales of another output, and a row whose last bits
    depend on the rows beside it.
    """
    torch.manual_seed(seed)
    plain = nn.Linear(inputs, outputs, bias).to(models.DEVICE, dtype).requires_grad_(False)
    layer = Int8Linear(plain) if int8 else plain
    assert linear.takes(layer)
    replaced = linear.KernelLinear(layer, most_rows=None)
    assert (replaced.bias is None) == (not bias)
    states = torch.randn(1, rows, inputs, device=models.DEVICE).to(dtype)
    weight, scales = (layer.integers, layer.scales) if int8 else (layer.weight, None)
    expected = linear.multiply_reference(states[0], weight, scales, layer.bias)
    output = replaced(states)
    assert (output.shape, output.dtype) == ((1, rows, outputs), dtype)
    # Both sum in float32. So sums near the middle of two numbers may be rounded to either.
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(output[0], expected, rtol=rounding, atol=1e-5)
    assert all(torch.equal(replaced(states[:, row : row + 1])[0, 0], output[0, row]) for row in range(0, rows, 5))


def test_wider_inputs_and_other_types_run_the_layer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a prompt that is multiplied in blocks of 16 rows, or not at all."""
    monkeypatch.setattr(linear, "multiply", lambda *_: pytest.fail("the kernel ran"))
    for dtype, rows in ((torch.float32, 17), (torch.float64, 4)):
        plain = nn.Linear(48, 40).to(models.DEVICE, dtype)
        for layer in (plain, Int8Linear(plain)):
            states = torch.randn(1, rows, 48, device=models.DEVICE).to(dtype)
            assert torch.equal(linear.KernelLinear(layer)(states), layer(states))
    assert not linear.takes(nn.Linear(48, 40).double())
    assert not linear.takes(nn.Embedding(48, 40))


@settings(max_examples=30)
@given(
    dtype=DTYPES, rows=st.integers(1, 17), width=st.sampled_from([1, 32, 80, 300]), epsilon=st.sampled_from([0, 0.5])
)
def test_a_norm_is_its_reference(dtype: torch.dtype, rows: int, width: int, epsilon: float) -> None:
    """Guards against widths that are no power of two, and against a row that is normalised with the next."""
    torch.manual_seed(rows)
    weight = torch.randn(width, device=models.DEVICE).to(dtype)
    states = torch.randn(2, rows, 2 * width, device=models.DEVICE).to(dtype)[..., ::2] + 1
    output, expected = (norm(states, weight, epsilon) for norm in (norms.rms_norm, norms.rms_norm_reference))
    assert output.dtype == dtype
    # Two roundings, and a sum in another order.
    torch.testing.assert_close(output, expected, rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=1e-5)


@settings(max_examples=40)
@given(
    dtype=st.sampled_from([*TYPES, torch.float64]),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    widths=st.tuples(st.sampled_from([8, 80, 192]), st.sampled_from([1, 8, 128])),
    rows=st.integers(1, 20),
    start=st.integers(0, 12),
    spread=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_keys_and_values_are_written_as_by_the_reference(
    dtype: torch.dtype,
    heads: tuple[int, int],
    widths: tuple[int, int],
    rows: int,
    start: int,
    spread: tuple[bool, bool],
    seed: int,
) -> None:
    """Guards against tokens in the slots of others or of another layer, and against values that are written with the
    strides or the width of the keys.
    """
    torch.manual_seed(seed)
    new, stacks = [], []
    for count, width, apart in zip(heads, widths, spread, strict=True):
        # A layer computes them as a part of something wider, a token at a time.
        wider = torch.randn(1, rows, count, 2 * width, device=models.DEVICE).to(dtype)
        new.append((wider[..., ::2] if apart else wider[..., width:]).transpose(1, 2))
        stacks.append(torch.randn(2, count, 40, width, device=models.DEVICE).to(dtype))
    places = torch.tensor(start, device=models.DEVICE) + torch.arange(rows, device=models.DEVICE)
    expected = [stack.clone() for stack in stacks]
    cache_views.write_to_slots(*new, *(stack[1:2] for stack in expected), places)
    cache.write_to_slots(*new, *(stack[1:2] for stack in stacks), places)
    assert all(torch.equal(stack, other) for stack, other in zip(stacks, expected, strict=True))


@functools.cache
def plain(name: str) -> LM:
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if name == "gemma3-window" else {}
    return LM(build(ARCHITECTURES[name] | {"num_hidden_layers": 2} | kinds).float(), name=name)


NOTES = {
    "llama": "15 linear layers and 5 norms by kernels",
    "gpt-neox": "9 linear layers and 0 norms by kernels",
    "gemma3-window": "15 linear layers and 0 norms by kernels",
}


@pytest.mark.parametrize("name", NOTES)
def test_the_tokens_are_those_of_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a captured length that is right for one step only, against a window that the kernel does not see,
    and against a model that still runs or writes by PyTorch's operations.
    """
    calls = []
    monkeypatch.setattr(
        attention, "attend_to_slots", lambda *given, run=attention.attend_to_slots: calls.append(given) or run(*given)
    )
    expected = generate(plain(name), prompt(), max_new_tokens=LENGTH)
    assert len({*expected.tokens}) > LENGTH // 2
    target = plain(name).with_backend("triton")
    assert (target.backend.name, target.backend.note) == ("triton", NOTES[name])
    assert type(plain(name).model.get_output_embeddings()) is nn.Linear
    draft = target.subset([1])
    monkeypatch.setattr(Tensor, "index_copy_", lambda *given: pytest.fail("the write is two operations"))
    for drafter in (NoDraft(), ModelDrafter(draft), ModelDrafter(draft, StaticTree((3, 2)))):
        calls.clear()
        result = generate(target, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=LENGTH)
        assert result.tokens == expected.tokens
        # The forward of a prompt's first tokens is no static one.
        assert ON_GPU or len(calls) >= 2 * (result.target_forwards - 1) > 0


class Recorded(HeadDrafter):
    """A drafter with a head that keeps its trees."""

    def __init__(self, head: BoundHead, shape: TreeShape) -> None:
        super().__init__(head, shape)
        self.trees: list[tuple[list[int], list[int]]] = []

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tree = super().propose(context, limit)
        self.trees.append((tree.tokens.tolist(), tree.parents.tolist()))
        return tree


def test_a_head_drafts_as_on_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the head that others hold, or its file, with the kernels in it."""
    head = untrained(plain("llama"))
    parts = [*head.state_dict()]
    drafts_by_kernels(lambda target: BoundHead(head, target), plain("llama"), 1, monkeypatch)
    assert [*head.state_dict()] == parts
    assert not any(isinstance(module, KernelModule) for module in head.modules())


@pytest.mark.parametrize(("family", "attentions"), [("mellum", 1), ("deepseek_v3", 0)])
def test_an_mtp_layer_drafts_as_on_eager(
    family: str, attentions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against norms by a kernel that transformers builds again, from sizes; against a window that the layer's
    kernel does not see; and against values that are narrower than the keys.
    """
    folder = write_mtp(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    drafts_by_kernels(load_mtp, LM(moved(model, models.DEVICE), name=family), attentions, monkeypatch)


def drafts_by_kernels(
    bind: Callable[[LM], BoundHead], target: LM, attentions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a head drafts the same with and without kernels, and that they run.

    Args:
        bind: binds the head to a target.
        target: the target, on the backend "eager".
        attentions: number of attentions by a kernel in a forward of the head; the target's layers have as many.
    """
    expected = generate(target, prompt(), max_new_tokens=LENGTH).tokens
    calls = []
    monkeypatch.setattr(
        attention, "attend_to_slots", lambda *given, run=attention.attend_to_slots: calls.append(given) or run(*given)
    )
    monkeypatch.setattr(Tensor, "index_copy_", lambda *given: pytest.fail("the write is two operations"))
    for shape in (Chain(), StaticTree((3, 2))):
        trees = {}
        for backend in ("eager", "triton"):
            decoding = target.with_backend(backend)
            drafter = Recorded(bind(decoding), shape)
            calls.clear()
            result = generate(decoding, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=LENGTH)
            assert result.tokens == expected
            trees[backend] = drafter.trees
        # The first forward of a prompt is no static one.
        forwards = target.config.num_hidden_layers * (result.target_forwards - 1) + drafter.forwards - 1
        assert len(calls) >= attentions * forwards
        assert any(isinstance(module, linear.KernelLinear) for module in drafter.head._head.modules())
        assert trees["triton"] == trees["eager"]
        assert len({token for tokens, _ in trees["eager"] for token in tokens}) > 3


EXACT = {"llama": torch.bfloat16, "qwen3": torch.float32, "gpt-neox": torch.float16}


@functools.cache
def exact(name: str) -> LM:
    model = build(ARCHITECTURES[name] | {"num_hidden_layers": 2, "tie_word_embeddings": name == "llama"})
    return LM(model.to(EXACT[name]), name=name).with_backend("exact")


@settings(max_examples=3)
@given(tree=trees(max_nodes=20, tokens=90))
@pytest.mark.parametrize("name", EXACT)
def test_a_tree_gives_the_logits_of_plain_decoding_to_the_last_bit(name: str, tree: DraftTree) -> None:
    """Guards against a draft that changes the rounding on the backend "exact", and with it the tokens at near-ties."""
    assert off(exact(name), tree) == []


def test_a_drafted_text_is_that_of_plain_decoding_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against accepted keys in another order than plain decoding's, and against sequences that change each
    other; and against a backend "exact" that runs PyTorch's attention.
    """
    target = exact("llama")
    draft = target.subset([1])
    calls = []
    monkeypatch.setattr(
        rows, "attend_row_by_row", lambda *given, run=rows.attend_row_by_row: calls.append(given) or run(*given)
    )
    monkeypatch.setattr(Tensor, "index_copy_", lambda *given: pytest.fail("the write is two operations"))
    options = {"max_new_tokens": 6, "logprobs": True}
    prompts = [prompt(), prompt()[:3]]
    plain = [generate(target, text, **options) for text in prompts]
    assert len({*plain[0].tokens}) > 3
    calls.clear()
    tree = generate(target, prompts[0], drafter=ModelDrafter(draft, StaticTree((3, 2))), **options)
    assert len(calls) >= 2 * tree.target_forwards
    batch = generate_batch(target, prompts, drafter=lambda: ModelDrafter(draft), **options)
    for result, expected in zip([tree, *batch], [plain[0], *plain], strict=True):
        assert (result.tokens, result.logprobs) == (expected.tokens, expected.logprobs)


_LAYER = {"_attend_to_part": 1, "_write": 1, "add": 4, "neg": 2}
_LLAMA = _LAYER | {"_multiply": 7, "_normalise": 2, "cat": 2, "mul": 5, "silu": 1}
_NEOX = _LAYER | {"_multiply": 4, "cat": 4, "gelu": 1, "mul": 4, "native_layer_norm": 2}
_BESIDE = {
    "_multiply": 1,
    "_to_copy": 4,
    "add": 1,
    "arange": 2,
    "bitwise_and": 2,
    "bitwise_not": 1,
    "bitwise_or": 1,
    "cat": 1,
    "clamp": 1,
    "cos": 1,
    "embedding": 1,
    "ge": 1,
    "gt": 1,
    "index": 1,
    "lt": 2,
    "masked_fill_": 1,
    "max": 1,
    "mul": 3,
    "scalar_tensor": 1,
    "sin": 1,
    "sub": 1,
    "where": 1,
    "zeros": 1,
}
_ORDER = {
    "arange": 3,
    "cumsum": 1,
    "eq": 1,
    "scalar_tensor": 2,
    "scatter_": 1,
    "sub": 2,
    "sum": 1,
    "where": 2,
    "zeros": 2,
}
KERNELS = {
    ("triton", "llama"): (_LLAMA | {"_combine_parts": 1}, _BESIDE | {"_normalise": 1}),
    ("triton", "gpt-neox"): (_NEOX | {"_combine_parts": 1}, _BESIDE | {"native_layer_norm": 1}),
    ("exact", "llama"): (_LLAMA | {"_combine_in_order": 1}, _BESIDE | _ORDER | {"_normalise": 1}),
    ("exact", "gpt-neox"): (_NEOX | {"_combine_in_order": 1}, _BESIDE | _ORDER | {"native_layer_norm": 1}),
}
"""The kernels of a captured forward of one row in float16, by name: those of a layer, and those beside the layers. The
names of this package's begin with an underscore, and so does PyTorch's `_to_copy`."""

CLONES = {("triton", "llama"): (1, 0), ("exact", "llama"): (0, 1), ("exact", "gpt-neox"): (1, 1)}
"""The copies that are made of several rows, beside those kernels: in a layer, and beside the layers."""

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Launches(TorchDispatchMode):
    """Counts the kernels that PyTorch launches, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # in inference mode, operations that are made of others arrive undivided
                return func._op_dk(COMPOSITE, *args, **kwargs or {})
        if launches(func):
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("backend", "name"), KERNELS)
def test_a_forward_launches_few_kernels(backend: str, name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against operations added to each layer, or to each forward, and against layers that no kernel computes."""
    mode = Launches()

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        # Without a result: the interpreter takes long.
        return lambda *given, **constants: mode.counts.update([kernel.fn.__name__])

    monkeypatch.setattr(type(linear._multiply), "__getitem__", launch)
    monkeypatch.setattr(LM, "_probe", lambda self: None)
    # On a CPU it serves the interpreter alone.
    monkeypatch.setattr(backends, "separate_activations", lambda model: None)

    def capture(action: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            mode.counts.clear()
            with mode:
                return action()

        return run

    monkeypatch.setattr(backends, "_capturing", lambda forward, device: StaticRunner(forward, capture))

    def count(layers: int) -> Counter[str]:
        model = build(ARCHITECTURES[name] | {"num_hidden_layers": layers}).half()
        target = LM(model, name=name).with_backend(backend)
        slots = target.new_slots(len(prompt()) + 16)
        target.forward(slots, torch.tensor(prompt()))
        target.forward(slots, torch.arange(rows), rows=rows, choose=True)
        return mode.counts.copy()

    two, three = count(2), count(3)
    layer = three - two
    copies = CLONES.get((backend, name), (0, 0)) if rows > 1 else (0, 0)
    for found, kernels, clones in zip((layer, two - layer - layer), KERNELS[backend, name], copies, strict=True):
        most = Counter(kernels) + Counter(clone=clones)
        assert found == most, f"over the budget: {dict(found - most)}; below it: {dict(most - found)}"


def test_a_model_whose_rows_may_change_each_other_is_refused() -> None:
    """Guards against the name "exact" on a model with modules or an attention that no kernel computes."""
    small = {"num_hidden_layers": 2}
    for name, said in (
        ("gpt-2", r"transformer\.h\.0\.attn\.c_attn is a Conv1D, which no kernel computes"),
        ("gemma3-window", r"model\.layers\.0\.self_attn\.q_norm is a Gemma3RMSNorm, which no kernel computes"),
    ):
        with pytest.raises(UnsupportedModelError, match=said):
            LM(build(ARCHITECTURES[name]).float()).with_backend("exact")
    with pytest.raises(UnsupportedModelError, match="Linear, which no kernel computes"):
        LM(build(ARCHITECTURES["llama"] | small).double()).with_backend("exact")
    own = build(ARCHITECTURES["llama"] | small).float()
    own.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="its attention reads all rows together"):
        LM(own).with_backend("exact")
    wide = build(ARCHITECTURES["llama"] | small | {"head_dim": 136}).float()
    with pytest.raises(UnsupportedModelError, match="no kernel attends like its LlamaAttention: the keys are wider"):
        LM(wide).with_backend("exact")


def test_other_layers_stay_as_they_are() -> None:
    """Guards against quantised layers that are converted in each step, products that are no longer shared, and weights
    of another type in a kernel.
    """
    quantised = build(ARCHITECTURES["llama"] | {"num_hidden_layers": 2}).float()
    quantizer("int8")(quantised)
    stored = weight_bytes(quantised)
    assert prepare("triton", quantised).note.startswith("9 linear layers and 5 norms by kernels")
    products = [module for module in quantised.modules() if isinstance(module, linear.KernelLinear)]
    assert {type(product.layer) for product in products} == {Int8Linear}
    assert len(products) == 9
    assert weight_bytes(quantised) == stored
    again = prepare("triton", quantised).note
    assert again.startswith("0 linear layers and 0 norms by kernels, attention"), "they are there already"
    watched = build(ARCHITECTURES["llama"] | {"num_hidden_layers": 2}).float()
    watched.model.layers[0].mlp.up_proj.register_forward_hook(lambda *given: None)
    watched.model.layers[1].input_layernorm.register_forward_pre_hook(lambda *given: None)
    assert prepare("triton", watched).note.startswith("14 linear layers and 4 norms by kernels, 1 other")
    (down,) = [module for name, module in watched.named_modules() if name == "model.layers.0.mlp.down_proj"]
    assert down.weight.shape == (down.out_features, down.in_features)
    double = LM(build(ARCHITECTURES["llama"])).with_backend("triton")
    assert double.backend.note.startswith("0 linear layers and 0 norms by kernels")
    own = build(ARCHITECTURES["llama"] | {"num_hidden_layers": 2}).float()
    own.set_attn_implementation("eager")
    assert LM(own).with_backend("triton").backend.note.endswith("by kernels, attention as it is (eager)")
    assert plain("llama").with_backend("triton").model.config._attn_implementation == BY_KERNEL


def test_only_norms_of_the_usual_kind_are_replaced() -> None:
    """Guards against a norm that is built like the others, but computes something else."""

    class Shifted(LlamaRMSNorm):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states) + states * 0.01

    class Gated(LlamaRMSNorm):
        def forward(self, states: Tensor, gate: Tensor) -> Tensor:
            return super().forward(states * gate)

    assert norms.takes(LlamaRMSNorm(32).to(models.DEVICE))
    for other in (
        Shifted(32),
        Gated(32),
        LlamaRMSNorm(32).double(),
        nn.LayerNorm(32),
        nn.RMSNorm(32),
        nn.Linear(32, 1, bias=False),
    ):
        assert not norms.takes(other.to(models.DEVICE))


_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specdecode.backends.kernels import attention, cache, linear, norms, rows

COUNTED = {"start": "*i64", "first": "*i64", "places": "*i64", "scale": "fp32", "epsilon": "fp32"}
SUMS = dict.fromkeys(("sums", "totals", "greatest", "scales"), "*fp32")
SEEN = dict.fromkeys(("order", "counts"), "*i32")
CACHE = ("keys", "values", "layer_keys", "layer_values")
TENSORS = ("query", "key", "value", "mask", "inputs", "weight", "bias", "output", *CACHE)

for kind, size in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
    types = COUNTED | SUMS | SEEN | dict.fromkeys(TENSORS, "*" + kind)
    for kernel, others, constants in (
        (attention._attend_to_part, {}, {"ROWS": 32, "SLOTS": 128 // size, "DIM": 128}),
        (attention._attend_to_part, {}, {"ROWS": 16, "SLOTS": 128 // size, "DIM": 64, "first": None}),
        (attention._combine_parts, {}, {"SPLITS": 32, "DIM": 128}),
        (rows._attend_to_part, {}, {"HEADS": 16, "PART": 256, "BLOCK": 32, "DIM": 128}),
        (rows._combine_in_order, {}, {"PART": 256, "DIM": 128}),
        (linear._multiply, {}, {"OUT": 16, "IN": 512 // size, "scales": None}),
        (linear._multiply, {"weight": "*i8"}, {"OUT": 32, "IN": 512 // size, "bias": None}),
        (norms._normalise, {}, {"WIDTH": 4096}),
        (cache._write, {}, {"KEY": 256, "VALUE": 128}),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else (types | others).get(name, "i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
        print(len(compiled.asm["cubin"]) > 0, compiled.metadata.shared < 99 * 2**10)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path: Any) -> None:
    """Guards against Python that the interpreter takes but the compiler does not. It needs no GPU."""
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _COMPILED],
        env=others | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split() == ["True"] * 54, run.stderr


_COMPILED_OVER_INTEGERS = """
import functools
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from specdecode import LM, FixedK, PromptLookup, generate
from specdecode.backends import _compiled_by_layer, prepare
from specdecode.backends.kernels.replace import replace_integer_layers
from specdecode.models.quantize import quantizer
from specdecode.models.quantized_linear import Int8Linear
from specdecode.models.variants import shared_copy
from tests.helpers.models import ARCHITECTURES, build, prompt


def sizes(graph, inputs):
    traced = make_fx(graph, decomposition_table=select_decomp_table())(*inputs)
    made = [node for node in traced.graph.nodes if node.op == "call_function"]
    largest = max(node.meta["val"].numel() for node in made if "permute" not in str(node.target))
    print(largest < 64 * 96, sum("specdecode.multiply" in str(node.target) for node in made))
    return graph


compile_ = torch.compile
torch.compile = functools.partial(compile_, backend=sizes)
layers = nn.Sequential(Int8Linear(nn.Linear(64, 96)), nn.GELU(), Int8Linear(nn.Linear(96, 64, bias=False)))
replace_integer_layers(layers)
with FakeTensorMode():
    on_gpu = functools.partial(torch.empty, device="cuda")
    for module in layers.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(on_gpu(weight.shape, dtype=weight.dtype), requires_grad=False))
    fast = torch.compile(layers, fullgraph=True)
    for rows in (1, 2, 16):
        fast(on_gpu(1, rows, 64, dtype=torch.float16))

torch.compile = functools.partial(compile_, backend="eager")
model = build(ARCHITECTURES["llama"] | {"num_hidden_layers": 2}).float()
quantizer("int8")(model)
texts, before = [], counters["stats"]["unique_graphs"]
for backend in ("triton", "compile"):
    copied = shared_copy(model)
    by_layer = backend == "compile"
    prepared = _compiled_by_layer(copied, lambda: lambda run: run) if by_layer else prepare(backend, copied)
    target = LM(copied, backend=prepared)
    for k in (1, 2):
        rules = {"controller": FixedK(k), "max_new_tokens": 12}
        texts.append(generate(target, prompt(), drafter=PromptLookup(), **rules).tokens)
print(target.backend, counters["stats"]["unique_graphs"] - before, texts[:2] == texts[2:])
"""


def test_compiled_code_leaves_integers_as_they_are() -> None:
    """Guards against compiled code that writes 8-bit weights out in 16 bits, four times the bytes that it has to read;
    and against code for each number of rows.

    No GPU is needed to see what the compiler is given.
    """
    run = subprocess.run(
        [sys.executable, "-c", _COMPILED_OVER_INTEGERS],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.splitlines() == ["True 2"] * 3 + ["compile 2 True"], run.stderr
