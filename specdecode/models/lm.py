"""A causal language model that reads and writes KV slots: the only caller of a Hugging Face forward."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from specdecode.backends import Backend, prepare
from specdecode.backends.grouped_attention import GROUPED, own_config
from specdecode.backends.packed import PackedLinear
from specdecode.backends.static import Held, Inputs, Static, visible_slots
from specdecode.core.errors import UnsupportedModelError
from specdecode.core.slots import SlotBatch, Slots
from specdecode.core.tree import DraftTree
from specdecode.models.quantize import quantizer, stored_bytes
from specdecode.models.rotary import Mover, rotations
from specdecode.models.spelling import Spelling
from specdecode.policies.base import CachePolicy, boundary
from specdecode.policies.keep_all import KeepAll

_MASKABLE = {"full_attention", "sliding_attention"}
# The sliding window while a model is probed: narrower than the probe is long.
_NARROW = 4
# Longest piece of a prompt in one forward: bounds the mask and the activations, and is wide enough to be efficient.
PREFILL_CHUNK = 512
# How far a tree forward may lie from a sequential one, in standard deviations of the logits: far above what rounding
# does, far below what a wrong mask or position does. Parts of a model may compute in float32 whatever its type.
_PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.25}


class LM:
    """A Hugging Face causal LM, checked to decode exactly through a tree mask and KV slots.

    Attributes:
        model: the wrapped model, switched to evaluation; not changed otherwise.
        tokenizer: its tokenizer, if it was given one.
        name: for tables and messages.
        synthetic: the weights are random; only costs can be measured with it.
        backend: how its forwards run.
        static: what runs those that it can over static shapes, if the backend does that.
        forwards: of the model so far, whoever asked for them.
        vocab_size: width of the logits.
        context_length: tokens that prompt and output may have together.

    Raises:
        UnsupportedModelError: this design cannot serve the architecture; the sentence says why.
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
        self.model = model
        model.train(False)
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.synthetic = synthetic
        self.backend = backend
        config = model.config.get_text_config(decoder=True)
        self.vocab_size: int = config.vocab_size
        self.context_length = _context_length(config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if reason := _refusal(model):
            raise UnsupportedModelError(f"{self.name} cannot be decoded exactly: {reason}")
        self.forwards = 0
        self._variants: dict[str, LM] = {}
        self._records_attention = False
        self._recorder: _Recorder | None = None
        self._static_recorders: dict[tuple[int, ...], _Recorder] = {}
        self.static = backend.static(self._static_step) if backend.static is not None else None
        self._window = _window(config)
        self._mask_per_layer_type = self._window is not None
        self._probe()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored: tied ones once, quantised ones with their scales, and those that are
        packed, which a tied head is beside its embedding."""
        packed = sum(module.packed_bytes for module in self.model.modules() if isinstance(module, PackedLinear))
        return sum(map(stored_bytes, self.model.parameters())) + packed

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that the model itself declares to end a text; a caller decides whether to stop at them."""
        declared = getattr(self.model.generation_config, "eos_token_id", None)
        if declared is None:
            return ()
        return (declared,) if isinstance(declared, int) else tuple(declared)

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a text; its bytes, if there is no tokenizer: models of random weights take any ids.

        Args:
            text: anything.
            chat: it is what a user says: the model's chat template is put around it, up to where the answer begins.

        Raises:
            ValueError: a chat with a model that has no template for one.
        """
        if chat:
            if self.tokenizer is None or not self.tokenizer.chat_template:
                raise ValueError(f"{self.name} has no chat template: give it a text to continue, without chat")
            turns = [{"role": "user", "content": text}]
            said = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            # The template brings its own special tokens.
            answered: list[int] = self.tokenizer(said, add_special_tokens=False)["input_ids"]
            return answered
        if self.tokenizer is None:
            return [byte % self.vocab_size for byte in text.encode()]
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: its tokens have no text")
        text: Any = self.tokenizer.decode(list(tokens))
        assert isinstance(text, str)
        return text

    @functools.cached_property
    def spelling(self) -> Spelling:
        """The text that tokens add to a text.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: its tokens have no text")
        return Spelling(self.tokenizer)

    def new_slots(self, capacity: int) -> Slots:
        return Slots(capacity, self.device) if self.static is None else self.static.new_slots(capacity, self.device)

    def span(self, slots: Slots) -> int:
        """The slots that a step's forward looks at: those that are filled, or a few more over static shapes."""
        return slots.length if self.static is None else self.static.span(slots)

    @functools.cached_property
    def mover(self) -> Mover:
        """Evicts slots of this model.

        Raises:
            UnsupportedModelError: its keys cannot be moved to other positions.
        """

        def held_at(position: int) -> tuple[list[Tensor], list[Tensor]]:
            slots = self.new_slots(1)
            self.forward(slots, torch.tensor([self.vocab_size // 3]), positions=torch.tensor([position]))
            # Copies, since the next slots may have the same storage.
            return [keys.clone() for keys in slots.filled_keys()], [values.clone() for values in slots.filled_values()]

        return Mover(rotations(self.model, held_at))

    @torch.inference_mode()
    def forward(
        self,
        slots: Slots,
        tokens: Int[Tensor, " n"],
        *,
        positions: Int[Tensor, " n"] | None = None,
        visible: Bool[Tensor, "n s"] | None = None,
        rows: int = 1,
    ) -> Float[Tensor, "rows V"]:
        """Run tokens through the model, appending their keys and values to the slots.

        Args:
            slots: grown by n.
            tokens: on any device, as the other tensors.
            positions: of the tokens; by default they follow the slots already filled.
            visible: row i marks which of the last s slots (the new ones included) token i attends to; all slots before
                those it does. By default the tokens are a chain.
            rows: of how many of the last tokens the logits are wanted.

        Returns:
            Logits of the last `rows` tokens.
        """
        count, start = len(tokens), slots.length
        if positions is None:
            positions = torch.arange(start, start + count, device=self.device)
        if visible is None:
            visible = torch.ones(count, count, dtype=torch.bool, device=self.device).tril()
        # Here and below: a copy to the device that blocks would wait for all that the device has still to do.
        positions = positions.to(self.device, non_blocking=True)
        slots.append(positions)
        self.forwards += 1
        recorder = self._recorder
        static, layers = (self.static, ()) if recorder is None else (recorder.static, recorder.layers)
        if static is not None and not self._records_attention and static.takes(slots, count):
            logits, *outputs = static.run(slots, tokens, positions, visible)
            slots.outputs = dict(zip(layers, outputs, strict=True))
            return logits[-rows:]
        return self._forward(slots, [slots], [_Reading(tokens, positions, visible, rows)])[0]

    def _forward(
        self, cache: Slots | SlotBatch, sequences: Sequence[Slots], readings: Sequence[_Reading]
    ) -> list[Float[Tensor, "_ V"]]:
        """Run what each sequence reads, the slots for it already taken; logits of the last rows that each wants."""
        size = max(len(reading.tokens) for reading in readings)
        kept = {"logits_to_keep": max(reading.rows for reading in readings)} if self._keeps_logits else {}
        recorder = self._recorder
        model = self.model if recorder is None else recorder.model
        output = model(
            input_ids=self._side_by_side([reading.tokens for reading in readings], size),
            attention_mask=self._mask(sequences, [reading.visible for reading in readings], size),
            position_ids=self._side_by_side([reading.positions for reading in readings], size),
            past_key_values=cache,
            use_cache=True,
            output_attentions=self._records_attention,
            **kept,
        )
        if self._records_attention:
            for row, (slots, reading) in enumerate(zip(sequences, readings, strict=True)):
                slots.weights = torch.stack(
                    [
                        # Query heads that share a head of keys: what it received is what they all paid.
                        weights[row, :, size - len(reading.tokens) :, : slots.length]
                        .unflatten(0, (keys.shape[0], -1))
                        .sum(1)
                        .to(torch.promote_types(self.dtype, torch.float32))
                        for weights, keys in zip(output.attentions, slots.filled_keys(), strict=True)
                    ]
                )
        if recorder is not None:
            for row, (slots, reading) in enumerate(zip(sequences, readings, strict=True)):
                own = [given[row, size - len(reading.tokens) :] for given in recorder.outputs]
                slots.outputs = dict(zip(recorder.layers, own, strict=True))
        return [output.logits[row, -reading.rows :] for row, reading in enumerate(readings)]

    def _static_step(
        self,
        inputs: Inputs,
        positions: Int[Tensor, " span"],
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
    ) -> tuple[Float[Tensor, "W V"]]:
        return (self._static_logits(self.model, inputs, positions, keys, values),)

    def _static_logits(
        self,
        model: PreTrainedModel,
        inputs: Inputs,
        positions: Int[Tensor, " span"],
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
    ) -> Float[Tensor, "W V"]:
        """A forward over static shapes, all of it on the device; see `backends.static`."""
        span = len(positions)
        allowed = visible_slots(inputs, span)
        near = allowed
        if self._window is not None:
            near = allowed & (inputs.positions[:, None] - positions[None, :] < self._window)
        places = inputs.start + torch.arange(len(inputs.tokens), device=positions.device)
        logits: Tensor = model(
            input_ids=inputs.tokens[None],
            attention_mask=self._taken(allowed[None], near[None]),
            position_ids=inputs.positions[None],
            past_key_values=Held(keys, values, places, span),
            use_cache=True,
        ).logits[0]
        return logits

    def _side_by_side(self, parts: Sequence[Int[Tensor, " _"]], size: int) -> Int[Tensor, "rows n"]:
        """Padding stands first, so that the rows of which the logits are wanted are the last of every sequence."""
        return torch.stack(
            [nn.functional.pad(part.to(self.device, non_blocking=True), (size - len(part), 0)) for part in parts]
        )

    @torch.inference_mode()
    def continue_greedily(
        self, slots: Slots, token: Int[Tensor, " 1"], count: int, vocab_size: int
    ) -> Int[Tensor, " count"]:
        """Read a token and then, one by one, the model's own choices.

        Args:
            slots: grown by `count`.
            token: the first to read.
            count: of the forwards, and of the choices: the last is not read.
            vocab_size: choices lie below it.

        Returns:
            The choices, on the device; no forward waits for the host.
        """
        if self.static is not None and self.static.takes_chain(slots, count):
            self.forwards += count
            return self.static.chain(slots, token, count, vocab_size)
        chosen = []
        for _ in range(count):
            token = self.forward(slots, token)[:, :vocab_size].argmax(-1)
            chosen.append(token)
        return torch.cat(chosen)

    @contextmanager
    def recording_attention(self) -> Iterator[None]:
        """Within this context every forward leaves the attention of its tokens in `Slots.weights`.

        The weights exist only in transformers' plain attention, which the model is switched to meanwhile.
        """
        usual = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        self._records_attention = True
        try:
            yield
        finally:
            self._records_attention = False
            self.model.set_attn_implementation(usual)

    @contextmanager
    def recording_outputs(self, layers: Sequence[int]) -> Iterator[None]:
        """Within this context every forward leaves what these layers give in `Slots.outputs`.

        Raises:
            ValueError: as `outputs_of`.
        """
        usual = self._recorder
        with ExitStack() as stack:
            if not layers:
                self._recorder = None
            elif self.static is None:
                outputs = stack.enter_context(outputs_of(self.model, layers))
                self._recorder = _Recorder(tuple(layers), self.model, outputs)
            else:
                self._recorder = self._static_recorder(tuple(layers))
            stack.callback(setattr, self, "_recorder", usual)
            yield

    def _static_recorder(self, layers: tuple[int, ...]) -> _Recorder:
        """What records over static shapes, made once: what is compiled or captured goes on for as long as the model
        lives, and so do its hooks. They are those of another shell of the same weights, as compiled code is used again
        whether there are hooks or not: PyTorch does not look at them. So plain decoding has other code, too."""
        if layers not in self._static_recorders:
            assert self.backend.static is not None
            model = _shell(self.model)
            outputs, _ = _listen(model, layers)

            def step(
                inputs: Inputs, positions: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
            ) -> tuple[Tensor, ...]:
                logits = self._static_logits(model, inputs, positions, keys, values)
                return logits, *(output[0] for output in outputs)

            self._static_recorders[layers] = _Recorder(layers, model, outputs, self.backend.static(step))
        return self._static_recorders[layers]

    @contextmanager
    def recording_for(self, policy: CachePolicy, layers: Sequence[int] = ()) -> Iterator[None]:
        """`recording_attention` for a policy that reads it, and `recording_outputs` for a drafter that reads some."""
        with ExitStack() as stack:
            if policy.reads_attention:
                stack.enter_context(self.recording_attention())
            stack.enter_context(self.recording_outputs(layers))
            yield

    def read(
        self, slots: Slots, tokens: Sequence[int], policy: CachePolicy = KeepAll()
    ) -> tuple[Float[Tensor, "1 V"], int]:
        """Append a text of any length to the slots, evicting on the way where the policy is to: not behind the last
        token, but before the next one is read.

        Returns:
            Logits of the last token, and the number of forwards that it took.
        """
        forwards, start = 0, 0
        while start < len(tokens):
            self.evict(slots, policy)
            ahead = boundary(policy, slots.committed + 1, slots.length + 1) - slots.committed
            chunk = tokens[start : start + min(PREFILL_CHUNK, ahead)]
            logits = self.forward(slots, torch.tensor(chunk))
            if policy.reads_attention:
                slots.attend(range(len(chunk)))
            forwards, start = forwards + 1, start + len(chunk)
        return logits, forwards

    def evict(self, slots: Slots, policy: CachePolicy) -> bool:
        """Let the policy evict if it is its turn; whether it was."""
        if boundary(policy, slots.committed, slots.length) != slots.committed:
            return False
        self.mover.evict(slots, policy.keep(slots))
        return True

    def forward_tree(self, slots: Slots, pending: Sequence[int], tree: DraftTree) -> Float[Tensor, "nodes V"]:
        """Run the committed tokens that the slots lack, the last of which is the root, and a tree over them.

        Returns:
            Logits at the root and at each node. The slots have grown by ``len(pending) + N``.
        """
        if not len(tree):
            return self.forward(slots, torch.tensor(pending))
        reading = _reading(slots, pending, tree)
        return self.forward(
            slots, reading.tokens, positions=reading.positions, visible=reading.visible, rows=reading.rows
        )

    @torch.inference_mode()
    def forward_trees(
        self, batch: SlotBatch, pending: Sequence[Sequence[int]], trees: Sequence[DraftTree]
    ) -> list[Float[Tensor, "_ V"]]:
        """`forward_tree` for each sequence of a batch, in one forward."""
        self.forwards += 1
        readings = [_reading(*each) for each in zip(batch.rows, pending, trees, strict=True)]
        batch.append([reading.positions.to(self.device, non_blocking=True) for reading in readings])
        return self._forward(batch, batch.rows, readings)

    def _mask(
        self, sequences: Sequence[Slots], visible: Sequence[Bool[Tensor, "_ _"]], size: int
    ) -> Tensor | dict[str, Tensor]:
        """The mask of a forward of `size` tokens of each sequence, padding first, over all that any of them holds."""
        length = max(slots.length for slots in sequences)
        allowed = torch.zeros(len(sequences), size, length, dtype=torch.bool, device=self.device)
        for row, slots, own in zip(allowed, sequences, visible, strict=True):
            count, recent = own.shape
            row[size - count :, : slots.length] = True
            row[size - count :, slots.length - recent : slots.length] = own.to(self.device, non_blocking=True)
        if self._window is None:
            return self._taken(allowed, allowed)
        near = allowed.clone()
        for row, slots, own in zip(near, sequences, visible, strict=True):
            positions, count = slots.positions[: slots.length], len(own)
            row[size - count :, : slots.length] &= positions[-count:, None] - positions[None, :] < self._window
        return self._taken(allowed, near)

    def _taken(
        self, allowed: Bool[Tensor, "rows n length"], near: Bool[Tensor, "rows n length"]
    ) -> Tensor | dict[str, Tensor]:
        """The form in which the model takes its mask: of all slots, and of those within the window."""
        if self._mask_per_layer_type:
            return {"full_attention": self._additive(allowed), "sliding_attention": self._additive(near)}
        return self._additive(near)

    def _additive(self, allowed: Bool[Tensor, "rows n length"]) -> Float[Tensor, "rows 1 n length"]:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)[:, None]

    def _probe(self) -> None:
        """Find the form of mask with which the model decodes exactly.

        A window is wide: what the model's own code makes of it shows in a short text only if it is narrowed meanwhile.
        """
        window = self._window
        if window is None:
            self._compare()
            return
        config = self.model.config.get_text_config(decoder=True)
        config.sliding_window = self._window = min(window, _NARROW)
        # What is compiled or captured with the narrow window would not serve the wide one.
        static = self.static
        self.static = static and Static(self._static_step, None)
        try:
            self._compare()
        except UnsupportedModelError:
            self._mask_per_layer_type = False
            self._compare()
        finally:
            config.sliding_window = self._window = window
            self.static = static
        if static is not None:
            self._compare()

    @torch.inference_mode()
    def _compare(self) -> None:
        """A short tree through the slots must give the logits of sequential forwards without them."""
        stem = [(11 * i + 3) % self.vocab_size for i in range(5)]
        nodes = [(7 * i + 5) % self.vocab_size for i in range(11)]
        after = self.vocab_size // 2
        # Eight siblings, so that slot and position lie far apart in the branch below the last of them.
        tree = DraftTree(torch.tensor(nodes), torch.tensor([0] * 8 + [8, 8, 9]))
        accepted = [8, 9, 11]
        try:
            slots = self.new_slots(len(stem))
            # The first forward is none over static shapes, where there are any; the others are.
            self.forward(slots, torch.tensor(stem[:-1]))
            at_nodes = self.forward_tree(slots, stem[-1:], tree)
            slots.keep([len(stem) - 1 + node for node in accepted], after=len(stem))
            at_end = self.forward(slots, torch.tensor([after]))
            for path in ([3], [8, 10], accepted):
                text = stem + [nodes[i - 1] for i in path] + [after]
                expected = self.model(torch.tensor([text], device=self.device), use_cache=False).logits[0]
                seen = torch.cat([at_nodes[[0, *path]], at_end if path is accepted else at_end[:0]])
                expected = expected[len(stem) - 1 :][: len(seen)].double()
                error = ((seen.double() - expected).abs().max() / expected.std()).item()
                if not error <= _PROBE_TOLERANCE[self.dtype]:
                    reason = _lack(self.model) or (
                        "a tree through its cache gives other logits than the same tokens in sequence (off by"
                        f" {error:.2g} standard deviations), as happens where positions are taken from cache slots"
                        " (ALiBi), a layer ignores the given mask, or the code does not do what the configuration says"
                    )
                    raise UnsupportedModelError(f"{self.name} cannot be decoded exactly: {reason}")
        except UnsupportedModelError:
            raise
        except Exception as error:
            reason = _lack(self.model) or (
                "its forward does not take a 4-D mask, positions and a cache of keys and values"
                f" ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            )
            raise UnsupportedModelError(f"{self.name} cannot be decoded exactly: {reason}") from error

    def subset(self, layers: Sequence[int]) -> LM:
        """A smaller model of some of this one's layers, sharing all parameters: a draft that needs no training.

        (Layer skipping as self-speculation: Zhang et al. 2024, "Draft & Verify".)

        Args:
            layers: indices of the layers that stay, ascending.

        Raises:
            ValueError: no layers, out of range, or out of order; or the model does not hold its layers in one list.
        """
        config = self.model.config.get_text_config(decoder=True)
        total = config.num_hidden_layers
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < total:
            raise ValueError(f"layers is {list(layers)}: it must be ascending indices from 0 to {total - 1}")
        model = _shell(self.model)
        model.generation_config = copy.deepcopy(self.model.generation_config)
        stack = decoder_layers(model)
        if stack is None:
            raise ValueError(f"{self.name} has no list of {total} layers to take some from: draft with another model")
        stack._modules = {str(i): stack[layer] for i, layer in enumerate(layers)}
        for i, layer in enumerate(stack):
            for module in layer.modules():
                if "layer_idx" in vars(module):
                    module.layer_idx = i  # type: ignore[assignment]
        text = own_config(model).get_text_config(decoder=True)
        if getattr(text, "layer_types", None):
            text.layer_types = [text.layer_types[layer] for layer in layers]
        text.num_hidden_layers = len(layers)
        name = f"{self.name}[{len(layers)} of {total} layers]"
        return LM(model, self.tokenizer, name=name, synthetic=self.synthetic, backend=self.backend)

    def quantized(self, kind: str) -> LM:
        """The same model with its linear layers' weights quantised, made once; all else the two share.

        Args:
            kind: "int8", as for `load`.

        Raises:
            UnsupportedModelError: it has weights that cannot be quantised.
            ValueError: there is no such kind, or its package is not installed.
        """
        if kind not in self._variants:
            self._eager("quantised")
            model = _shell(self.model)
            quantizer(kind)(model)
            name = f"{self.name} ({kind})"
            self._variants[kind] = LM(model, self.tokenizer, name=name, synthetic=self.synthetic)
        return self._variants[kind]

    def with_backend(self, kind: str) -> LM:
        """The same model, its forwards run by a backend, made once; all else the two share.

        Args:
            kind: as for `load`.

        Raises:
            ValueError: there is no such backend, or this model has one already.
        """
        if kind == "eager":
            return self
        if kind not in self._variants:
            self._eager("given another backend")
            model = _shell(self.model)
            backend = prepare(kind, model)
            self._variants[kind] = (
                self
                if backend == self.backend
                else LM.on_backend(backend, model, self.tokenizer, name=self.name, synthetic=self.synthetic)
            )
        return self._variants[kind]

    @staticmethod
    def on_backend(backend: Backend, model: PreTrainedModel, *arguments: Any, **others: Any) -> LM:
        """An LM of a model that was prepared for a backend, or, where it was not asked for by name and cannot serve the
        model, for the backend "eager". The other arguments are those of `LM`.

        Raises:
            UnsupportedModelError: the architecture cannot be decoded exactly, or not on this backend.
        """
        try:
            return LM(model, *arguments, **others, backend=backend)
        except UnsupportedModelError as error:
            if not backend.chosen:
                raise
            return LM(model, *arguments, **others, backend=Backend(note=f"not {backend.name}: {error}"))

    def _eager(self, what: str) -> None:
        if self.backend.name != "eager":
            raise ValueError(
                f"{self.name} cannot be {what}: it runs on the backend {self.backend.name}, which lays out the weights"
                " its own way; load it with backend='eager'"
            )


def synchronise(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def outputs_of(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[Float[Tensor, "rows n hidden"]]]:
    """Within this context each forward of a model leaves what some of its layers give, in the order of `layers`, in the
    list, where the forward before it left the same.

    Args:
        model: gets hooks, which are gone behind the context.
        layers: indices of decoder layers. The last one's output is that before the model's final norm.

    Raises:
        ValueError: a layer that there is not, or the model does not hold its layers in one list.
    """
    outputs, handles = _listen(model, layers)
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _listen(model: PreTrainedModel, layers: Sequence[int]) -> tuple[list[Tensor], list[RemovableHandle]]:
    stack = decoder_layers(model)
    if stack is None or not all(0 <= layer < len(stack) for layer in layers):
        total = "no list of layers" if stack is None else f"layers 0 to {len(stack) - 1}"
        raise ValueError(f"{type(model).__name__} has {total}: the outputs of {list(layers)} cannot be read")
    outputs = [torch.empty(0)] * len(layers)

    def telling(place: int) -> Callable[..., None]:
        def tell(module: nn.Module, given: Any, output: Any) -> None:
            outputs[place] = output if isinstance(output, Tensor) else output[0]

        return tell

    return outputs, [stack[layer].register_forward_hook(telling(place)) for place, layer in enumerate(layers)]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """A model's decoder layers, if it holds them in one list."""
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == total), None)


@dataclass(frozen=True, slots=True)
class _Recorder:
    """What takes the outputs of some layers.

    Attributes:
        layers: their numbers.
        model: that runs.
        outputs: [rows, n, hidden] of each, in its last forward.
        static: what runs forwards over static shapes, if the backend does that; their outputs come with the logits.
    """

    layers: tuple[int, ...]
    model: PreTrainedModel
    outputs: list[Tensor]
    static: Static | None = None


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a forward reads of one sequence; the arguments of `LM.forward`."""

    tokens: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    visible: Bool[Tensor, "n s"]
    rows: int


def _reading(slots: Slots, pending: Sequence[int], tree: DraftTree) -> _Reading:
    """The committed tokens that the slots lack, the last of which is the root, and a tree over them."""
    stem, size = len(pending), len(pending) + len(tree)
    tokens = torch.tensor(pending)
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    visible[stem - 1 :, stem - 1 :] = tree.visibility
    # Every token sees its predecessors and itself, so their number places it: a node by its depth.
    positions = slots.length + visible.sum(1) - 1
    return _Reading(
        torch.cat([tokens.to(tree.tokens.device, non_blocking=True), tree.tokens]), positions, visible, len(tree) + 1
    )


def _shell(module: Any) -> Any:
    """A copy of the module objects, sharing every parameter and buffer, but not what is later put in a parameter's
    place in either, nor hooks."""
    shell = copy.copy(module)
    for name in [name for name in vars(shell) if name == "_parameters" or name.endswith("_hooks")]:
        setattr(shell, name, vars(shell)[name].copy())
    shell._modules = {name: None if child is None else _shell(child) for name, child in module._modules.items()}
    return shell


def _context_length(config: PretrainedConfig) -> int:
    """Positions that the model may use without its rotation changing under the keys that are cached."""
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond it, all positions rotate by other factors, and cached keys would be wrong.
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return int(limit)


def _window(config: PretrainedConfig) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    if layer_types and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def _lack(model: PreTrainedModel) -> str | None:
    """What a model that failed the probe does not even ask for, if it is that."""
    parameters = inspect.signature(type(model).forward).parameters
    missing = [name for name in ("position_ids", "past_key_values") if name not in parameters]
    return f"its forward takes no {' and no '.join(missing)}" if missing else None


def _refusal(model: PreTrainedModel) -> str | None:
    """Why the configuration alone rules the model out, if it does."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - _MASKABLE):
        return f"it has layers of type {', '.join(other)}, which a tree mask over KV slots cannot serve"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention layers count their window in cache slots and ignore the given mask"
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        return "its ALiBi biases are taken from cache slots, not from the given positions"
    if getattr(config, "keep_window_size", None):
        return (
            "of a long text it attends to the strongest tokens only, and which of two equal ones depends on their slots"
        )
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa", GROUPED):
        return f"attention {implementation!r} takes no 4-D mask; load it with attn_implementation='sdpa'"
    return None
