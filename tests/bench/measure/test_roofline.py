"""The roofline of a target's backends, on simulated machines."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from specdecode import LM, UnsupportedModelError
from specdecode.backends.packed import PackedLinear
from specdecode.bench.measure import roofline as measured_roofline
from specdecode.bench.measure.operations import forward_operations
from specdecode.bench.measure.roofline import measure_roofline
from tests.helpers.fake_clock import Cost, FakeClock, charged
from tests.helpers.models import ARCHITECTURES, build

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock(noise=0.0)
    monkeypatch.setattr(time, "perf_counter", made)
    monkeypatch.setattr(measured_roofline, "BACKENDS", ("auto", "eager", "packed"))
    monkeypatch.setattr(measured_roofline, "KINDS", ())
    monkeypatch.setattr(measured_roofline, "read_bandwidth", lambda device: 1e6 * (device == torch.device("cpu")))
    return made


def on_the_cpu(**values: object) -> LM:
    """Build a model in float32, as packing requires."""
    return LM(build(ARCHITECTURES["llama"] | values).float().cpu())


def silent(done: int, total: int, doing: str) -> None:
    pass


def test_shares_and_multiples_are_those_of_the_machine(clock: FakeClock) -> None:
    """Guards against one backend's times under another's name, an inverted share, and forwards with another number of
    rows than stated.
    """
    target = on_the_cpu(tie_word_embeddings=True)
    packed = target.with_backend("packed")
    with charged(clock, {target.model: Cost(0.009, 0.001), packed.model: Cost(0.0198, 0.0002)}):
        found = measure_roofline(target, silent)
    embedding = target.model.get_input_embeddings().weight.nbytes
    assert list(found.backends) == ["eager", "packed"]
    cached = 256 * 2 * 4 * 2 * 8 * 4  # tokens, keys and values, layers, heads, head size, bytes
    assert found.token_bytes == target.weight_bytes + cached
    assert found.throughput == pytest.approx(1e6 / found.token_bytes)
    weights = target.weight_bytes
    assert [of.weight_bytes for of in found.backends.values()] == [weights, weights + embedding]
    assert found.share("eager") == pytest.approx(100 / found.throughput)
    assert found.share("packed") == pytest.approx(50 / found.throughput)
    assert found.backends["eager"].multiples == pytest.approx({8: 1.7, 16: 2.5, 32: 4.1})
    assert found.backends["packed"].multiples == pytest.approx({8: 1.07, 16: 1.15, 32: 1.31})
    assert found.missing == {}


def test_a_row_s_time_is_told_by_its_parts(clock: FakeClock) -> None:
    """Guards against layers left out or counted twice, layers in the wrong part, and parts of another forward."""
    target = on_the_cpu(tie_word_embeddings=True)
    packed = target.with_backend("packed")
    seconds = {nn.Linear: 0.001, PackedLinear: 0.0005}
    for model in (target.model, packed.model):
        for layer in model.modules():
            kind = 0.01 if "Norm" in type(layer).__name__ else seconds.get(type(layer), 0.0)
            layer.register_forward_pre_hook(lambda *_, kind=kind: clock.advance(kind))
    with charged(clock, {target.model: Cost(0.2, 0.0), packed.model: Cost(0.1, 0.0)}):
        found = measure_roofline(target, silent).backends
    norms = 2 * 4 + 1
    # Packed, queries, keys and values are one product, and so are the two inputs of the MLP.
    for name, layers, linear, rest in (("eager", 7 * 4 + 1, 0.001, 0.2), ("packed", 4 * 4 + 1, 0.0005, 0.1)):
        row = found[name].row
        assert row is not None
        assert row.linear == pytest.approx(layers * linear)
        assert row.others == pytest.approx(norms * 0.01)
        assert row.between == pytest.approx(rest)
        assert row.forward == pytest.approx(found[name].seconds[1])


def test_quantised_weights_have_a_row(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an operator who must guess the gain of 8 and 4 bits, and against an end where one is refused."""
    monkeypatch.setattr(measured_roofline, "BACKENDS", ("auto", "eager"))
    monkeypatch.setattr(measured_roofline, "KINDS", ("int8", "int4"))
    target = on_the_cpu()
    rough = target.quantized("int8").with_backend("auto")
    with charged(clock, {target.model: Cost(0.02, 0.0), rough.model: Cost(0.01, 0.0)}):
        found = measure_roofline(target, silent)
    assert list(found.backends) == ["eager", "int8"]
    assert found.backends["int8"].weight_bytes == rough.weight_bytes
    assert found.share("int8") == pytest.approx(2 * found.share("eager"))
    assert "down_proj has 48 inputs, no multiple of 32" in found.missing["int4"]


