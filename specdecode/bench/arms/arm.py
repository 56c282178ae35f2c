"""Arms: ways to decode, ours and the peers', under one interface and one counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdecode.bench.arms.ours import our_run
from specdecode.bench.arms.peers import peer_run
from specdecode.bench.arms.run import Run
from specdecode.bench.runs.names import drafters
from specdecode.decoding.generate import generate
from specdecode.models.lm import LM
from specdecode.models.loading import check_vocabulary
from specdecode.policies import policy as named_policy
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to decode.

    Attributes:
        name: in tables, test ids and baselines.
        run: from a prompt, the number of new tokens and the output that is expected (for replayed drafts) to a run.
        target: the model that it decodes.
        synthetic: its acceptance is set and not found out.
        peer: it is transformers' own.
        against: the peer's arm that does the same with the same settings.
        policy: what stays in the target's cache.
        quantize: how the target's weights are quantised, if they are. With that, or a policy that does not keep
            everything, the arm is lossy: its output is not the baseline's but that of plain decoding of the same
            weights with the same policy.
        timed: how long it drafts depends on the clock, and so do its counts.
        options: the preset's entry that it was made of.
        stop_token_ids: those that end an output early.
    """

    name: str
    run: Callable[[Sequence[int], int, Sequence[int]], Run]
    target: LM
    synthetic: bool = False
    against: str | None = None
    policy: CachePolicy = field(default_factory=KeepAll)
    quantize: str | None = None
    timed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    stop_token_ids: Sequence[int] = ()
    peer: bool = False

    @property
    def lossy(self) -> bool:
        return self.policy.interval > 0 or self.quantize is not None

    def expected(self, prompt: Sequence[int], tokens: Sequence[int], length: int) -> Sequence[int]:
        """What the arm must write if it is asked for so many tokens, where the baseline wrote these."""
        if not self.lossy:
            return tokens
        rules: dict[str, Any] = {"max_new_tokens": length, "stop_token_ids": self.stop_token_ids}
        return generate(self.target, prompt, policy=self.policy, **rules).tokens


def make(
    name: str,
    options: dict[str, Any],
    target: LM,
    draft: LM | None,
    backend: str = "auto",
    lengths: Sequence[int] = (),
    stop_token_ids: Sequence[int] = (),
) -> Arm:
    """An arm from a preset's entry.

    Keys: `drafter` ("none", "lookup", "head", "model", "universal" or "self-streaming"; with a plus between them, as in
    "lookup+head", a cascade), `controller` ("fixed" with `k`, "adaptive" or "cost-aware"), `nodes`, `ngram`,
    `min_ngram`, `branches`, `shape` ("chain", "static" or "best-first"), `branching`, `threshold`, `head` (a file, in
    place of the head that comes with the target), `draft_cache` (tokens that a streaming draft holds), `replay`
    (acceptance), `batch` (prompts decoded at once: the block's own and shorter beginnings of it), `policy`
    ("sink-window" and the others of `specdecode.policies`) with `cache` (tokens that it holds); or `peer` ("generate",
    "assisted" or "prompt-lookup") with `k`, `ngram` and `confidence` (below which transformers stops drafting). With
    `quantize` ("int8") it decodes the target with quantised weights, and drafts with `draft` as it is. A target of
    random weights gets a head of random weights. `backend` says how the forwards of both run. What a cost-aware arm
    goes by is measured here. `against` names the peer's arm that does the same.

    Args:
        name: of the arm.
        options: the entry.
        target: loaded with backend="eager": peers decode it as it is.
        draft: likewise.
        backend: of our own arms that name none.
        lengths: at which a run is cut, to tell what a shorter one would have been.
        stop_token_ids: those that end an output; none by default, so that every output has the asked length.

    Raises:
        ModelFileError: a head that is not there, or is damaged.
        UnsupportedModelError: the target's weights cannot be quantised, or the head is another target's.
        ValueError: a key or value that is not known, or a draft model or a package that is missing.
        TokenizerMismatchError: a draft model whose vocabulary does not serve this arm.
    """
    entry, options = options, dict(options)
    peer = options.pop("peer", None)
    asked = drafters(entry)
    shares_vocabulary = peer == "assisted" or "model" in asked
    if shares_vocabulary or "universal" in asked:
        if draft is None:
            raise ValueError(f"arm {name!r} needs a draft model: name one with --draft")
        if shares_vocabulary:
            check_vocabulary(target, draft)
    replay = options.pop("replay", None)
    against = options.pop("against", None)
    kind, cache = options.pop("policy", None), options.pop("cache", 256)
    policy = named_policy(kind, cache) if kind else KeepAll()
    if peer is not None and policy.interval:
        raise ValueError(f"arm {name!r} is transformers' own: it takes no policy")
    if "head" in asked:
        options.setdefault("head", target.name)
    quantize = options.pop("quantize", None)
    if quantize is not None:
        target = target.quantized(quantize)
    timed = options.get("controller") == "cost-aware"
    if peer is None:
        kind = options.pop("backend", backend)
        target, draft = target.with_backend(kind), draft and draft.with_backend(kind)
        run = our_run(options, target, draft, replay, policy, lengths, stop_token_ids)
    else:
        run = peer_run(peer, options, target, draft, lengths, stop_token_ids)
    if options:
        raise ValueError(f"arm {name!r} has unknown options: {', '.join(options)}")
    synthetic = target.synthetic or replay is not None
    return Arm(name, run, target, synthetic, against, policy, quantize, timed, entry, stop_token_ids, peer is not None)
