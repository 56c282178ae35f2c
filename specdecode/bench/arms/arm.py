"""Arms: ways to decode, ours and the peers', under one interface and one counter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from specdecode.bench.arms.callables import ModelNames, callable_run, closer, code_of, make_decode
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.ours import our_run
from specdecode.bench.arms.peers import peer_run
from specdecode.bench.arms.run import Run
from specdecode.bench.arms.servers import ServerArm
from specdecode.bench.servers.server import Servers
from specdecode.bench.servers.spec import ServerSpec
from specdecode.decoding.generate import generate
from specdecode.models.lm import LM
from specdecode.models.loading import check_vocabulary
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to decode.

    Attributes:
        name: in tables, test ids and baselines.
        run: from a prompt, the number of new tokens and the output that is expected (for replayed drafts) to a run.
        target: the model that it decodes; None for an arm from code in a run for which no model is loaded.
        synthetic: its acceptance is set and not found out.
        peer: it is transformers' own.
        against: the peer's arm that does the same with the same settings.
        baseline: the arm that it is compared with; the run's baseline if None.
        policy: what stays in the target's cache.
        quantize: how the target's weights are quantised, if they are. With that, or a policy that does not keep
            everything, the arm is lossy: its output is not the baseline's but that of plain decoding of the same
            weights with the same policy.
        timed: how long it drafts depends on the clock, and so do its counts.
        options: the preset's entry that it was made of.
        stop_token_ids: those that end an output early.
        foreign: it is the reader's own code, or a server.
        server: that decodes; None if none does.
        unchecked: it is, and its outputs may differ from its baseline's.
        code: a digest of that code.
        close: to be called when all is measured.
    """

    name: str
    run: Callable[[Sequence[int], int, Sequence[int]], Run]
    target: LM | None
    synthetic: bool = False
    against: str | None = None
    baseline: str | None = None
    policy: CachePolicy = field(default_factory=KeepAll)
    quantize: str | None = None
    timed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    stop_token_ids: Sequence[int] = ()
    peer: bool = False
    foreign: bool = False
    unchecked: bool = False
    code: str = ""
    close: Callable[[], None] = _nothing
    server: ServerArm | None = None

    @property
    def lossy(self) -> bool:
        """Whether its outputs are not its baseline's, but have a reference of their own."""
        return self.policy.interval > 0 or self.quantize is not None

    def expected(self, prompt: Sequence[int], tokens: Sequence[int], length: int) -> Sequence[int]:
        """What the arm must write if it is asked for so many tokens, where the baseline wrote these."""
        if not self.lossy:
            return tokens
        assert self.target is not None
        rules: dict[str, Any] = {"max_new_tokens": length, "stop_token_ids": self.stop_token_ids}
        return generate(self.target, prompt, policy=self.policy, **rules).tokens


def make_arm(
    name: str,
    entry: Mapping[str, Any],
    target: LM | None,
    draft: LM | None,
    backend: str = "auto",
    lengths: Sequence[int] = (),
    stop_token_ids: Sequence[int] = (),
    model_names: ModelNames | None = None,
    servers: Servers | None = None,
) -> Arm:
    """Return a preset's arm, ready to decode. Costs that a controller needs are measured here.

    Args:
        name: of the arm.
        entry: its keys, which are the attributes of `ArmSpec`. With `quantize` the target's weights are quantised, and
            the draft's are not.
        target: loaded with backend="eager": peers decode it as it is. None if all arms of the run are from code.
        draft: likewise.
        backend: of our own arms that name none.
        lengths: at which a run is cut, to tell what a shorter one would have been.
        stop_token_ids: those that end an output; none by default, so that every output has the asked length.
        model_names: what the maker of an arm from code is told; the names of the loaded models if None.
        servers: those of the session; an arm that a server decodes needs them.

    Raises:
        ModelFileError: a head that is not there, or is damaged.
        UnsupportedModelError: the target's weights cannot be quantised, or the head is another target's.
        ValueError: an entry that `ArmSpec` refuses, or a draft model or a package that is missing.
        TokenizerMismatchError: a draft model whose vocabulary does not serve this arm.
    """
    spec = ArmSpec.from_entry(name, entry)
    if spec.server is not None:
        assert servers is not None
        return _arm_of_server(spec, entry, target, lengths, servers)
    if spec.call is not None:
        return _arm_from_code(spec, entry, target, lengths, stop_token_ids, model_names or _names_of(target, draft))
    assert target is not None
    spec.check_draft(has_draft=draft is not None)
    if draft is not None and spec.shares_vocabulary:
        check_vocabulary(target, draft)
    spec = spec.with_head_of(target.name)
    if spec.quantize is not None:
        target = target.quantized(spec.quantize)
    if spec.peer is None:
        backend = spec.backend or backend
        target, draft = target.with_backend(backend), draft and draft.with_backend(backend, target.ranks)
        run = our_run(spec, target, draft, lengths, stop_token_ids)
    else:
        run = peer_run(spec, target, draft, lengths, stop_token_ids)
    return Arm(
        name=name,
        run=run,
        target=target,
        synthetic=target.synthetic or spec.replay is not None,
        against=spec.against,
        baseline=spec.baseline,
        policy=spec.cache_policy(),
        quantize=spec.quantize,
        timed=spec.controller == "cost-aware",
        options=dict(entry),
        stop_token_ids=stop_token_ids,
        peer=spec.peer is not None,
    )


def _arm_from_code(
    spec: ArmSpec,
    entry: Mapping[str, Any],
    target: LM | None,
    lengths: Sequence[int],
    stop_token_ids: Sequence[int],
    names: ModelNames,
) -> Arm:
    """Return an arm that the reader's own code decodes. The arguments are those of `make_arm`."""
    assert spec.call is not None
    decode = make_decode(spec, names)
    return Arm(
        name=spec.name,
        run=callable_run(spec, decode, torch.device(names.device), lengths, stop_token_ids),
        target=target,
        synthetic=target is not None and target.synthetic,
        baseline=spec.baseline,
        options=dict(entry),
        stop_token_ids=stop_token_ids,
        foreign=True,
        unchecked=spec.lossy,
        code=code_of(spec.call),
        close=closer(spec, decode),
    )


def _arm_of_server(
    spec: ArmSpec, entry: Mapping[str, Any], target: LM | None, lengths: Sequence[int], servers: Servers
) -> Arm:
    """Return an arm that a server decodes. The arguments are those of `make_arm`."""
    assert spec.server is not None
    table = ServerSpec.from_table(spec.server)
    try:
        _ = table.key
    except ValueError as error:
        raise spec.notation.error(error) from None
    server = ServerArm(spec, servers.server(spec.name, table), lengths)
    return Arm(
        name=spec.name,
        run=server.run,
        target=target,
        baseline=spec.baseline,
        options=dict(entry),
        foreign=True,
        unchecked=spec.lossy,
        close=server.close,
        server=server,
    )


def _names_of(target: LM | None, draft: LM | None) -> ModelNames:
    assert target is not None
    dtype = str(target.dtype).removeprefix("torch.")
    return ModelNames(target.name, draft.name if draft else "", str(target.device), dtype)
