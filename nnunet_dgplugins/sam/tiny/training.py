"""The training of ``vit_tiny``: resumable, the same bits from the same seed on one kind of machine.

Every step draws from streams of its own (seed, step), so a killed run goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import content_hash, replacing, write_bytes
from nnunet_dgplugins.sam.models import MODELS, SamModel
from nnunet_dgplugins.sam.seeded import seeded_weights
from nnunet_dgplugins.sam.tiny.anatomy import Drawing, draw, sample_anatomy
from nnunet_dgplugins.sam.tiny.objective import ContrastTerm, TinySam, promptable_loss
from nnunet_dgplugins.sam.tiny.rendering import render, sample_look
from nnunet_dgplugins.sam.weights import build_mask_decoder, build_parts

_CANDIDATES = 24  # targets looked at per map before some are chosen
_MIN_PIXELS = 12  # of a target in the mask the decoder writes
_WHOLE_SHARE = 0.3  # of the targets are structures of several tissues


@dataclass(frozen=True)
class Phase:
    """A part of the training at one canvas size.

    Args:
        canvas: side in pixels; smaller than the model's is quicker.
        maps: label maps per step, each rendered twice.
        targets: prompted masks per image.
        rounds: decodes per mask.
        steps: optimiser steps.
        noise: strongest noise of a look, see :func:`nnunet_dgplugins.sam.tiny.rendering.sample_look`.
        contrast: weight of the self-supervised term.
        projected: whether that term compares projections of the features, or the features as they are: stricter, since
            what a projection leaves out may go on depending on the scanner.
    """

    canvas: int
    maps: int
    targets: int
    rounds: int
    steps: int
    noise: float = 0.12
    contrast: float = 0.1
    projected: bool = True


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Args:
        seed: of start weights, maps, looks and prompts.
        maps: drawn label maps.
        phases: one after the other: the promptable task from coarse to fine.
        robust: phases behind them: much noise and strict contrast, for features that do not change with the scanner.
        lr: highest learning rate of AdamW in ``phases``.
        robust_lr: highest learning rate in ``robust``.
        warmup: steps until the highest rate is reached, in each of the two; then a cosine to 1 % of it.
        weight_decay: of AdamW, on everything but biases and norms.
        ema: decay of the averaged weights, which are the result.
        bfloat16: matrix products in bfloat16.
    """

    seed: int = 0
    maps: int = 3000
    phases: tuple[Phase, ...] = (Phase(64, 16, 6, 1, 1800), Phase(128, 8, 8, 1, 2000), Phase(256, 4, 4, 2, 1250))
    robust: tuple[Phase, ...] = (
        Phase(128, 8, 8, 1, 700, noise=0.3, contrast=0.5, projected=False),
        Phase(256, 4, 4, 2, 900, noise=0.3, contrast=0.5, projected=False),
    )
    lr: float = 2e-3
    robust_lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    ema: float = 0.998
    bfloat16: bool = True

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """Every phase in its order."""
        return (*self.phases, *self.robust)

    @property
    def steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.steps for phase in self.all_phases)

    def phase(self, step: int) -> Phase:
        """Return the phase of a step."""
        for phase in self.all_phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise ValueError(f"step {step} lies behind the last phase")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        first, highest = sum(phase.steps for phase in self.phases), self.lr
        steps = first
        if step >= first:
            step, steps, highest = step - first, self.steps - first, self.robust_lr
        if step < self.warmup:
            return highest * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, steps - self.warmup)
        return highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


def draw_map(seed: int, number: int, size: int) -> Drawing:
    """Return map ``number`` of a seed's endless list."""
    return draw(sample_anatomy(np.random.default_rng([seed, number])), size)


def build_network(model: SamModel, state: dict[str, torch.Tensor]) -> TinySam:
    """Return SAM's three parts with weights, ready to train."""
    parts = build_parts(model)
    network = TinySam(model, parts.image_encoder, parts.prompt_encoder, build_mask_decoder(parts))
    network.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return network


def align_attention(network: TinySam) -> None:
    """Let the decoder's cross-attention start where it asks: keys are projected as queries are.

    Prompt and image share one position code, so a prompt then looks at its own place from the first step; with
    unrelated projections nothing is found for twice as many steps.
    """
    transformer = network.mask_decoder.transformer
    cross = [
        attention
        for layer in transformer.layers
        for attention in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token)
    ]
    with torch.no_grad():
        for attention in (*cross, transformer.final_attn_token_to_image):
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.k_proj.bias.copy_(attention.q_proj.bias)


