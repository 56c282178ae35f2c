"""A drafter with Medusa heads: one for each depth, all on the target's last hidden state (Cai et al. 2024)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

from specdecode.controllers.base import Limit
from specdecode.core.errors import ModelFileError, UnsupportedModelError, first_line
from specdecode.core.transfer import moved
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context
from specdecode.drafters.tree_shapes import BestFirstTree, Chain, Level, StaticTree, TreeShape, grow_tree
from specdecode.heads.bound import target_sizes
from specdecode.heads.loading import find_folder
from specdecode.models.lm import LM
from specdecode.models.variants import final_norm

_WEIGHTS = ("medusa_lm_head.safetensors", "model.safetensors", "medusa_lm_head.pt", "pytorch_model.bin")
_KEY = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.(?:linear\.)?(weight|bias)")


class MedusaHeads(nn.Module):
    """Medusa heads, which predict the tokens after the root.

    Each head reads the target's normalised hidden state at the token before the root. Head d, from 0, predicts the
    token at depth d + 1. It has residual blocks x + SiLU(Linear(x)), and an output layer.

    Args:
        target: the model whose hidden states the heads read.
        heads: number of heads.
        blocks: number of residual blocks of each head.

    Attributes:
        layers: the target's last layer, whose hidden states the heads read.

    Raises:
        UnsupportedModelError: the target has no final norm beside its layers.
    """

    def __init__(self, target: LM, heads: int, blocks: int) -> None:
        super().__init__()
        total, width = target_sizes(target)
        norm = final_norm(target.model)
        if norm is None:
            raise UnsupportedModelError(
                f"{target.name} has no final norm that can be found: draft without Medusa heads"
            )
        self.layers = (total - 1,)
        # In a tuple, so that PyTorch does not register the target's norm as a part of the heads.
        self._norm = (norm,)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(blocks)) for _ in range(heads))
        self.outputs = nn.ModuleList(nn.Linear(width, target.vocab_size, bias=False) for _ in range(heads))
        self.to(target.device, target.dtype).requires_grad_(False)

    def forward(self, state: Float[Tensor, "1 H"], depth: int) -> Float[Tensor, "1 V"]:
        """Return the logits of the token at a depth.

        Args:
            state: the target's hidden state after its last layer, before the final norm, at the token before the root.
            depth: depth of the token below the root, from 1.
        """
        x = moved(self._norm[0](state), state.device)  # the target's norm may lie elsewhere
        blocks = self.blocks[depth - 1]
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x = x + silu(block(x))
        logits: Tensor = self.outputs[depth - 1](x)
        return logits


class MedusaDrafter:
    """A drafter with Medusa heads.

    The distribution at a depth does not depend on the proposed tokens above it. So the probability of a path in a tree
    is a product of the probabilities that the heads give. In the first step it proposes nothing, since the target may
    not have read the whole prompt.

    Args:
        heads: the result of `load_medusa`.
        shape: shape of the trees: `Chain()`, `StaticTree(...)` or `BestFirstTree(...)`.

    Attributes:
        forwards: number of predictions by a head so far.
    """

    def __init__(self, heads: MedusaHeads, shape: TreeShape = Chain()) -> None:
        self.heads = heads
        self.shape = shape
        self.forwards = 0

    @property
    def layers(self) -> tuple[int, ...]:
        return self.heads.layers

    @torch.inference_mode()
    def propose(self, context: Context, limit: Limit) -> DraftTree:
        read, states = len(context.tokens) - 1, context.hidden_states
        if states is None or not 0 < read <= len(states):
            return DraftTree.empty()
        state = states[read - 1 : read]

        def distributions(depth: int, rows: int) -> Float[Tensor, "rows V"]:
            self.forwards += 1
            return context.sampling.probs(self.heads(state, depth)).expand(rows, -1)

        def deeper(level: Level, visible: Bool[Tensor, "rows read"], depth: int) -> Float[Tensor, "rows V"]:
            return distributions(depth + 1, len(level))

        within = Limit(min(limit.depth, len(self.heads.outputs)), limit.nodes)
        rng = None if context.sampling.greedy else context.rng
        grown, places = grow_tree(self.shape, distributions(1, 1), within, rng, deeper)
        return grown.subset(places)


def load_medusa(name: str, target: LM) -> MedusaHeads:
    """Load Medusa heads for a target.

    Args:
        name: a folder with `config.json` and the weights, or its id on the hub.
        target: the model that the heads were trained for.

    Returns:
        The heads, in the target's type and on its device.

    Raises:
        ModelFileError: there is no such folder, its files are damaged, or its heads are for another width or
            vocabulary.
        UnsupportedModelError: the target has no final norm beside its layers.
    """
    folder = find_folder(name, ("config.json", *_WEIGHTS), "name a folder with Medusa heads, or their id on the hub")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "medusa_num_heads" not in config:
            raise ModelFileError(f"{folder} holds no Medusa heads: its config.json has no 'medusa_num_heads'")
        count, blocks = int(config["medusa_num_heads"]), int(config.get("medusa_num_layers", 1))
        stored = _read(folder)
    except ModelFileError:
        raise
    except Exception as error:  # json, safetensors and pickle raise different errors
        raise ModelFileError(f"cannot read the Medusa heads {folder}: {first_line(error)}") from error
    heads = MedusaHeads(target, count, blocks)
    tensors = {}
    for name, value in stored.items():
        if (key := _KEY.fullmatch(name)) and int(key[1]) < count:
            part = "outputs" if int(key[2]) == blocks else "blocks"
            tensors[f"{part}.{key[1]}." + (f"{key[2]}." if part == "blocks" else "") + key[3]] = value
    wanted = {name: tuple(x.shape) for name, x in heads.state_dict().items()}
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if wanted != shapes:
        other = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))[0]
        raise ModelFileError(
            f"the Medusa heads {folder} do not fit {target.name}: {other} is {shapes.get(other)}, not"
            f" {wanted.get(other)}"
        )
    heads.load_state_dict(tensors)
    return heads


def _read(folder: Path) -> dict[str, Any]:
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"it holds no weights: {', '.join(_WEIGHTS)} are looked for")
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)


def examples(target: LM) -> dict[str, MedusaDrafter]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = MedusaHeads(target, 3, 1)
    return {
        "medusa-chain": MedusaDrafter(heads),
        "medusa-static-tree": MedusaDrafter(heads, StaticTree((3, 2, 1))),
        "medusa-best-first-tree": MedusaDrafter(heads, BestFirstTree(nodes=8, threshold=0.0)),
    }
