"""Decoder and prompt encoder of one SAM size, SAM's weights in them, and which of their parameters train."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.desam.blocks import ResSE
from nnunet_dgplugins.methods.desam.decoder import DeSAMDecoder
from nnunet_dgplugins.methods.sam_parts import DecoderSizes

DECODER_PREFIX = "mask_decoder."
PROMPT_PREFIX = "prompt_encoder."
MODES = ("points", "box")

# reached by no gradient whatever the prompt; the whole-box mode has no IoU term and so never trains the IoU side
_NEVER = ("output_upscaling.", "output_hypernetworks_mlps.", "pimm.seg_outputs.0.")
_NEVER_WITH_BOX = ("iou_prediction_head.", "transformer.final_attn_token_to_image.", "transformer.norm_final_attn.")


def build_decoder(model: DecoderSizes, num_classes: int = 1) -> DeSAMDecoder:
    """Return the decoder that fits a SAM model, for K = ``num_classes`` foreground classes.

    The released code builds every decoder for vit_h's 1280 channels, so vit_l and vit_b fail there.
    """
    return DeSAMDecoder(
        encoder_channels=model.embed_dim,
        width=model.prompt_dim,
        mlp_dim=model.decoder_mlp_dim,
        num_heads=model.decoder_num_heads,
        iou_head_hidden=model.iou_head_hidden,
        num_classes=num_classes,
    )


def load_decoder(decoder: DeSAMDecoder, state: Mapping[str, Tensor]) -> list[str]:
    """Copy SAM's or an official DeSAM's ``mask_decoder.*`` tensors into the decoder.

    SAM's file lacks the mask module, which keeps its initial values. With more than one class the mask's last layer
    keeps them too, and an IoU head with more than four columns takes the file's columns first.

    Returns:
        Names (without prefix) that the file did not fill completely, empty for an official DeSAM of one class.

    Raises:
        UserError: a tensor's shape belongs to another SAM size, or SAM's part is incomplete.
    """
    own = decoder.state_dict()
    given = {key.removeprefix(DECODER_PREFIX): value for key, value in state.items() if key.startswith(DECODER_PREFIX)}
    unknown = sorted(set(given) - set(own))
    missing = sorted(key for key in set(own) - set(given) if not key.startswith("pimm."))
    if unknown or missing:
        raise UserError(
            f"The weights do not fit DeSAM's decoder: {len(missing)} tensors missing (such as "
            f"{missing[:1] or 'none'}), {len(unknown)} unknown (such as {unknown[:1] or 'none'})."
        )
    kept = [key for key in own if key not in given]
    for key, value in given.items():
        if value.shape == own[key].shape:
            own[key] = value
        elif _per_class(key) and value.shape[1:] == own[key].shape[1:]:
            kept.append(key)
            if key.startswith("iou_prediction_head."):
                own[key][: len(value)] = value[: len(own[key])]
        else:
            raise UserError(
                f"{DECODER_PREFIX}{key} has shape {tuple(value.shape)} in the file, {tuple(own[key].shape)} here: "
                "the weights belong to another SAM size. Choose the matching `sam=`."
            )
    decoder.load_state_dict(own, strict=True)
    return kept


def untrained_names(decoder: DeSAMDecoder, mode: str) -> list[str]:
    """Return the names of parameters that no gradient reaches in ``mode`` (``points`` or ``box``).

    Beside SAM's own mask branch these are the shortcuts of blocks whose shortcut is the identity.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {MODES}, got {mode!r}.")
    prefixes = _NEVER + (_NEVER_WITH_BOX if mode == "box" else ())
    identities = tuple(
        f"{name}.conv3." for name, module in decoder.named_modules() if isinstance(module, ResSE) and module.identity
    )
    return [name for name, _ in decoder.named_parameters() if name.startswith(prefixes + identities)]


def trainable_parameters(decoder: DeSAMDecoder, mode: str) -> list[nn.Parameter]:
    """Freeze what is never trained in ``mode`` and return the rest, for the optimiser and DDP."""
    untrained = set(untrained_names(decoder, mode))
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name not in untrained)
    return [parameter for parameter in decoder.parameters() if parameter.requires_grad]


def _per_class(key: str) -> bool:
    return key.startswith("pimm.seg_outputs.") or key.startswith("iou_prediction_head.layers.2.")
