from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from specdecode import (
    LM,
    BestFirstTree,
    DraftTree,
    FixedK,
    KeyNorm,
    ModelDrafter,
    PromptLookup,
    SinkWindow,
    generate,
    generate_batch,
)
from specdecode.backends import check, kernels
from specdecode.backends.row_activations import RowActivation
from specdecode.backends.row_attention import BY_ROWS
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.measure.check import check as check_output
from specdecode.core.errors import UnsupportedModelError
from specdecode.models import lm as lm_module
from specdecode.models.quantize import KINDS
from tests.helpers.drafts import part
from tests.helpers.last_bits import off
from tests.helpers.models import ARCHITECTURES, build, moved, prompt, quantisable
from tests.helpers.strategies import trees
from tests.helpers.suites import start_python

NAMES = ("llama", "gpt-neox", "opt", "phi3", "mistral-window", "qwen2-window", "gemma3-window")


DTYPES = {"exact": torch.float32, "exact-bfloat16": torch.bfloat16, "exact-float16": torch.float16}
EXACT = (*KINDS, *DTYPES)


@functools.cache
def target(name: str, kind: str) -> LM:
    """A model in which no row changes another's result: a quantised one, or one on the backend "exact".

    Quantised layers multiply in bfloat16: rounding there makes the last bit of a float32 count. A head that is tied to
    the embedding is not quantised, and may round otherwise beside other rows. On the backend "exact" it may not.
    """
    if kind in KINDS:
        return LM(build(quantisable(name) | {"tie_word_embeddings": False}).float()).quantized(kind)
    model = build(quantisable(name) | {"tie_word_embeddings": name == "llama"})
    return LM(moved(model, "cpu").to(DTYPES[kind])).with_backend("exact")


@pytest.mark.parametrize("width", [8192, 4104])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations_are_the_same_beside_other_rows_with_any_number_of_threads(width: int, activation: str) -> None:
    """Guards against rows that depend on where PyTorch splits an activation among its threads."""
    plain = ACT2FN[activation]
    separate = RowActivation(plain)
    before = torch.get_num_threads()
    differ = 0
    try:
        torch.set_num_threads(3)
        for rows in (*range(2, 18), 65):
            states = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(rows))
            alone = torch.cat([separate(states[:, row : row + 1].clone()) for row in range(rows)], 1)
            assert torch.equal(separate(states), alone)
            differ += not torch.equal(plain(states), alone)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(separate(states), plain(states))
    assert differ or activation == "gelu", "or PyTorch no longer needs this"


def test_models_whose_rows_are_separate_have_such_activations() -> None:
    """Guards against a backend "exact", or quantised weights, that are exact with two threads only."""
    for kind in EXACT:
        kinds = {type(module) for module in target("llama", kind).model.modules()}
        assert RowActivation in kinds
    assert RowActivation not in {type(module) for module in build(ARCHITECTURES["llama"]).modules()}


@settings(max_examples=40)
@given(name=st.sampled_from(NAMES), kind=st.sampled_from(EXACT), tree=trees(max_nodes=20, tokens=90))
def test_a_tree_gives_the_logits_of_plain_decoding_to_the_last_bit(name: str, kind: str, tree: DraftTree) -> None:
    """Guards against a draft that changes the rounding, and with it the tokens at near-ties."""
    assert off(target(name, kind), tree) == []


def test_rows_that_attend_together_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a comparison in which nothing rounds: PyTorch's attention over several rows fails it."""
    models = [target("llama", kind) for kind in ("int4", "exact")]
    monkeypatch.setattr(lm_module, "separate_rows", lambda *rows: nullcontext())
    for model in models:
        assert off(model, DraftTree.chain(torch.arange(7, 19)))


