"""Arms from code: timed decoders from outside of this package, functions that yield new tokens step by step."""

from __future__ import annotations

import importlib
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.run import Run
from specdecode.bench.arms.slices import Slices, end_step, timed_call
from specdecode.bench.runs.counts import Counts, Histograms, Seconds
from specdecode.core.errors import SpecDecodeError
from specdecode.core.result import histogram
from specdecode.support.checked import number, shown
from specdecode.support.files import sha256

LIMIT_S = 600.0
"""Default for the most seconds that one output of an arm from code or of a server may take."""


NO_MEMORY = "the GPU's memory is too small for it"
"""Why an arm fails that needs more memory than there is."""


class ArmError(SpecDecodeError):
    """An arm from code or of a server failed to decode: it raised, took too long, or gave an invalid output."""


@dataclass(frozen=True, slots=True)
class ArmStep:
    """One step of an arm from code, with the counts that it knows. A field is None if unknown.

    If all fields of all steps are known, acceptance, blame and counters work as for this package's own arms. Numbers
    may also be scalars of NumPy, or tensors of one element.

    Attributes:
        tokens: the new tokens.
        drafted: proposed tokens.
        accepted: proposals among the new tokens, without the target's own token.
        draft_forwards: forwards of a draft model.
        draft_s: seconds of drafting.
        verify_s: seconds of the target's forward.
        cache_bytes: bytes of KV in the cache.
        at_s: seconds from the call until the tokens came; by default until they are yielded. An engine with callbacks
            can record them as tokens come, and yield all steps at the end.
    """

    tokens: Sequence[int]
    drafted: int | None = None
    accepted: int | None = None
    draft_forwards: int | None = None
    draft_s: float | None = None
    verify_s: float | None = None
    cache_bytes: int | None = None
    at_s: float | None = None


Decode = Callable[[list[int], int], Iterator[Sequence[int] | ArmStep]]
"""A function from prompt token ids and a number of new tokens to the steps, each a list of tokens or an `ArmStep`."""


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The names of a session's models, device and data type: the arguments of a maker.

    Attributes:
        target, draft: names of the models, as the user gave them; the draft's is "" without one.
        device: name of the device, such as "cpu" or "cuda:0".
        dtype: name of the weights' data type.
    """

    target: str
    draft: str
    device: str
    dtype: str


def make_decode(spec: ArmSpec, names: ModelNames) -> Decode:
    """Call the maker that an arm names: `make(target, draft, device, dtype, **options)`.

    Raises:
        ValueError: the maker cannot be imported, raises, or returns an object that cannot be called.
    """
    assert spec.call is not None
    module, _, name = spec.call.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `python -m pytest` adds it, and `pytest` does not
    try:
        make = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise spec.notation.error(f"{spec.call} cannot be imported: {_named(error)}") from error
    try:
        decode = make(*astuple(names), **dict(spec.options))
    except Exception as error:
        raise spec.notation.error(f"{spec.call} raised {_named(error)}") from error
    if not callable(decode):
        raise spec.notation.error(f"{spec.call} returned a {type(decode).__name__}: return a function that decodes")
    return decode  # type: ignore[no-any-return]


def code_of(call: str) -> str:
    """Return a digest of the maker's module; "" if the module has no file."""
    file = _module_file(call)
    return sha256(file)[:16] if file else ""


def below(call: str, folder: Path) -> bool:
    """Return whether the maker's module is in a folder, or in a folder below it."""
    file = _module_file(call)
    return file is not None and file.resolve().is_relative_to(folder.resolve())


def _module_file(call: str) -> Path | None:
    file = getattr(importlib.import_module(call.partition(":")[0]), "__file__", None)
    return Path(file) if file else None


def closer(spec: ArmSpec, decode: Decode) -> Callable[[], None]:
    """Return a function that calls `close()` of a function from code, if it has one."""

    def close() -> None:
        with _arm_errors(spec):
            if hasattr(decode, "close"):
                decode.close()

    return close


