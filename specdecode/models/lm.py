"""A causal language model over KV slots. In decoding, it is the only caller of a Hugging Face forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdecode.backends import Backend, prepare
from specdecode.backends.compiled import uncompiled
from specdecode.backends.row_attention import separate_rows
from specdecode.backends.static import StaticForward, StaticRunner
from specdecode.backends.static_inputs import StaticInputs
from specdecode.core.errors import UnsupportedModelError
from specdecode.core.ranks import Ranks, ranks_of
from specdecode.core.sampling import most_probable
from specdecode.core.slots import SlotBatch, Slots
from specdecode.core.transfer import moved
from specdecode.core.tree import DraftTree
from specdecode.models.chat import TextEncoder, stop_token_ids
from specdecode.models.checks import context_length, sliding_window, unsupported_reason
from specdecode.models.forwards import ForwardInput, prefill_chunk, run, static_logits, tree_input
from specdecode.models.masks import MaskForm
from specdecode.models.probe import check_rows, check_tree_decoding, exact_mask_form
from specdecode.models.quantize import quantizer, weight_bytes
from specdecode.models.recording import HiddenStateRecording, store_attention
from specdecode.models.rotary import KeyRerotation, rotations
from specdecode.models.spelling import Spelling
from specdecode.models.variants import layer_subset, shared_copy
from specdecode.models.wrapped import execution_device, unwrapped
from specdecode.policies.base import CachePolicy, boundary
from specdecode.policies.keep_all import KeepAll


class LM:
    """A Hugging Face causal LM that decodes through KV slots. A short probe first checks that it decodes trees exactly.

    Attributes:
        model: the wrapped model, without the wrapper of `torch.compile`. It is switched to evaluation mode, and not
            changed otherwise.
        config: configuration of the model's text decoder.
        tokenizer: the model's tokenizer, for texts and stop strings; None if it was not given.
        name: name for tables and messages; by default from the model's configuration.
        synthetic: whether the weights are random, so that only costs can be measured.
        backend: the way in which forwards run; by default transformers' own code ("eager").
        static: runner of forwards over static shapes; None for a backend without static shapes.
        forwards: number of forwards of the model so far, by all callers.
        ranks: the processes among which the weights are split; one process by default.
        vocab_size: width V of the logits.
        context_length: largest number of tokens of prompt and output together.

    Raises:
        UnsupportedModelError: the architecture cannot be decoded exactly. The message gives the reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        synthetic: bool = False,
        backend: Backend = Backend(),
    ) -> None:
        self.model = model = unwrapped(model)
        model.train(False)
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.synthetic = synthetic
        self.backend = backend
        self.config = config = model.config.get_text_config(decoder=True)
        self.vocab_size: int = config.vocab_size
        self.context_length = context_length(config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if reason := unsupported_reason(model):
            raise UnsupportedModelError(f"{self.name} cannot be decoded exactly: {reason}")
        self.forwards = 0
        self.ranks = ranks_of(model)
        self._variants: dict[str, LM] = {}
        self._records_attention = False
        static = backend.static
        self._hidden_states = HiddenStateRecording(
            model, static and (lambda copied, states: static(self._static_forward(copied, states)))
        )
        self.static = static and static(self._static_forward(model))
        window = sliding_window(config)
        self._mask_form = MaskForm(window, by_layer_type=window is not None, dtype=model.dtype)
        self._probe()

    @property
    def device(self) -> torch.device:
        return execution_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored weights, with scales and packed copies. Tied weights count once; their copy, too."""
        return weight_bytes(self.model)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text. `generate` stops at them only if they are given as its `stop_token_ids`."""
        return stop_token_ids(self.model, self.tokenizer)

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Return the token ids of a text or, with `chat`, of a user's message in the model's chat template up to the
        beginning of the answer. Without a tokenizer they are the text's bytes.

        Raises:
            ValueError: `chat` is set, but the model has no chat template.
        """
        return TextEncoder(self.name, self.tokenizer, self.vocab_size).encode(text, chat=chat)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, including special tokens.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: its tokens have no text")
        text: Any = self.tokenizer.decode(list(tokens))
        return str(text)

    @functools.cached_property
    def spelling(self) -> Spelling:
        """The bytes that each token adds to a text.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: its tokens have no text")
        return Spelling(self.tokenizer)

    def new_slots(self, capacity: int) -> Slots:
        """Return empty slots for a sequence, with room for `capacity` tokens at first."""
        return Slots(capacity, self.device) if self.static is None else self.static.new_slots(capacity, self.device)

    @functools.cached_property
    def rerotation(self) -> KeyRerotation:
        """The object that evicts slots of this model, and re-rotates the keys that stay.

        Raises:
            UnsupportedModelError: the model's keys cannot be re-rotated to other positions.
        """
        return KeyRerotation(rotations(self))

    @torch.inference_mode()
    def forward(
        self,
        slots: Slots,
        tokens: Int[Tensor, " n"],
        *,
        positions: Int[Tensor, " n"] | None = None,
        visible: Bool[Tensor, "n s"] | None = None,
        rows: int = 1,
        choose: bool = False,
    ) -> Float[Tensor, "rows V"] | Int[Tensor, " rows"]:
        """Run tokens through the model, and append their keys and values to the slots.

        Args:
            slots: slots of the sequence. They grow by n.
            tokens: token ids. They and the other tensors may be on any device.
            positions: positions of the tokens; by default they continue the filled slots.
            visible: row i marks the slots that token i attends to, among the last s slots (the n new ones included). It
                also attends to all slots before these. By default the tokens are a chain.
            rows: number of tokens at the end whose logits are returned. For a target, the tokens before these are text
                that every decoding reads in one forward.
            choose: return the most probable tokens in place of the logits. Then they and the recorded hidden states are
                valid until the next forward.

        Returns:
            Logits at the last `rows` tokens, in the model's type. With `choose` the token of the largest logit in each
                row; see `most_probable`.
        """
        count, start = len(tokens), slots.length
        # Built on the host, since a static forward copies both to the device at once.
        if positions is None:
            positions = torch.arange(start, start + count)
        if visible is None:
            visible = torch.ones(count, count, dtype=torch.bool).tril()
        slots.append(positions)
        self.forwards += 1
        recorder = self._hidden_states.recorder
        static, layers = (self.static, ()) if recorder is None else (recorder.static, recorder.layers)
        if static is not None and not self._records_attention and static.takes(slots, count):
            output, *hidden_states = static.run(slots, tokens, positions, visible, rows=rows, choose=choose)
            slots.outputs = dict(zip(layers, hidden_states, strict=True))
            slots.attended = static.span(slots)
            return output[len(output) - rows :]
        logits = self._forward(slots, [slots], [ForwardInput(tokens, positions, visible, rows)])[0]
        return most_probable(logits) if choose else logits

    def _forward(
        self, cache: Slots | SlotBatch, sequences: Sequence[Slots], inputs: Sequence[ForwardInput]
    ) -> list[Float[Tensor, "_ V"]]:
        """Run the inputs of sequences whose slots are already reserved. Return the last `rows` logits of each input."""
        recorder = self._hidden_states.recorder
        model = self.model if recorder is None else recorder.model
        options: dict[str, Any] = {"output_attentions": self._records_attention}
        if self._keeps_logits and not self._hidden_states.needs_all_rows:
            options |= {"logits_to_keep": max(1, *(read.rows for read in inputs))}
        for slots in sequences:
            slots.attended = cache.length
        with separate_rows([len(read.tokens) for read in inputs], [read.rows for read in inputs]):
            output = run(model, self._mask_form, cache, sequences, inputs, **options)
        if self._records_attention:
            store_attention(sequences, inputs, output.attentions, self.dtype)
        if recorder is not None:
            recorder.store(sequences, inputs)
        return [logits[len(logits) - read.rows :] for logits, read in zip(output.logits, inputs, strict=True)]

    def _static_forward(self, model: PreTrainedModel, hidden_states: Sequence[Tensor] = ()) -> StaticForward:
        """Return the forward over static shapes of this model or of a copy, whose hooks fill a list of hidden states.
        It returns the logits and these hidden states."""

        def forward(
            inputs: StaticInputs, positions: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
        ) -> tuple[Tensor, ...]:
            logits = static_logits(model, self._mask_form, inputs, positions, keys, values, self.backend.write)
            return logits, *(states[0] for states in hidden_states)

        return forward

    @torch.inference_mode()
    def continue_greedily(
        self, slots: Slots, tokens: Int[Tensor, " n"], count: int, vocab_size: int
    ) -> Int[Tensor, " count"]:
        """Continue a sequence with the model's most probable tokens. No forward waits for the host.

        Args:
            slots: slots of the sequence. They grow by n + count - 1.
            tokens: the tokens to read first.
            count: number of forwards and of new tokens, at least 1. The last new token is not read.
            vocab_size: upper limit of the new token ids.

        Returns:
            The new tokens, on the device.
        """
        if self.static is not None and self.static.takes_chain(slots, len(tokens), count - 1):
            self.forwards += count
            return self.static.chain(slots, tokens, count, vocab_size)
        chosen: list[Tensor] = []
        for _ in range(count):
            chosen.append(tokens := self.forward(slots, tokens)[:, :vocab_size].argmax(-1))
        return torch.cat(chosen)

    @contextmanager
    def recording_attention(self) -> Iterator[None]:
        """Within this context, store the attention weights of each forward in `Slots.weights`.

        Only transformers' "eager" attention returns weights, so the model uses it within the context.
        """
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        self._records_attention = True
        try:
            yield
        finally:
            self._records_attention = False
            self.model.set_attn_implementation(implementation)

    @contextmanager
    def recording_outputs(self, layers: Sequence[int]) -> Iterator[None]:
        """Within this context, store the hidden states of these decoder layers at each forward in `Slots.outputs`.

        Raises:
            ValueError: there is no such layer, or the model does not hold its layers in one list.
        """
        with self._hidden_states.record(layers):
            yield

    @contextmanager
    def recording_for(self, policy: CachePolicy, layers: Sequence[int] = ()) -> Iterator[None]:
        """Within this context, record attention if the policy reads it, and hidden states of the drafter's layers."""
        with self.recording_attention() if policy.reads_attention else nullcontext(), self.recording_outputs(layers):
            yield

    def read(
        self, slots: Slots, tokens: Sequence[int], policy: CachePolicy = KeepAll()
    ) -> tuple[Float[Tensor, "1 V"], int]:
        """Append a text of one token or more to the slots, in chunks, with the evictions of the policy.

        An eviction takes place before the next token is read, so there is none after the last token.

        Returns:
            Logits at the last token, and the number of forwards.
        """
        forwards, start = 0, 0
        while start < len(tokens):
            self.evict(slots, policy)
            ahead = boundary(policy, slots.committed + 1, slots.length + 1) - slots.committed
            chunk = tokens[start : start + min(prefill_chunk(policy), ahead)]
            logits = self.forward(slots, torch.tensor(chunk))
            if policy.reads_attention:
                slots.attend(range(len(chunk)))
            forwards, start = forwards + 1, start + len(chunk)
        return logits, forwards

    def evict(self, slots: Slots, policy: CachePolicy) -> bool:
        """Evict if the committed length is a boundary of the policy. Return whether an eviction took place."""
        if boundary(policy, slots.committed, slots.length) != slots.committed:
            return False
        self.rerotation.evict(slots, policy.keep(slots))
        return True

    def forward_tree(
        self, slots: Slots, pending: Sequence[int], tree: DraftTree, *, choose: bool = False
    ) -> Float[Tensor, "nodes V"] | Int[Tensor, " nodes"]:
        """Run the committed tokens that are not in the slots yet, the root last, and a tree of N proposals below it.

        Returns:
            Logits, or with `choose` the most probable tokens, at the root and at each node; see `forward`. The slots
                grow by ``len(pending) + N``.
        """
        if not len(tree):
            return self.forward(slots, torch.tensor(pending), choose=choose)
        read = tree_input(slots, pending, tree)
        return self.forward(
            slots, read.tokens, positions=read.positions, visible=read.visible, rows=read.rows, choose=choose
        )

    @torch.inference_mode()
    def forward_trees(
        self, batch: SlotBatch, pending: Sequence[Sequence[int]], trees: Sequence[DraftTree]
    ) -> list[Float[Tensor, "_ V"]]:
        """Run `forward_tree` for all sequences of a batch in one forward."""
        self.forwards += 1
        inputs = [tree_input(*sequence) for sequence in zip(batch.rows, pending, trees, strict=True)]
        batch.append([moved(read.positions, self.device) for read in inputs])
        return self._forward(batch, batch.rows, inputs)

    def _probe(self) -> None:
        """Find the form of masks with which the model decodes exactly.

        Raises:
            UnsupportedModelError: the model decodes exactly with no form.
        """
        form, static = self._mask_form, self.static
        if form.window is not None:
            # What is compiled or captured with the narrow window serves no other.
            self.static = None if static is None else StaticRunner(self._static_forward(self.model))
            with uncompiled():
                self._mask_form, self.static = exact_mask_form(form, self.config, self._check), static
        if form.window is None or static is not None:
            check_tree_decoding(self)
        if self.backend.exact:
            check_rows(self)

    def _check(self, form: MaskForm) -> None:
        """Raise UnsupportedModelError unless the model decodes exactly with this form of masks."""
        self._mask_form = form
        check_tree_decoding(self)

    def subset(self, layers: Sequence[int]) -> LM:
        """Return a draft without training: a model with some of this model's layers, which shares all parameters.

        (Layer skipping for self-speculation: Zhang et al. 2024, "Draft & Verify".)

        Args:
            layers: indices of the layers that stay, ascending.

        Raises:
            ValueError: `layers` is empty, out of range or out of order, or the layers are not in one list.
            UnsupportedModelError: the smaller model cannot be decoded exactly.
        """
        model = layer_subset(self.model, layers, self.name)
        name = f"{self.name}[{len(layers)} of {self.config.num_hidden_layers} layers]"
        return LM(model, self.tokenizer, name=name, synthetic=self.synthetic, backend=self.backend)

    def quantized(self, kind: str) -> LM:
        """Return this model with quantised linear layers. It is built once, and shares all other weights.

        Args:
            kind: "int8" or "int4", as for `load`.

        Raises:
            UnsupportedModelError: the model has weights that cannot be quantised.
            ValueError: the kind is unknown or not for this device, the weights are split among processes, or the model
                runs on another backend than "eager".
        """
        if kind not in self._variants:
            model = self._shared_copy("quantised")
            quantizer(kind, self.device)(model)
            name = f"{self.name} ({kind})"
            self._variants[kind] = LM(model, self.tokenizer, name=name, synthetic=self.synthetic)
        return self._variants[kind]

    def with_backend(self, kind: str, ranks: Ranks = Ranks()) -> LM:
        """Return this model on another backend. It is built once, and shares all weights that the backend can share.

        Args:
            kind: the backend, as for `load`.
            ranks: the processes of the target that this model drafts for.

        Raises:
            ValueError: the backend is unknown, the model runs on another backend than "eager" already, or its weights
                are split among processes.
            UnsupportedModelError: the model cannot be decoded exactly on this backend.
        """
        if kind == self.backend.name or (kind == "auto" and self.ranks.group is not None):
            return self
        if kind not in self._variants:
            model = self._shared_copy("given another backend")
            backend = prepare(kind, model, ranks.agreed)
            settings: dict[str, Any] = {"name": self.name, "synthetic": self.synthetic}
            same = backend == self.backend
            self._variants[kind] = self if same else LM.on_backend(backend, model, self.tokenizer, **settings)
        return self._variants[kind]

    @staticmethod
    def on_backend(backend: Backend, model: PreTrainedModel, *arguments: Any, **others: Any) -> LM:
        """Return an LM of a model that was prepared for a backend. The other arguments are those of `LM`.

        If "auto" chose the backend and the model cannot be decoded exactly on it, the LM runs on "eager".

        Raises:
            UnsupportedModelError: the model cannot be decoded exactly on this backend.
        """
        try:
            return LM(model, *arguments, **others, backend=backend)
        except UnsupportedModelError as error:
            if not backend.chosen:
                raise
            return LM(model, *arguments, **others, backend=Backend(note=f"not {backend.name}: {error}"))

    def _shared_copy(self, what: str) -> PreTrainedModel:
        """Return a copy of the modules to transform. Raise ValueError, with `what` in its message, unless the backend
        is "eager" and this process holds all weights."""
        if self.ranks.group is not None:
            raise ValueError(f"{self.name} cannot be {what}: its weights are split among processes; load it without tp")
        if self.backend.name != "eager":
            raise ValueError(
                f"{self.name} cannot be {what}: it runs on the backend {self.backend.name}, which lays out the weights"
                " its own way; load it with backend='eager'"
            )
        copied: PreTrainedModel = shared_copy(self.model)
        return copied