def test_only_the_asked_backends_are_timed(clock: FakeClock) -> None:
    """Guards against minutes of compiling before the row that was asked for."""
    target = on_the_cpu()
    with charged(clock, {target.model: Cost(0.02, 0.0)}):
        found = measure_roofline(target, silent, ["eager"])
    assert (list(found.backends), found.missing) == (["eager"], {})


def test_a_machine_that_gets_slower_does_so_for_all_backends(clock: FakeClock) -> None:
    """Guards against backends, or numbers of rows, measured one after the other: the last would look slow."""
    target = on_the_cpu()
    packed = target.with_backend("packed")
    clock.drift = 0.1
    with charged(clock, {target.model: Cost(0.02, 0.0), packed.model: Cost(0.02, 0.0)}):
        found = measure_roofline(target, silent)
    assert clock() > 4, "it must get much slower meanwhile"
    assert found.share("packed") == pytest.approx(found.share("eager"), rel=0.01)
    for forwards in found.backends.values():
        assert forwards.multiples == pytest.approx(dict.fromkeys((8, 16, 32), 1.0), rel=0.02)


def test_rounds_end_when_time_is_up(clock: FakeClock) -> None:
    """Guards against an hour of measuring a large model on a slow machine, and against a progress bar that
    never fills.
    """
    target = on_the_cpu()
    told = []
    with charged(clock, {model: Cost(1.0, 0.0) for model in (target.model, target.with_backend("packed").model)}):
        measure_roofline(target, lambda *progress: told.append(progress))
    # The prefill; untimed first forwards; three rounds of eight seconds, the last begun before the twentieth second;
    # for each backend a prefill, a first forward of one row and five timed ones, the last begun before the fourth
    # second is over; and a forward that shows the cache bytes of a token.
    assert clock() == pytest.approx(2 + 8 + 24 + 2 * (1 + 1 + 5) + 1)
    assert [done for done, _, doing in told if doing.startswith("forwards in turns")] == [1, 2, 3]
    assert told[-1] == (25, 25, "layers of packed")
    assert "first forward of packed, rows 8" in [doing for _, _, doing in told]


def test_what_is_not_there_is_not_measured(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the same code measured twice because a backend fell back to another, and against one failing
    backend that loses the numbers of the others.
    """
    monkeypatch.setattr(measured_roofline, "BACKENDS", ("auto", "broken", "eager", "packed"))
    usual = LM.with_backend

    def with_backend(self: LM, kind: str) -> LM:
        if kind == "broken":
            raise UnsupportedModelError("no compiler: install one")
        return usual(self, kind)

    monkeypatch.setattr(LM, "with_backend", with_backend)
    target = LM(build(ARCHITECTURES["llama"]).cpu())
    target.with_backend("packed")
    with charged(clock, {target.model: Cost(0.02, 0.0)}):
        found = measure_roofline(target, silent)
    assert list(found.backends) == ["eager"]
    assert found.missing == {
        "broken": "no compiler: install one",
        "packed": "no library has a layout for float64 on this processor",
    }


@pytest.mark.usefixtures("unchecked")
def test_operations_are_those_of_one_forward(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against calls of all profiled forwards shown as those of one, a profile of the wrong number of rows, and
    the profiler's own lines between the tables.
    """
    target = on_the_cpu()
    shapes: set[int] = set()
    target.model.register_forward_pre_hook(
        lambda model, inputs, named: shapes.add(named["input_ids"].shape[-1]), with_kwargs=True
    )
    for rows, operations in forward_operations(target).items():
        assert rows in shapes
        calls = {operation.name: operation.calls for operation in operations}
        layers = target.config.num_hidden_layers
        assert calls["aten::linear"] == 7 * layers + 1
        assert calls["aten::silu"] == layers
        seconds = [operation.seconds for operation in operations]
        assert seconds == sorted(seconds, reverse=True)
        assert 0 < sum(seconds) < 1
    assert capfd.readouterr().err == ""
    short = on_the_cpu(max_position_embeddings=4)
    assert list(forward_operations(target)) == [1, 8]
    assert list(forward_operations(short)) == [1]