class Training:
    """One run of a recipe.

    The averaged weights follow every parameter; SAM's only buffer, the random frequencies, never changes.

    Args:
        recipe: what to do.
        drawings: the recipe's maps.
        device: where to train.
        model: sizes.
    """

    def __init__(
        self, recipe: Recipe, drawings: list[Drawing], device: torch.device | str = "cpu", model: SamModel | None = None
    ):
        self.recipe, self.drawings, self.device = recipe, drawings, torch.device(device)
        model = model or MODELS["vit_tiny"]
        self.network = build_network(model, seeded_weights(model, recipe.seed)).to(self.device)
        align_attention(self.network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.contrast = ContrastTerm([shape[0] for shape in model.feature_shapes]).to(self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        trained = [p for module in (self.network, self.contrast) for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.lr,
            betas=(0.9, 0.98),
        )
        self.trained = trained
        self.step = 0
        self.seconds = 0.0

    def run_step(self) -> dict[str, float]:
        """Do one step; return its losses and the mean IoU of the first answers.

        Raises:
            UserError: the gradient is not finite; weights and saved state stay as they were.
        """
        recipe, phase = self.recipe, self.recipe.phase(self.step)
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(step_seed(recipe.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
        tissue, parts, masks, image = self._batch(phase, generator)
        images = render(
            tissue.repeat_interleave(2, 0), sample_look(2 * phase.maps, generator, phase.noise).to(self.device)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            features = self.network.encode(images)
            prompted, iou = promptable_loss(self.network, features[-1], image, masks, phase.rounds, generator)
            alike = self.contrast(features, parts.repeat_interleave(2, 0), generator, phase.projected)
        loss = prompted + phase.contrast * alike
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not torch.nn.utils.clip_grad_norm_(self.trained, 1.0).isfinite():
            raise UserError(f"Step {self.step}: the gradient is not finite. Nothing of this step was kept.")
        self.optimizer.step()
        self.step += 1
        decay = min(recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        self.seconds += time.perf_counter() - started
        return {"prompt": float(prompted.detach()), "iou": float(iou), "contrast": float(alike.detach())}

    def _batch(
        self, phase: Phase, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tissues (M, S, S), parts (M, S, S), masks (N, m, m) and the image (N,) each mask belongs to."""
        chosen = torch.randint(len(self.drawings), (phase.maps,), generator=generator).tolist()
        planes = torch.from_numpy(np.stack([self.drawings[i].planes for i in chosen])).to(self.device)
        planes = apply_views(planes, sample_views(len(planes), generator), phase.canvas)
        masks, images = [], []
        for index, number in enumerate(chosen):
            for twin in range(2):
                found = self._targets(planes[index], self.drawings[number].targets, phase.targets, generator)
                masks.append(found)
                images += [2 * index + twin] * len(found)
        return planes[:, 0], planes[:, 1], torch.cat(masks), torch.tensor(images, device=self.device)

    def _targets(
        self, planes: torch.Tensor, targets: np.ndarray, count: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Return up to ``count`` masks (n, m, m) of one map, large enough to be seen."""
        order = torch.randperm(len(targets), generator=generator).numpy()
        shuffled = targets[order]
        whole, part = shuffled[shuffled[:, 0] == 2], shuffled[shuffled[:, 0] == 1]
        wanted = int((torch.rand(count, generator=generator) < _WHOLE_SHARE).sum())
        found = [self._visible(planes[2], whole[:_CANDIDATES, 1], wanted)]
        found.append(self._visible(planes[1], part[:_CANDIDATES, 1], count - len(found[0])))
        return torch.cat(found)

    def _visible(self, plane: torch.Tensor, ids: np.ndarray, wanted: int) -> torch.Tensor:
        side = 4 * plane.shape[-1] // self.network.model.patch_size
        same = (plane[None] == torch.from_numpy(ids).to(self.device)[:, None, None]).float()
        if not len(ids):
            return torch.zeros((0, side, side), dtype=torch.bool, device=self.device)
        masks = F.avg_pool2d(same[:, None], plane.shape[-1] // side)[:, 0] >= 0.5
        return masks[masks.flatten(1).sum(1) >= _MIN_PIXELS][:wanted]

    def state(self) -> dict[str, Any]:
        """Return everything a resume needs."""
        return {
            "recipe": content_hash(asdict(self.recipe)),
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "contrast": self.contrast.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def save(self, path: Path) -> None:
        """Write the state in one step."""
        with replacing(path) as temporary:
            torch.save(self.state(), temporary)

    def resume(self, path: Path) -> None:
        """Go on where a saved run stopped.

        Raises:
            UserError: the file is broken, or belongs to another recipe.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # every kind of broken file has its own class; the cause is kept
            raise UserError(f"{path} cannot be read. Remove it to start again.") from error
        if not isinstance(state, dict) or set(state) != set(self.state()):
            raise UserError(f"{path} is not a state of this training. Remove it to start again.")
        if state["recipe"] != content_hash(asdict(self.recipe)):
            raise UserError(f"{path} was made with another recipe. Give its options again, or another folder.")
        self.step, self.seconds = state["step"], state["seconds"]
        for name in ("network", "contrast", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def export(self, path: Path) -> None:
        """Write the averaged weights in half precision as safetensors, named as in SAM's files."""
        write_weights(self.average.state_dict(), path, f"recipe {content_hash(asdict(self.recipe))}, step {self.step}")


def write_weights(state: dict[str, torch.Tensor], path: Path, note: str) -> None:
    """Write weights in half precision, in one step.

    Raises:
        UserError: a value is beyond half precision.
    """
    from safetensors.torch import save

    half = {key: value.detach().cpu().half().contiguous() for key, value in state.items()}
    broken = [key for key, value in half.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path}: not written, not finite in half precision: {', '.join(broken[:5])}.")
    write_bytes(path, save(half, metadata={"note": note}))


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step's stream, so that a step needs nothing from those before."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def sample_views(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw how maps are turned, scaled, mirrored and shifted: (count, 2, 3) matrices for ``affine_grid``."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle = uniform(-math.pi, math.pi) * (torch.rand(count, generator=generator) < 0.5)
    zoom = uniform(math.log(0.65), math.log(1.25)).exp()  # below 1 enlarges
    stretch = uniform(-0.2, 0.2).exp()
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * zoom * stretch * mirror, -sin * zoom * stretch, uniform(-0.2, 0.2)], 1),
        torch.stack([sin * zoom / stretch * mirror, cos * zoom / stretch, uniform(-0.2, 0.2)], 1),
    ]
    return torch.stack(rows, 1)


def apply_views(planes: torch.Tensor, views: torch.Tensor, size: int) -> torch.Tensor:
    """Bring maps (B, 3, H, W) uint8 onto a canvas of ``size``, nearest neighbour; what comes in is air, no target."""
    grid = F.affine_grid(views, [len(planes), 1, size, size], align_corners=False).to(planes.device)
    moved = F.grid_sample(planes.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(torch.uint8)
