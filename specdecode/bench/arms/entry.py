"""The entry of an arm: read from a preset, from the command line or from lm-eval's `--model_args`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from specdecode.bench.arms.keys import (
    CALL_KEYS,
    CONTROLLERS,
    DRAFTERS,
    MODEL_KEYS,
    PEERS,
    POLICY_CACHE_TOKENS,
    PRESET_KEYS,
    SERVER_KEYS,
    SHAPES,
    TYPES,
    typed,
)
from specdecode.bench.arms.notation import COMMAND_LINE, MODEL_ARGS, Notation, preset_notation
from specdecode.bench.servers.spec import ServerSpec
from specdecode.controllers.base import FixedK

if TYPE_CHECKING:
    from specdecode.drafters.lookup import PromptLookup
    from specdecode.drafters.tree_shapes import TreeShape
    from specdecode.policies.base import CachePolicy

# Most defaults come from the classes whose arguments the keys are. This one does not.
_STATIC_TREE_BRANCHES = 2  # branches of every node; the depth is the draft length

_OTHERS_UNSET: dict[str, Any] = {"options": {}, "limit_s": None, "lossy": False, "concurrency": 1, "requests": None}
"""Values of the keys that arms of this package must leave out."""

_OTHERS_KEYS: dict[str, tuple[str, ...]] = {"call": CALL_KEYS, "server": SERVER_KEYS}
"""The keys of arms that code or a server decodes, by the key that names the code or the server."""


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """The content of an arm's entry. None stands for a missing key.

    Attributes:
        name: name of the arm.
        draft: name of the draft model, if the arm has its own.
        drafter: "none", "lookup", "head", "mtp", "medusa", "model", "universal" or "self-streaming". Several with a
            plus between them, as in "lookup+head", are a cascade.
        head: folder or hub id of a draft head, or the name of a target that comes with one.
        ngram: tokens of the longest suffix that is looked up.
        min_ngram: tokens of the shortest suffix that is looked up.
        branches: number of continuations that are looked up.
        draft_cache: tokens in the cache of a self-streaming draft.
        shape: "chain", "static" or "best-first": the shape of drafts by a head, a model or the target itself.
        branching: continuations of a static tree's nodes, depth by depth.
        nodes: number of proposals in a tree.
        threshold: least probability of a path in a best-first tree.
        controller: "fixed", "adaptive" or "cost-aware".
        k: draft length of the fixed controller, in tokens.
        policy: name of the target's cache policy; None keeps all tokens.
        cache: tokens in the policy's cache.
        settings: the policy's other arguments.
        quantize: "int8" quantises the target's weights.
        backend: name of the backend that runs forwards.
        replay: acceptance rate of replayed drafts, which is set and not measured.
        batch: number of prompts that are decoded together: the block's prompt and shorter beginnings of it.
        peer: one of `PEERS`: transformers' own decoding.
        confidence: probability below which an assisted peer stops drafting.
        early_exit: number of the target's layers that draft, for the peer "early-exit".
        against: name of the peer's arm with the same method and settings.
        baseline: name of the arm that this one is compared with; the preset's reference arm if None.
        call: "package.module:make", the maker of an arm from code (`bench.arms.callables`).
        options: keyword arguments of the maker.
        limit_s: most seconds that one output of an arm from code or of a server may take.
        lossy: whether outputs of an arm from code or of a server may differ from the reference arm's. Their agreement
            is reported, and no output is void.
        server: table about the serving engine that decodes, and how to reach or start it (`bench.servers.spec`).
        concurrency: number of prompts that a server decodes at a time.
        requests: number of prompts in a server's run. None means 1 at a concurrency of 1, else twice the concurrency.
        notation: notation of the keys in error messages.

    Raises:
        ValueError: an unknown kind, or keys that do not go together.
    """

    name: str = ""
    draft: str | None = None
    drafter: str = "none"
    head: str | None = None
    ngram: int | None = None
    min_ngram: int | None = None
    branches: int | None = None
    draft_cache: int | None = None
    shape: str = "chain"
    branching: tuple[int, ...] | None = None
    nodes: int | None = None
    threshold: float | None = None
    controller: str = "fixed"
    k: int | None = None
    policy: str | None = None
    cache: int | None = None
    settings: tuple[tuple[str, int | float], ...] = ()
    quantize: str | None = None
    backend: str | None = None
    replay: float | None = None
    batch: int = 1
    peer: str | None = None
    confidence: float | None = None
    early_exit: int | None = None
    against: str | None = None
    baseline: str | None = None
    call: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    limit_s: float | None = None
    lossy: bool = False
    server: Mapping[str, Any] | None = field(default=None, hash=False)
    concurrency: int = 1
    requests: int | None = None
    notation: Notation = field(default_factory=Notation, compare=False, repr=False)

    @classmethod
    def from_entry(cls, name: str, entry: object, known: Collection[str] = PRESET_KEYS) -> ArmSpec:
        """Read a preset's arm.

        Args:
            name: name of the arm.
            entry: the arm's keys, as parsed from TOML or JSON.
            known: the allowed keys, besides the settings of the arm's policy.

        Raises:
            ValueError: an unknown key or kind, a wrong type or value, or keys that do not go together.
        """
        spec = cls.from_record(name, entry, known)
        spec.check_values()
        return spec

    @classmethod
    def from_record(cls, name: str, entry: object, known: Collection[str] = PRESET_KEYS) -> ArmSpec:
        """Read an arm from a run file. Its values are not checked, because that would load torch.

        Raises:
            ValueError: as `from_entry`, except for invalid values.
        """
        return _read(name, entry, known, preset_notation(name))

    @classmethod
    def from_command_line(cls, options: Mapping[str, Any], *, ships_head: bool) -> ArmSpec:
        """Read the options of `specdecode generate`, and choose defaults for missing ones.

        Args:
            options: the given options, by the keys of entries.
            ships_head: whether the target comes with a head.

        Raises:
            ValueError: as `from_entry`, or there is no draft model.
        """
        return _read_and_choose(options, MODEL_KEYS, COMMAND_LINE, "lookup+head" if ships_head else "lookup")

    @classmethod
    def from_model_args(cls, arguments: Mapping[str, Any], known: Collection[str] = MODEL_KEYS) -> ArmSpec:
        """Read lm-eval's `--model_args`, and choose defaults for missing ones.

        Args:
            arguments: the arguments about the way to decode.
            known: all keys, for the message about an unknown key.

        Raises:
            ValueError: as `from_entry`, or there is no draft model.
        """
        # The harness reads "none" as None.
        entry = {key: value for key, value in arguments.items() if value is not None}
        if "drafter" in arguments:
            entry.setdefault("drafter", "none")
        return _read_and_choose(entry, known, MODEL_ARGS, "lookup")

    def __post_init__(self) -> None:
        with self._named_errors():
            self.fixed_k()
        if self.call is not None:
            self._check_call(self.call)
            return
        if self.server is not None:
            self._check_server(self.server)
            return
        for key, unset in _OTHERS_UNSET.items():
            if getattr(self, key) != unset:
                raise self.notation.error(f"{key} is for arms from code or of servers: leave it out")
        if self.peer is not None:
            self._check_kind("peer", self.peer, PEERS)
            if self.peer == "early-exit" and self.early_exit is None:
                raise self.notation.error("the peer early-exit needs early_exit: the number of layers that draft")
            return
        for kind in self.drafters:
            self._check_kind("drafter", kind, DRAFTERS, ", or several with a plus between them")
        self._check_kind("tree shape", self.shape, SHAPES)
        self._check_kind("controller", self.controller, CONTROLLERS)
        if len(self.drafters) > 1 and ("none" in self.drafters or len(set(self.drafters)) < len(self.drafters)):
            raise self.notation.error(f"{self._chosen} is no cascade: name different drafters, and not none")
        self._check_use("drafter", self.drafters, DRAFTERS)
        if "medusa" in self.drafters and self.head is None:
            raise self.notation.error(f"{self._chosen} needs heads: name their folder with {self.notation.key('head')}")
        self._check_use("shape", [self.shape], SHAPES)
        self._check_use("controller", [self.controller], CONTROLLERS)
        for key, part in (("cache", "policy"), ("confidence", "peer")):
            if getattr(self, key) is not None and getattr(self, part) is None:
                raise self.notation.error(f"{self._option(key)} is of no use without a {part}: leave it out")
        if self.batch < 1 or (self.batch > 1 and self.replay is not None):
            raise self.notation.error(
                f"batch is {self.batch}: it is 1 or more, and 1 for replayed drafts, which know one continuation"
            )

    def _check_call(self, call: str) -> None:
        module, colon, name = call.partition(":")
        if not (colon and all(part.isidentifier() for part in [*module.split("."), name])):
            raise self.notation.error(f"call is {call!r}: write package.module:function")
        self._check_limit()

    def _check_server(self, table: Mapping[str, Any]) -> None:
        with self._named_errors():
            ServerSpec.from_table(table)
        self._check_limit()
        if self.concurrency < 1:
            raise self.notation.error(f"concurrency is {self.concurrency}: it is 1 or more")
        if self.requests is not None and self.requests < self.concurrency:
            raise self.notation.error(
                f"requests is {self.requests}: it must be at least the concurrency, {self.concurrency}"
            )

    def _check_limit(self) -> None:
        if self.limit_s is not None and self.limit_s <= 0:
            raise self.notation.error(f"limit_s is {self.limit_s:g}: it must be above 0")

    def _check_kind(self, part: str, kind: str, known: Collection[str], or_else: str = "") -> None:
        if kind not in known:
            raise self.notation.error(f"no {part} is named {kind!r}: choose from {', '.join(known)}{or_else}")

    def _check_use(self, part: str, kinds: Sequence[str], takes: Mapping[str, tuple[str, ...]]) -> None:
        """Raise ValueError for a key that only other kinds of a part accept, and not the chosen kinds."""
        of_no_use = {key for keys in takes.values() for key in keys} - {key for kind in kinds for key in takes[kind]}
        for key in sorted(of_no_use):
            # "chain" is the default shape.
            if getattr(self, key) not in (None, "chain"):
                chosen = self.notation.kind(part, "+".join(kinds))
                way_out = ", which chooses it: leave it out" if key == "k" else ": leave one of them out"
                raise self.notation.error(f"{self._option(key)} is of no use with {chosen}{way_out}")

    def check_draft(self, *, has_draft: bool) -> None:
        """Raise ValueError if the arm needs a draft model, but none is given."""
        if self.needs_draft and not has_draft:
            raise self.notation.error(f"{self._chosen} needs a draft model: name one with {self.notation.key('draft')}")

    def check_head(self, target: str, *, ships_head: bool) -> None:
        """Raise ValueError if the arm needs a head, but names none, and none comes with the target."""
        if self.needs_shipped_head and not ships_head:
            option, drafter = self.notation.key("head"), self.notation.key("drafter")
            raise self.notation.error(
                f"no head comes with {target}: name the folder of one with {option}, or choose another {drafter}"
            )

    def check_values(self) -> None:
        """Raise ValueError for a value that a part refuses. It builds the parts that need no model, and loads torch."""
        with self._named_errors():
            if "lookup" in self.drafters:
                self.prompt_lookup()
            self.tree_shape()
            self._check_other_values()
        with self._named_errors(max_len="cache"):
            self.cache_policy()
        if self.draft_cache is not None:
            from specdecode.policies.sink_window import SinkWindow

            with self._named_errors(max_len="draft_cache"):
                SinkWindow(self.draft_cache)

    def _check_other_values(self) -> None:
        if self.replay is not None:
            from specdecode.drafters.none import NoDraft
            from specdecode.drafters.replay import ReplayDrafter

            ReplayDrafter(NoDraft(), (), self.replay)
        if self.quantize is not None:
            from specdecode.models.quantize import quantizer

            quantizer(self.quantize)
        if self.backend is not None:
            from specdecode.backends import check_name

            check_name(self.backend)  # the device is unknown here

    @contextmanager
    def _named_errors(self, **keys: str) -> Iterator[None]:
        """Add the arm's name to errors of its parts. An error begins with the name of the wrong argument.

        Args:
            keys: the entry's keys by the arguments that they set, where the names differ.
        """
        try:
            yield
        except ValueError as error:
            text = str(error)
            argument = text.partition(" ")[0]
            if argument in keys:
                text = text.replace(argument, self.notation.word(keys[argument]))
            raise self.notation.error(text) from None

    # Requirements of the arm.

    @property
    def drafters(self) -> list[str]:
        """The kinds of drafters, in the order of the cascade."""
        return drafter_kinds({"drafter": self.drafter})

    @property
    def shares_vocabulary(self) -> bool:
        """Whether it needs a draft model with the target's vocabulary."""
        return "model" in self.drafters or self.peer == "assisted"

    @property
    def needs_draft(self) -> bool:
        return self.shares_vocabulary or "universal" in (*self.drafters, self.peer)

    @property
    def needs_shipped_head(self) -> bool:
        """Whether it needs the head that comes with its target."""
        return "head" in self.drafters and self.head is None

    def with_head_of(self, target: str) -> ArmSpec:
        """Return the spec with its head named: the head that comes with the target, if the spec names none."""
        return replace(self, head=target) if self.needs_shipped_head else self

    # Arguments of its parts.

    @property
    def lookup_arguments(self) -> dict[str, Any]:
        """The arguments of `PromptLookup` that the entry sets."""
        return _without_none(max_ngram=self.ngram, branches=self.branches, min_ngram=self.min_ngram)

    @property
    def tree_arguments(self) -> dict[str, Any]:
        """The arguments of `StaticTree` or `BestFirstTree`."""
        if self.shape == "static":
            default = (_STATIC_TREE_BRANCHES,) * self.fixed_k().k
            branching = default if self.branching is None else self.branching
            return {"branching": branching, **_without_none(nodes=self.nodes)}
        return _without_none(nodes=self.nodes, threshold=self.threshold)

    @property
    def self_streaming_arguments(self) -> dict[str, Any]:
        """The arguments of `SelfStreamingDrafter` that the entry sets, without the shape."""
        return _without_none(max_len=self.draft_cache)

    @property
    def cache_tokens(self) -> int:
        return POLICY_CACHE_TOKENS if self.cache is None else self.cache

    def fixed_k(self) -> FixedK:
        """Return the fixed controller, with the entry's draft length or the default one."""
        return FixedK(**_without_none(k=self.k))

    def prompt_lookup(self) -> PromptLookup:
        """Return a new lookup drafter."""
        from specdecode.drafters.lookup import PromptLookup

        return PromptLookup(**self.lookup_arguments)

    def tree_shape(self) -> TreeShape:
        """Return the shape of its drafts."""
        from specdecode.drafters.tree_shapes import BestFirstTree, Chain, StaticTree

        if self.shape == "static":
            return StaticTree(**self.tree_arguments)
        return BestFirstTree(**self.tree_arguments) if self.shape == "best-first" else Chain()

    def cache_policy(self) -> CachePolicy:
        """Return the policy of the target's cache."""
        from specdecode.policies import policy
        from specdecode.policies.keep_all import KeepAll

        return policy(self.policy, self.cache_tokens, **dict(self.settings)) if self.policy else KeepAll()

    def _option(self, key: str) -> str:
        return self.notation.key(key, getattr(self, key))

    @property
    def _chosen(self) -> str:
        part, kind = ("drafter", self.drafter) if self.peer is None else ("peer", self.peer)
        return self.notation.kind(part, kind)