def test_a_model_whose_rows_change_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the name "exact" on a model that is not: attention that reads all rows together, layers that are
    no plain linear layers, and attention of a model's own.
    """
    plain = LM(moved(build(quantisable("llama")), "cpu").bfloat16())
    with monkeypatch.context() as patch:
        patch.setattr(lm_module, "separate_rows", lambda *rows: nullcontext())
        with pytest.raises(UnsupportedModelError, match="cannot run on the backend exact: beside other tokens"):
            plain.with_backend("exact")
    assert plain.with_backend("exact").backend.exact
    convolutions = LM(moved(build(ARCHITECTURES["gpt-2"]), "cpu"))
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.attn\.c_attn is a Conv1D, and no plain linear layer"):
        convolutions.with_backend("exact")
    own = moved(build(quantisable("llama")), "cpu")
    own.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="its attention reads all rows together"):
        LM(own).with_backend("exact")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the backend exact needs the package triton, which is not installed"):
        check("exact", torch.device("cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_can_be_exact_with_its_tied_head(kind: str) -> None:
    """Guards against an unquantised head whose logits change in the last bit."""
    model = (
        LM(build(quantisable("llama") | {"tie_word_embeddings": True}).float()).quantized(kind).with_backend("exact")
    )
    assert off(model, DraftTree.chain(torch.arange(7, 19))) == []


def test_an_exact_arm_has_no_ties() -> None:
    """Guards against a wrong token on the backend "exact" that passes as a tie."""
    equal = LM(equal_logits(moved(build(quantisable("llama")), "cpu"), 6, 9))
    for backend, expected in (("eager", "tie"), ("exact", "bug")):
        baseline, arm = (make_arm(name, {"drafter": name}, equal, None, backend) for name in ("none", "lookup"))
        assert check_output(arm, prompt(), [5, 6, 7], [5, 9, 7], baseline) == expected
    # A policy that reads attention runs on another attention.
    heavy = {"policy": "heavy-hitter", "cache": 16}
    baseline, arm = (make_arm(name, {"drafter": name} | heavy, equal, None, "exact") for name in ("none", "lookup"))
    assert check_output(arm, prompt(), [5, 6, 7], [5, 9, 7], baseline) == "tie"
    # Another baseline rounds otherwise.
    plain = make_arm("ar", {"drafter": "none"}, equal, None, "eager")
    assert check_output(arm, prompt(), [5, 6, 7], [5, 9, 7], plain) == "tie"


def equal_logits(model: PreTrainedModel, one: int, other: int) -> PreTrainedModel:
    """Make two tokens equally probable everywhere, so that a choice between them is a tie."""
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[one] = weight[other]
    return model


@settings(max_examples=24)
@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(EXACT),
    policy=st.sampled_from([None, SinkWindow(16), KeyNorm(16, recent=4)]),
    k=st.integers(1, 9),
    tree=st.booleans(),
)
def test_the_tokens_are_those_of_plain_decoding(
    name: str, kind: str, policy: SinkWindow | KeyNorm | None, k: int, tree: bool
) -> None:
    """Guards against keys of accepted proposals that differ from those that plain decoding computes."""
    if policy is not None and name == "opt":
        policy = None  # it adds positions to the values, so that nothing can be evicted
    model, options = target(name, kind), {} if policy is None else {"policy": policy}
    plain = generate(model, prompt(), max_new_tokens=30, **options)
    shape = BestFirstTree(nodes=12, threshold=0.01) if tree else None
    drafter = ModelDrafter(part(model, 0, 1, 3), *([shape] if shape else []))
    result = generate(model, prompt(), drafter=drafter, controller=FixedK(k), max_new_tokens=30, **options)
    assert result.tokens == plain.tokens
    assert result.drafted > 0


@pytest.mark.parametrize("kind", EXACT)
def test_a_prompt_in_a_batch_gets_its_tokens_alone(kind: str) -> None:
    """Guards against padding that changes how many rows attend together."""
    model = target("llama", kind)
    texts = [list(prompt(length)) for length in (3, 14, 29)]
    alone = [generate(model, text, max_new_tokens=30).tokens for text in texts]
    for drafter in (None, PromptLookup):
        options = {} if drafter is None else {"drafter": drafter}
        results = generate_batch(model, texts, batch_size=3, max_new_tokens=30, **options)
        assert [result.tokens for result in results] == alone


_COMPILED = """
import torch
from specdecode.backends.row_attention import attend_by_rows

layer = torch.nn.Module()
rows = [torch.randn(1, heads, size, 8) for heads, size in ((4, 3), (2, 5), (2, 5))]
compiled = torch.compile(lambda *parts: attend_by_rows(layer, *parts)[0], backend="eager", fullgraph=True)
print(tuple(compiled(*rows, torch.zeros(1, 1, 3, 5)).shape))
"""


def test_it_can_be_compiled() -> None:
    """Guards against a quantised target that the backend "compile" refuses: compilers do not read context variables.

    (In a process of its own, as compilers do not read the checks of shapes either.)
    """
    done = start_python(_COMPILED).wait()
    assert done.stdout == "(1, 3, 4, 8)\n", done.stderr


def test_a_model_has_this_attention_only_where_it_is_quantised_on_a_processor() -> None:
    """Guards against one call a row, which costs time, where several rows may round as they do."""
    plain = LM(build(quantisable("llama")))
    assert plain.model.config._attn_implementation == "sdpa"
    assert plain.quantized("int8").model.config._attn_implementation == BY_ROWS
    assert plain.model.config._attn_implementation == "sdpa"
