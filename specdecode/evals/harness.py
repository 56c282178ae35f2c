"""The model "specdecode" for lm-evaluation-harness. Importing this module registers it.

Likelihoods are computed through the decode path, with its evictions (see `evals.perplexity`). Continuations are written
by `generate`. So tasks judge a cache policy, or INT8 weights, as they decode. The harness's own models read a text in
one forward, which does not use the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from specdecode.backends import check as check_backend
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.keys import MODEL_KEYS
from specdecode.bench.arms.parts import controller_maker, drafter_maker
from specdecode.core.sampling import Sampling
from specdecode.decoding.generate import generate
from specdecode.evals.quality_presets import decode_path
from specdecode.heads.loading import shipped_head
from specdecode.models.devices import choose_device
from specdecode.models.embedded import EMBEDDED
from specdecode.models.lm import LM
from specdecode.models.loading import load

_KEYS = ("target", *MODEL_KEYS, "backend", "dtype", "device", "max_gen_toks")


@register_model("specdecode")
class SpecDecodeLM(TemplateLM):  # type: ignore[misc]
    """A model of the harness. Its arguments are the keys of `--model_args`.

    A context that is too long loses its beginning, as with the harness's own models. With a cache policy, no context is
    too long.

    Args:
        target: name of the target, as for `load`; or a target loaded with backend="eager", for which `dtype` and
            `device` have no effect.
        backend: backend of the forwards.
        dtype: type of the weights.
        device: by default the first GPU, or the CPU if there is none.
        batch_size: only 1, because texts are decoded one by one.
        max_batch_size: has no effect.
        max_gen_toks: length limit of continuations for tasks that do not set one.
        options: settings of decoding, by the keys of a preset's arm (`ArmSpec`), and `draft`, the name of a draft
            model. Likelihoods depend on `policy`, `cache`, the policy's own settings and `quantize`. They are computed
            in steps of `k` + 1 tokens. The other keys change the speed, not the texts. The default of `drafter` is
            "lookup+head" with `head`, "model" with `draft`, and otherwise "lookup".

    Raises:
        ValueError: an unknown key or value, keys that exclude each other, a target without a tokenizer, or a missing
            draft model or head. Errors of `load` and `load_head` pass through.
    """

    def __init__(
        self,
        target: LM | str = EMBEDDED,
        *,
        backend: str = "auto",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        spec = ArmSpec.from_model_args(options, _KEYS)
        name = target.name if isinstance(target, LM) else target
        spec.check_head(name, ships_head=shipped_head(name) is not None)
        if str(batch_size) != "1":
            raise ValueError(f"batch_size is {batch_size}: texts are decoded one by one, so leave it out")
        # The harness's command line passes this device where none is named.
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None
        if not isinstance(target, LM):
            check_backend(backend, choose_device(device))
            target = load(target, dtype=dtype, device=device, backend="eager")
        if target.tokenizer is None:
            raise ValueError(
                f"{target.name} has no tokenizer, and the harness's tasks are texts: choose another target"
            )
        self._path = decode_path(spec, target, backend)
        lm = self._path.lm
        draft = None
        if spec.draft is not None:
            place: dict[str, Any] = {"dtype": lm.dtype, "device": lm.device, "backend": backend}
            draft = load(spec.draft, target=lm, same_vocabulary=spec.shares_vocabulary, **place)
        self._make_drafter = drafter_maker(spec.with_head_of(target.name), lm, draft)
        self._make_controller = controller_maker(spec, lm, self._make_drafter)
        self._keeps_all = self._path.policy.interval == 0
        self.max_gen_toks = max_gen_toks
        self.tokenizer: Any = target.tokenizer

    @property
    def max_length(self) -> int:
        """Most tokens of context and continuation together; longer texts need a cache policy."""
        return self._path.lm.context_length

    @property
    def tokenizer_name(self) -> str:
        """Name of the target as a file name, under which the harness stores prompts."""
        return self._path.lm.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._special(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        first = self.tokenizer.bos_token_id
        return self._special(self.tokenizer.eos_token_id if first is None else first)

    def _special(self, token: int | None) -> int:
        if token is None:
            raise ValueError(f"the tokenizer of {self._path.lm.name} has no token to put before a text without context")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids. By default they include the tokenizer's special tokens, unless the text begins with the
        beginning-of-text token."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token)
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the model's chat template.

        Raises:
            ValueError: the model has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self._path.lm.name} has no chat template: leave --apply_chat_template out")
        conversation: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return conversation

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return the log p of each continuation after its context, in nats, and whether greedy decoding writes it."""
        answers = []
        for texts, context, continuation in tqdm(requests, "loglikelihood", disable=disable_tqdm):
            answer = self._log_likelihood([*context, *continuation], len(continuation))
            answers.append(answer)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _log_likelihood(self, tokens: list[int], count: int) -> tuple[float, bool]:
        """Return the log p of the last `count` tokens, in nats, and whether greedy decoding writes them."""
        if self._keeps_all:
            tokens = tokens[-self.max_length :]
        total, greedy = 0.0, True
        for step in self._path.forced_steps(tokens, len(tokens) - count):
            log_probs = step.logits.double().log_softmax(-1)
            forced = torch.tensor(tokens[step.place : step.place + len(log_probs)], device=log_probs.device)
            total += log_probs.gather(1, forced[:, None]).sum().item()
            greedy = greedy and bool((log_probs.argmax(-1) == forced).all())
        return total, greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log p of whole texts, in nats. A text longer than the context is read in the harness's windows.
        With a cache policy, every text is read in one window."""
        totals = []
        for request in tqdm(requests, "loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            tokens = self.tok_encode(text)
            # One token less than the context holds, because of the token before the text.
            size = self.max_length - 1 if self._keeps_all else max(len(tokens), 1)
            windows = map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, size, 1))
            answers = self._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
            totals.append(sum(logprob for logprob, _ in answers))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to the length limit or a stop string, which is left out."""
        continuations = []
        for request in tqdm(requests, "generate_until", disable=disable_tqdm):
            context, gen_kwargs = request.args
            continuations.append(self._continue(context, gen_kwargs))
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), continuations[-1])
        return continuations

    def _continue(self, context: str, gen_kwargs: dict[str, Any]) -> str:
        rules = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        stop, limit = [string for string in rules.pop("until") if string], rules.pop("max_gen_toks")
        sampled, temperature = rules.pop("do_sample"), rules.pop("temperature", 1.0)
        sampling = Sampling(
            temperature if sampled else 0.0,
            rules.pop("top_k", 0),
            rules.pop("top_p", 1.0),
            # From torch's generator, which the harness's --seed sets.
            seed=int(torch.randint(2**31, ())),
        )
        if rules:
            raise ValueError(f"generation_kwargs has {min(rules)!r}, which this model does not support: leave it out")
        tokens = self.tok_encode(context)
        if self._keeps_all:
            tokens, limit = maybe_truncate(tokens, limit, self.max_length)
        written = self._write(tokens, limit, sampling, stop)
        if written[-1] in self._path.lm.stop_token_ids:
            del written[-1]
        text = self._path.lm.spelling.text(written, special=False)
        cut: str = postprocess_generated_text(text, stop, None)
        return cut

    def _write(self, context: list[int], limit: int, sampling: Sampling, stop: list[str]) -> list[int]:
        """Continue a context up to a stop string that lies entirely in the continuation. As in the harness, a stop
        string that begins in the context does not count."""
        lm, written = self._path.lm, list[int]()
        while True:
            made = generate(
                lm,
                context + written,
                drafter=self._make_drafter(),
                controller=self._make_controller(),
                policy=self._path.policy,
                # A new seed: the same seed would repeat the random numbers of the text's beginning.
                sampling=replace(sampling, seed=(sampling.seed or 0) + len(written)),
                max_new_tokens=limit - len(written),
                stop_token_ids=lm.stop_token_ids,
                stop=stop,
            )
            written += made.tokens
            ended = written[-1] in lm.stop_token_ids or any(string in lm.spelling.text(written) for string in stop)
            if ended or len(written) == limit:
                return written


def run(arguments: Sequence[str]) -> None:
    """Run the harness's own command line with this model. It reads only `sys.argv`, which is therefore replaced."""
    sys.argv = ["lm-eval", "run", "--model", "specdecode", *arguments]
    cli_evaluate()
