"""The models of a session, loaded once for all of its arms."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdecode.bench.arms.arm import Arm, make_arm
from specdecode.bench.arms.callables import ModelNames
from specdecode.bench.servers.server import Servers
from specdecode.core.errors import ModelFileError
from specdecode.models.chat import Codec, TextEncoder
from specdecode.models.lm import LM
from specdecode.models.loading import is_missing, load, load_encoder, source_of

LOG_FOLDER = "SPECDECODE_SERVER_LOGS"
"""Environment variable: the folder for the output of servers, for a worker whose working folder will be removed."""

SERVER_LOGS = Path("results") / "servers"
"""The folder for the output of servers that the suite starts, below the working folder."""


@dataclass(frozen=True, slots=True)
class Models:
    """The models that the arms of a session decode with.

    Attributes:
        names: names of the models, their device and their data type.
        backend: backend of this package's arms that name none.
        target: the target on the backend "eager"; None if all arms are from code or servers, which load their own.
        draft: the draft model on the backend "eager"; None without one.
        encoder: encodes prompts as token ids.
        servers: the servers that arms name; None without any.
    """

    names: ModelNames
    backend: str
    target: LM | None
    draft: LM | None
    encoder: LM | TextEncoder
    servers: Servers | None

    def arm(
        self,
        name: str,
        entry: Mapping[str, Any],
        lengths: Sequence[int] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> Arm:
        """Build an arm from a preset's entry; see `make_arm`."""
        return make_arm(
            name,
            entry,
            self.target,
            self.draft,
            self.backend,
            lengths,
            stop_token_ids,
            model_names=self.names,
            servers=self.servers,
        )

    @property
    def chosen_backend(self) -> str:
        """The target's backend in words; "" without a target."""
        return "" if self.target is None else str(self.target.with_backend(self.backend).backend)

    @property
    def backend_name(self) -> str:
        """The name of the target's backend; "eager" without a target."""
        return "eager" if self.target is None else self.target.with_backend(self.backend).backend.name

    def __str__(self) -> str:
        if self.target is None:
            return f"{self.names.target}{f' with {self.names.draft}' if self.names.draft else ''}, which arms load"
        if self.draft is None:
            return self.target.name
        apart = f" on {self.draft.device}" if self.draft.device != self.target.device else ""
        return f"{self.target.name} with {self.draft.name}{apart}"


def load_models(
    names: ModelNames,
    backend: str,
    entries: Collection[Mapping[str, Any]],
    tp: str | None = None,
    device_map: str | None = None,
    draft_device: torch.device | None = None,
) -> Models:
    """Load the models that the arms of these entries need. Arms from code and servers need only the tokenizer.

    Args:
        names: names of the models.
        backend: backend of this package's arms that name none.
        entries: entries of the arms.
        tp: "auto" if the processes of torchrun share the target's weights.
        device_map: "auto" if the target's layers are spread over all GPUs.
        draft_device: device of the draft; None for the target's.

    Raises:
        ModelFileError, UnsupportedModelError: a model cannot be loaded.
        ValueError: one of the last three is given, but this package decodes none of the arms.
    """
    if all("call" in entry or "server" in entry for entry in entries):
        for option, value in (("--tp", tp), ("--device-map", device_map), ("--draft-device", draft_device)):
            if value is not None:
                raise ValueError(
                    f"{option} is for models that this package decodes, and all arms here are from code or servers"
                )
        served = any("server" in entry for entry in entries)
        # Code may know the target by a name that is no folder here.
        own_name = not served and is_missing(names.target)
        encoder = TextEncoder(names.target) if own_name else load_encoder(names.target)
        return Models(names, backend, None, None, encoder, _servers(names, encoder, entries))
    how: dict[str, Any] = {"dtype": names.dtype, "backend": "eager"}
    target = load(names.target, **how, device=None if device_map else names.device, tp=tp, device_map=device_map)
    draft = None
    if names.draft:
        # Each arm checks for itself whether it can use the draft.
        draft = load(names.draft, target=target, same_vocabulary=False, **how, device=draft_device or names.device)
    return Models(names, backend, target, draft, target, _servers(names, target, entries))


def _servers(names: ModelNames, encoder: LM | TextEncoder, entries: Collection[Mapping[str, Any]]) -> Servers | None:
    if not any("server" in entry for entry in entries):
        return None
    if encoder.tokenizer is None and not names.target.startswith("shape:"):
        raise ModelFileError(
            f"{names.target} has no tokenizer here, and a server would get bytes in place of its token ids: give the"
            " folder of the model that it serves, or an id that the hub has"
        )
    values = {key: name and source_of(name) for key, name in (("target", names.target), ("draft", names.draft))}
    return Servers(values, Codec(encoder.tokenizer), Path(os.environ.get(LOG_FOLDER, SERVER_LOGS)))
