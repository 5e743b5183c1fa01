"""Which tokens are no padding, as far as a batch says it."""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import IGNORED, entry
from lrp_prune.models.calling import labels_of
from lrp_prune.models.kinds import SEQUENCE_CLASSIFIER, is_decoder_type
from lrp_prune.models.profile import profile_of


def attended_labels(model: nn.Module, batch: Any) -> Tensor | None:
    """Which positions of the logits ``[samples, tokens]`` are no padding; None if the batch does not say.

    Of an encoder-decoder the attention mask is about the encoder's tokens; the decoder has a mask of its own, or its labels.
    """
    if not profile_of(model).encoder_decoder:
        return _mask(batch, "attention_mask") if _tokens(batch) is not None else None
    mask, labels = _mask(batch, "decoder_attention_mask"), labels_of(model, batch)
    if mask is not None:
        return mask
    return labels != IGNORED if labels is not None and labels.dim() == 2 and not labels.is_floating_point() else None


def counted_tokens(model: nn.Module, batch: Any, skip_first: int) -> Tensor | None:
    """Which tokens ``[samples, tokens]`` enter statistics: attended ones, without each sample's first; None for all.

    Of an encoder-decoder only the encoder's are left out, and none where its decoder has as many, since activations are told
    apart by their shape.
    """
    profile, attended, ids = profile_of(model), _mask(batch, "attention_mask"), _tokens(batch)
    if attended is not None and profile.encoder_decoder:
        decoded = entry(batch, "decoder_input_ids")
        decoded = labels_of(model, batch) if decoded is None else decoded
        if decoded is None or decoded.shape == attended.shape:
            attended = None
    skipped = skip_first if profile.causal and ids is not None else 0
    if attended is None:
        if not skipped or ids is None:
            return None
        attended = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    counted = attended & (attended.long().cumsum(-1) > skipped)
    return None if bool(counted.all()) else counted


def check_read_tokens(model: nn.Module, batch: Any) -> None:
    """Refuse a batch of which a classifier on top of a decoder would read padding: the logits would be about nothing.

    Such a model reads the last token that is not its ``pad_token_id``, on whichever side the padding is.

    Raises:
        ValueError: if that token is padding by the attention mask.
    """
    profile, mask, ids = profile_of(model), _mask(batch, "attention_mask"), entry(batch, "input_ids")
    if profile.inner is None or profile.kind != SEQUENCE_CLASSIFIER or mask is None or not isinstance(ids, Tensor):
        return
    if profile.encoder_decoder or not is_decoder_type(profile.config.model_type) or mask.shape != ids.shape:
        return
    pad = getattr(profile.config, "pad_token_id", None)
    read = torch.full_like(ids[:, 0], ids.shape[1] - 1)
    if pad is not None:
        read = (torch.arange(ids.shape[1], device=ids.device) * (ids != pad)).argmax(-1)
    wrong = ~mask.gather(1, read[:, None])[:, 0]
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0])
        token = f"the last token that is not pad_token_id={pad}" if pad is not None else "the last token"
        raise ValueError(
            f"{profile.name} reads {token}, which is padding in sample {sample} by its attention_mask: set "
            f"config.pad_token_id to the token that pads ({int(ids[sample, read[sample]])})"
        )


def _mask(batch: Any, name: str) -> Tensor | None:
    mask = entry(batch, name)
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _tokens(batch: Any) -> Tensor | None:
    """The tokens' ids ``[samples, tokens]``, or their embeddings."""
    ids, embeddings = entry(batch, "input_ids"), entry(batch, "inputs_embeds")
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids
    return embeddings if isinstance(embeddings, Tensor) and embeddings.dim() == 3 else None