def callable_run(
    spec: ArmSpec, decode: Decode, device: torch.device, lengths: Sequence[int], stop_token_ids: Sequence[int]
) -> Callable[[Sequence[int], int, Sequence[int]], Run]:
    """Return a function that decodes a prompt with code, and times it. The arguments are those of `make_arm`.

    The code need not handle stop tokens: an output is cut after its first stop token.
    """

    def run(prompt: Sequence[int], max_new_tokens: int, expected: Sequence[int]) -> Run:
        steps: list[ArmStep] = []
        times: list[float] = []

        def decode_all() -> None:
            started, left, came = time.perf_counter(), max_new_tokens, 0.0
            for item in decode(list(prompt), max_new_tokens):
                now = time.perf_counter() - started
                steps.append(_step(item, left))
                left -= len(steps[-1].tokens)
                came = _came_at(steps[-1], came, now)
                waited = 0.0 if Slices.current is None else Slices.current.waited_before(started + came)
                times.append(came - waited)
                end_step(steps[-1].tokens)

        with _arm_errors(spec):
            with _limit(spec.limit_s or LIMIT_S):
                _, total_s = timed_call(device, decode_all)
            return _run([_checked(step) for step in steps], times, total_s, max_new_tokens, lengths, stop_token_ids)

    return run


def _step(item: object, left: int) -> ArmStep:
    """Return a yielded item as a step, after checking it."""
    step = item if isinstance(item, ArmStep) else ArmStep(item)  # type: ignore[arg-type]
    tokens = step.tokens
    listed = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    if not listed or not all(type(token) is int and token >= 0 for token in tokens):
        raise _NoOutput(f"it yielded {shown(item)}: yield a list of token ids, or an ArmStep")
    if len(tokens) > left:
        raise _NoOutput(f"it yielded {len(tokens) - left} token(s) more than it was asked for")
    return step


def _came_at(step: ArmStep, before: float, now: float) -> float:
    """Return the seconds until a step's tokens came. They must lie between the step before and now."""
    if step.at_s is None:
        return now
    at_s = _plain("at_s", step.at_s)
    if not before <= at_s <= now:
        raise _NoOutput(f"at_s is {at_s:g}: it must lie between the step before and the yield of this step")
    return at_s


def _checked(step: ArmStep) -> ArmStep:
    """Return a step with plain numbers, after checking them."""
    names = [entry.name for entry in fields(step) if entry.name != "tokens"]
    values = {name: getattr(step, name) for name in names}
    reported: dict[str, Any] = {name: _plain(name, value) for name, value in values.items() if value is not None}
    accepted, new = reported.get("accepted", 0), len(step.tokens)
    if accepted > min(new, reported.get("drafted", new)):
        raise _NoOutput(
            f"accepted is {accepted}: it is at most drafted, and at most the number of new tokens; the target's own"
            " token does not count"
        )
    return replace(step, **reported)


def _plain(name: str, value: Any) -> float:
    """Return a reported number as one that JSON can hold, after checking it."""
    is_seconds = name.endswith("_s")
    try:
        return number({name: float(value) if is_seconds else operator.index(value)}, name, 0.0)
    except Exception:  # the value may be of any class
        kind = "a number of seconds" if is_seconds else "a whole number"
        raise _NoOutput(f"{name} is {shown(value)}: it must be {kind}, 0 or more") from None


def _run(
    steps: Sequence[ArmStep],
    times: Sequence[float],
    total_s: float,
    max_new_tokens: int,
    lengths: Sequence[int],
    stop_token_ids: Sequence[int],
) -> Run:
    tokens = [token for step in steps for token in step.tokens]
    end = next((place for place, token in enumerate(tokens, start=1) if token in stop_token_ids), None)
    if len(tokens) < max_new_tokens and end is None:
        raise _NoOutput(f"it yielded {len(tokens)} of {max_new_tokens} tokens")
    whole = _until(steps, times, end or max_new_tokens, total_s)
    cuts = [_until(steps, times, length, None) for length in lengths if length < len(whole.tokens)]
    return replace(whole, cuts=cuts)


