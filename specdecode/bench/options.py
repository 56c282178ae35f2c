"""The options of a session, resolved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specdecode.backends import check as check_backend
from specdecode.bench.gate.baselines import find
from specdecode.bench.presets import Preset, arms_at, preset
from specdecode.bench.runs.file import read
from specdecode.bench.runs.names import FLAGS, drafters
from specdecode.bench.runs.records import Identity, RunFile
from specdecode.heads.bound import shipped_head
from specdecode.models.embedded import EMBEDDED, EMBEDDED_DRAFT
from specdecode.models.lm import LM
from specdecode.models.loading import TINY, choose_device, choose_dtype, load
from specdecode.support.environment import hardware

_DRAFTS = {EMBEDDED: EMBEDDED_DRAFT, TINY: "layers:0-1"}
"""The drafts of targets that have one of their own."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's, as `pytest --help` tells them; None where the preset or the hardware decides."""

    root: Path
    preset: str
    target: str
    draft: str | None
    device: str | None
    dtype: str | None
    max_new_tokens: int | None
    prompts: str | None
    repeats: int | None
    resume: bool
    tolerance: float | None
    baseline: str | None
    against: str | None
    backend: str
    tiny: bool
    eos: bool

    @property
    def identity(self) -> Identity:
        """What makes runs comparable; known before a model is loaded."""
        device = choose_device(self.device)
        target = TINY if self.tiny and self.target == EMBEDDED else self.target
        return Identity(
            hardware=hardware(device),
            target=target,
            draft=self.draft or _DRAFTS.get(target, ""),
            dtype=str(choose_dtype(self.dtype, device)).removeprefix("torch."),
            preset=".".join([Path(self.preset).stem, *(flag for flag in FLAGS if getattr(self, flag))]),
        )

    @property
    def experiment(self) -> Preset:
        """The preset, with what the command line says otherwise, and without heads that the target does not have."""
        chosen = preset(self.preset).tiny() if self.tiny else preset(self.preset)
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}: each prompt is measured once at least")
        length = chosen.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        target = self.identity.target
        # A head is trained for one target: another one is measured without, unless the preset names its file.
        headless = shipped_head(target) is None and not target.startswith("shape:")
        needing = {arm for arm, of in chosen.arms.items() if "head" in drafters(of) and "head" not in of}
        return Preset(
            arms={arm: entry for arm, entry in chosen.arms.items() if not (headless and arm in needing)},
            prompts=self.prompts or chosen.prompts,
            max_new_tokens=length,
            repeats=chosen.repeats if self.repeats is None else self.repeats,
            lengths=[shorter for shorter in chosen.lengths if shorter < length],
        )

    @property
    def known_arms(self) -> list[str]:
        """The preset's arms, and those of what it is compared with: one that the run lacks must not pass in silence."""
        if self.against is not None:
            theirs = arms_at(self.root, self.against, self.preset)
        else:
            theirs = list(old.arms) if (old := baseline(self)) else []
        return list(dict.fromkeys([*self.experiment.arms, *theirs]))

    @property
    def journal(self) -> Path:
        """Where finished blocks are kept until the run is complete."""
        identity = self.identity
        return self.root / "results" / f"{identity.hardware}-{identity.file.stem}.blocks.jsonl"

    def load(self, name: str, target: LM | None = None) -> LM:
        """A model on the chosen device, in the chosen type; each arm sees for itself whether a draft can serve it, and
        on what backend it runs."""
        return load(name, device=self.device, dtype=self.dtype, target=target, same_vocabulary=False, backend="eager")

    def models(self) -> tuple[LM, LM | None]:
        """The target, and the draft if there is one, once the backend is known to be one."""
        check_backend(self.backend, choose_device(self.device))
        target = self.load(self.identity.target)
        return target, self.load(self.identity.draft, target) if self.identity.draft else None


def baseline(options: Options) -> RunFile | None:
    """The baseline to judge by, if there is one."""
    if options.against is not None:
        return None
    if options.baseline:
        return read(Path(options.baseline))
    return find(options.identity, options.root / "baselines")
