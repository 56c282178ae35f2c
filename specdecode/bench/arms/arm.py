"""Arms: this package's and the peers' ways to decode, with one interface and the same counts."""

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
from specdecode.models.loading import check_vocabulary, dtype_name
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to decode.

    Attributes:
        name: name in tables, test ids and baselines.
        run: function from a prompt, the number of new tokens and the expected output (for replayed drafts) to a run.
        target: the model that it decodes with; None for an arm from code in a run without loaded models.
        synthetic: whether its weights or its acceptance are artificial.
        peer: whether transformers decodes it.
        against: the peer's arm with the same method and settings.
        baseline: the arm that it is compared with; the run's reference arm if None.
        policy: cache policy of the target.
        quantize: quantisation of the target's weights, if any. With quantisation, or a policy that evicts, the arm is
            lossy: its expected output is not the reference arm's, but that of plain decoding with the same weights and
            policy.
        timed: whether the clock decides its draft lengths, and so its counts.
        options: its entry in the preset.
        stop_token_ids: tokens that end an output early.
        foreign: whether the user's own code or a server decodes it.
        server: the server that decodes it; None without a server.
        unchecked: whether it is foreign and its outputs may differ from its reference arm's.
        code: digest of the user's code.
        close: function to call after the last measurement.
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
    close: Callable[[], None] = lambda: None
    server: ServerArm | None = None

    @property
    def lossy(self) -> bool:
        """Whether its outputs are checked against a reference of their own, and not against its reference arm's."""
        return self.policy.interval > 0 or self.quantize is not None

    def expected(self, prompt: Sequence[int], tokens: Sequence[int], length: int) -> Sequence[int]:
        """Return the tokens that the arm must write for a length, where the reference arm wrote `tokens`."""
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
        name: name of the arm.
        entry: keys of the arm, which are the attributes of `ArmSpec`. With `quantize` only the target's weights are
            quantised, not the draft's.
        target: loaded with backend="eager", because peers use it unchanged. None if all arms are from code or servers.
        draft: the draft model, loaded in the same way.
        backend: backend of this package's arms that name none.
        lengths: lengths at which a run is cut, to get the runs of shorter outputs.
        stop_token_ids: tokens that end an output; none by default, so that every output has the requested length.
        model_names: names that the maker of an arm from code receives; the names of the loaded models if None.
        servers: the session's servers, for an arm that a server decodes.

    Raises:
        ModelFileError: a head is missing or damaged.
        UnsupportedModelError: the target's weights cannot be quantised, or the head belongs to another target.
        ValueError: `ArmSpec` refuses the entry, or a draft model or a package is missing.
        TokenizerMismatchError: the draft model's vocabulary does not fit this arm.
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
    """Return an arm that the user's own code decodes. The arguments are those of `make_arm`."""
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
    server = servers.server(spec.name, table)
    served = ServerArm(spec, server, lengths)
    return Arm(
        name=spec.name,
        run=served.run,
        target=target,
        baseline=spec.baseline,
        options=dict(entry),
        foreign=True,
        unchecked=spec.lossy,
        close=server.close,
        server=served,
    )


def _names_of(target: LM | None, draft: LM | None) -> ModelNames:
    assert target is not None
    return ModelNames(target.name, draft.name if draft else "", str(target.device), dtype_name(target.dtype))