def _until(steps: Sequence[ArmStep], times: Sequence[float], length: int, total_s: float | None) -> Run:
    """Return the run as it was after `length` tokens. Its seconds are those of the last step if `total_s` is None."""
    written, count = 0, 0
    while written < length:
        written += len(steps[count].tokens)
        count += 1
    steps, times = steps[:count], times[:count]
    total_s = times[-1] if total_s is None else total_s
    first = next(place for place, step in enumerate(steps) if step.tokens)
    tokens = [token for step in steps for token in step.tokens][:length]
    return Run(
        tokens,
        total_s,
        times[first],
        _counts(steps, len(tokens)),
        _seconds(steps, total_s),
        _histograms(steps),
    )


def _counts(steps: Sequence[ArmStep], length: int) -> Counts:
    accepted, drafted = _known(steps, "accepted"), _known(steps, "drafted")
    cache_bytes = _known(steps, "cache_bytes")
    return Counts(
        steps=len(steps),
        target_forwards=len(steps),
        draft_forwards=_sum(_known(steps, "draft_forwards")),
        drafted=_sum(drafted),
        accepted=_sum(accepted),
        rejections=None if accepted is None or drafted is None else sum(map(int.__lt__, accepted, drafted)),
        cache_bytes=None if cache_bytes is None else cache_bytes[-1],
        peak_cache_bytes=None if cache_bytes is None else max(cache_bytes),
        grown_bytes=None if cache_bytes is None else max(cache_bytes) - cache_bytes[0],
        later_tokens=max(0, length - len(steps[0].tokens)),
    )


def _seconds(steps: Sequence[ArmStep], total_s: float) -> Seconds:
    draft, verify = _known(steps, "draft_s"), _known(steps, "verify_s")
    if draft is None or verify is None:
        return Seconds()
    return Seconds(
        draft=sum(draft),
        verify=sum(verify),
        overhead=max(0.0, total_s - sum(draft) - sum(verify)),
        later_draft=sum(draft[1:]),
        later_verify=sum(verify[1:]),
    )


def _histograms(steps: Sequence[ArmStep]) -> Histograms:
    accepted, drafted = _known(steps, "accepted"), _known(steps, "drafted")
    if accepted is None or drafted is None:
        return Histograms()
    return Histograms(accepted=histogram(accepted), depth=histogram(drafted))


def _known(steps: Sequence[ArmStep], name: str) -> list[Any] | None:
    """Return a field of all steps; None if it is unknown in one of them."""
    values = [getattr(step, name) for step in steps]
    return None if None in values else values


def _sum(values: list[Any] | None) -> float | None:
    return None if values is None else sum(values)


@contextmanager
def _arm_errors(spec: ArmSpec) -> Iterator[None]:
    """Describe the failure of an arm from code in one sentence.

    Raises:
        ArmError: in place of any other exception.
    """
    try:
        yield
    except _LimitReached as error:
        raise ArmError(f"{spec.notation.arm}: it took longer than {error} s, its limit_s: set a larger one") from None
    except _NoOutput as error:
        raise ArmError(f"{spec.notation.arm}: {error}") from error
    except Exception as error:
        raise ArmError(f"{spec.notation.arm}: it raised {_named(error)}") from error


class _NoOutput(Exception):
    """An invalid output was yielded; the text says why."""


class _LimitReached(BaseException):
    """The time limit was reached; the text is its seconds. No Exception, so that `except Exception` cannot catch it."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise _LimitReached if the block takes longer. Code that never returns to Python is not interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def reached(number: int, frame: FrameType | None) -> None:
        raise _LimitReached(f"{seconds:g}")

    handler = signal.signal(signal.SIGALRM, reached)
    # The timer of other code, such as pytest-timeout, continues after the block.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def _named(error: BaseException) -> str:
    """Return the type of an exception, with the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
