"""Files of EAGLE-3 heads: folders in the format of `speculators`, and folders of the original EAGLE-3 files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from specdecode.core.errors import ModelFileError, UnsupportedModelError, first_line
from specdecode.heads.eagle3 import Eagle3Head, Eagle3Shape
from specdecode.heads.fingerprint import TargetFingerprint
from specdecode.models.embedded import EMBEDDED, HUB_ID
from specdecode.support.files import write_whole

CONFIG, WEIGHTS, PAGE, OWN = "config.json", "model.safetensors", "README.md", "specdecode.json"
"""Names of a head's files in its folder. The last file holds data of this package, which other engines ignore."""

IDS = "eagle_aux_hidden_state_layer_ids"
"""Key of the target's layers whose hidden states a head reads, counted from 1; 0 stands for the embeddings."""

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Keys of a head's wiring that are true or false. A missing key means false, as in `speculators`."""

# Default draft length of engines that read the folder, and the version of the written format.
_PROPOSED_TOKENS, _FORMAT_VERSION = 4, "0.9.0"
_DECODERS: dict[str, type[LlamaConfig] | type[Qwen3Config]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
# Names of files with weights, in order of preference.
_WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Eagle3Files:
    """The contents of a head's folder, with the keys and names of the `speculators` format.

    Attributes:
        folder: the folder, for messages.
        config: the values of `config.json`.
        tensors: the tensors by name: "d2t" in int64, "t2d" in bool, and the others in float32.
        fingerprint: fingerprint of the target, if this package wrote the folder.
        card: the record of the head's training, as plain values, if this package wrote the folder.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    fingerprint: TargetFingerprint | None = None
    card: Mapping[str, Any] | None = None

    def rewired(self, **changes: Any) -> Eagle3Files:
        """Return the same weights with changed values in the config."""
        return replace(self, config={**self.config, **changes})

    @property
    def tokens(self) -> Int[Tensor, " D"]:
        """The D token ids of the target's vocabulary that the head can propose."""
        count = self.config.get("draft_vocab_size") or self.config["transformer_layer_config"]["vocab_size"]
        differences = self.tensors.get("d2t")
        places = torch.arange(count)
        return places if differences is None else places + differences

    def layers(self, total: int) -> tuple[int, ...]:
        """Return the target's layers whose outputs the head reads; see `Eagle3Shape.layers`.

        Args:
            total: number of the target's layers.
        """
        return tuple(number - 1 for number in self.config.get(IDS) or default_ids(total))


def default_ids(total: int) -> list[int]:
    """Return the default ids of the layers that a head reads, counted from 1: near both ends and in the middle.

    Args:
        total: number of the target's layers.
    """
    return [2, total // 2, total - 3]


def read_eagle3(folder: Path) -> Eagle3Files:
    """Read the folder of a head.

    Raises:
        ModelFileError: the folder holds no EAGLE-3 head, or its files are damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        original = "speculators_model_type" not in config
        if original:
            config = _from_original(folder, config)
        if config["speculators_model_type"] != "eagle3":
            raise ModelFileError(
                f"{folder} holds a draft of the type {config['speculators_model_type']!r}: name an EAGLE-3 head"
            )
        tensors = _read_tensors(folder)
        if original:
            tensors = {name.removeprefix("model.").replace("midlayer.", "layers.0."): x for name, x in tensors.items()}
        fingerprint, card = _read_own(folder / OWN)
        count = config.get("draft_vocab_size")
        if "d2t" in tensors and len(tensors["d2t"]) != count:
            raise ModelFileError(f"d2t of the draft head {folder} is for {len(tensors['d2t'])} tokens, not for {count}")
    except ModelFileError:
        raise
    except Exception as error:  # json, safetensors and pickle raise different errors
        raise ModelFileError(f"cannot read the draft head {folder}: {first_line(error)}") from error
    return Eagle3Files(folder, config, tensors, fingerprint, card)


def make_eagle3(files: Eagle3Files, layers: int, hidden: int) -> Eagle3Head:
    """Return the head of a folder, in float32 on the CPU.

    Args:
        files: contents of the folder.
        layers: number of the target's layers.
        hidden: width of the target's hidden states.

    Raises:
        ModelFileError: the config and the tensors do not fit together.
        UnsupportedModelError: the decoder layers are not those of Llama or Qwen3 with full attention.
    """
    config, tensors = files.config, dict(files.tensors)
    for mapping in ("d2t", "t2d"):
        tensors.pop(mapping, None)
    try:
        shape = Eagle3Shape(
            decoder=decoder_config(files),
            layers=files.layers(layers),
            target_hidden=config.get("target_hidden_size") or hidden,
            own_embeddings="embed_tokens.weight" in tensors,
            own_output="lm_head.weight" in tensors,
            **{flag: bool(config.get(flag)) for flag in FLAGS},
        )
        head = Eagle3Head(shape, files.tokens)
        missing, unexpected = head.load_state_dict(tensors, strict=False)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelFileError(f"the draft head {files.folder} does not fit its {CONFIG}: {reason}") from error
    if missing or unexpected:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing)
        parts += [f"has {', '.join(unexpected)} besides"] * bool(unexpected)
        raise ModelFileError(f"the draft head {files.folder} does not fit its {CONFIG}: it {' and '.join(parts)}")
    return head


def check_tokens(files: Eagle3Files) -> None:
    """Raise ModelFileError if a head's maps between the two vocabularies disagree, or a map names a token twice."""
    tokens, proposed = files.tokens, files.tensors.get("t2d")
    if len(tokens.unique()) < len(tokens):
        raise ModelFileError(f"d2t of the draft head {files.folder} names a token twice: the file is damaged")
    if proposed is not None and not torch.equal(proposed.nonzero()[:, 0], tokens.sort().values):
        raise ModelFileError(
            f"d2t and t2d of the draft head {files.folder} name different tokens: d2t must hold the differences between"
            f" the target's ids and the head's; check the head with `specdecode doctor --head {files.folder}`"
        )


def write_eagle3(
    folder: Path,
    head: Eagle3Head,
    rows: Float[Tensor, "D H"] | None,
    target: TargetFingerprint,
    architectures: Sequence[str],
    card: Mapping[str, Any],
    page: str,
) -> None:
    """Write a head to a folder in the format of `speculators`, in float16.

    Args:
        folder: the folder, which is created if it does not exist.
        head: the head to store.
        rows: rows of the target's output embedding for the head's tokens. A head that shares them needs them in other
            engines. Without them the folder is smaller, but only this package can use the head.
        target: fingerprint of the head's target.
        architectures: `architectures` of the target's config.
        card: the record of the head's training, as plain values.
        page: the model card in Markdown, for people.
    """
    tokens, count = head.tokens.cpu(), len(head.tokens)
    tensors = dict(head.state_dict())
    if rows is not None:
        tensors["lm_head.weight"] = rows
    stored = {name: value.half().contiguous().cpu() for name, value in tensors.items()}
    if not torch.equal(tokens, torch.arange(target.vocab_size)):
        stored["d2t"] = tokens - torch.arange(count)
        stored["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, tokens, True)
    # Other engines look for the target on the hub.
    verifier_name = HUB_ID if target.target == EMBEDDED else target.target
    config = {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": count,
        "dtype": "float16",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": _PROPOSED_TOKENS}],
            "verifier": {"architectures": list(architectures), "name_or_path": verifier_name},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": _FORMAT_VERSION,
        "tie_word_embeddings": False,
        **describe(head.shape),
    }
    fingerprint = {
        **asdict(target),
        "tokens": target.tokens.tolist(),
        # Enough digits to tell targets apart.
        "rows": [[float(f"{x:.4g}") for x in row] for row in target.rows.tolist()],
    }
    write_whole(folder / WEIGHTS, save(stored, {"format": "pt"}))
    write_whole(folder / OWN, json.dumps({"fingerprint": fingerprint, "card": dict(card)}) + "\n")
    write_whole(folder / PAGE, page)
    # Written last, since a folder without the config counts as incomplete.
    write_whole(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def describe(shape: Eagle3Shape) -> dict[str, Any]:
    """Return a head's sizes and wiring as plain values, with the keys of the `speculators` format."""
    own_width = shape.target_hidden == shape.hidden
    decoder = shape.decoder.to_diff_dict()
    return {
        IDS: [layer + 1 for layer in shape.layers],
        **{flag: getattr(shape, flag) for flag in FLAGS},
        "target_hidden_size": None if own_width else shape.target_hidden,
        # Without the version of the library, which would make two equal heads differ.
        "transformer_layer_config": {key: decoder[key] for key in sorted(decoder) if key != "transformers_version"},
    }


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelFileError(f"{folder} holds no weights: {' or '.join(_WEIGHT_FILES)} is expected there")
    if file.name == WEIGHTS:
        stored = load_file(file)
    else:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    return {name: x.float() if x.is_floating_point() else x for name, x in stored.items()}


def _from_original(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of original EAGLE-3 files with the keys of the `speculators` format. In original files, the
    sizes of the decoder layers are at the top level."""
    if "draft_vocab_size" not in config and "Eagle3" not in "".join(config.get("architectures") or ()):
        raise ModelFileError(
            f"{folder} holds no EAGLE-3 head: its {CONFIG} has neither a `speculators_model_type` nor a"
            " `draft_vocab_size`"
        )
    own = config.get("eagle_config") or {}
    named = {key: own.get(key, config.get(key)) for key in (*FLAGS, IDS, "target_hidden_size")}
    return {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config.get("draft_vocab_size"),
        "transformer_layer_config": {**config, "model_type": config.get("model_type", "llama")},
        **named,
    }


def decoder_config(files: Eagle3Files) -> LlamaConfig | Qwen3Config:
    """Return the config of a head's decoder layers.

    Raises:
        UnsupportedModelError: the decoder layers are of a kind that cannot be read.
        ValueError: a size has the wrong type, or the sizes do not fit together.
    """
    given = dict(files.config["transformer_layer_config"])
    kind = given.pop("model_type", "llama")
    if kind not in _DECODERS:
        raise UnsupportedModelError(
            f"the draft head {files.folder} has decoder layers of {kind}: only {' and '.join(_DECODERS)} are supported"
        )
    try:
        decoder = _DECODERS[kind](**given)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    other = [part for part in (getattr(decoder, "layer_types", None) or []) if part != "full_attention"]
    partial = (decoder.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0
    if other or partial or decoder.hidden_act != "silu":
        reason = other[0] if other else "partial rotary positions" if partial else decoder.hidden_act
        raise UnsupportedModelError(
            f"the draft head {files.folder} has decoder layers with {reason}: only full attention, whole rotary"
            " positions and silu are supported"
        )
    return decoder


def _read_own(file: Path) -> tuple[TargetFingerprint | None, dict[str, Any] | None]:
    """Return the fingerprint and the card that this package stored with a head; (None, None) without its file."""
    if not file.is_file():
        return None, None
    stored = json.loads(file.read_text(encoding="utf-8"))
    values = stored["fingerprint"] | {key: torch.tensor(stored["fingerprint"][key]) for key in ("tokens", "rows")}
    return TargetFingerprint(**values), stored["card"]