def drafter_kinds(entry: Mapping[str, Any]) -> list[str]:
    """Return the kinds of drafters in an entry, in the order of the cascade: "lookup+head" names two."""
    return str(entry.get("drafter", "none")).split("+")


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _read_and_choose(
    entry: Mapping[str, Any], known: Collection[str], notation: Notation, drafter_by_default: str
) -> ArmSpec:
    """Read a command's way to decode, and choose defaults that draft well for missing keys.

    Presets get none of these defaults. An entry has all settings of its arm, so that its baseline does not change with
    the defaults of commands.
    """
    chosen: dict[str, Any] = {"drafter": drafter_by_default}
    if "draft" in entry:
        chosen["drafter"] = "model"
    if "head" in entry:
        chosen["drafter"] = "lookup+head"
    kinds = drafter_kinds(chosen | dict(entry))
    if "head" in kinds and "shape" not in entry:
        # CPUs verify eight rows, including the root, for little more than the cost of one.
        chosen |= {"shape": "best-first", "nodes": 7, "threshold": 0.05}
    if kinds[0] == "lookup" and len(kinds) > 1 and entry.get("ngram") != 1:
        # A match of one token is weak evidence, and here another drafter can propose instead.
        chosen["min_ngram"] = 2
    spec = _read("", chosen | dict(entry), known, notation)
    spec.check_values()
    spec.check_draft(has_draft=spec.draft is not None)
    return spec


def _read(name: str, entry: object, known: Collection[str], notation: Notation) -> ArmSpec:
    if not isinstance(entry, Mapping):
        raise notation.error(f"its entry is {entry!r}: it must be a table of options")
    if "peer" in entry and "peer" in known:
        if "policy" in entry:
            raise notation.error("a peer accepts no policy: leave one of them out")
        known = ("peer", "quantize", "against", "baseline", *PEERS.get(str(entry["peer"]), ()))
    for key, those in _OTHERS_KEYS.items():
        if key in entry and key in known:
            known = those
    others = [key for key in entry if key not in known]
    settings = [key for key in others if "policy" in entry and key not in TYPES and key.isidentifier()]
    if unknown := sorted(set(others) - set(settings)):
        keys = {"keys": ", ".join(unknown), "first": unknown[0], "known": ", ".join(known)}
        raise notation.error(notation.unknown.format(**keys))
    try:
        values = {key: typed(key, value) for key, value in entry.items()}
    except ValueError as error:
        raise notation.error(error) from None
    policy_settings = tuple((key, values.pop(key)) for key in settings)
    return ArmSpec(name, settings=policy_settings, notation=notation, **values)
