"""What tokenizers leave open: who may use one, how long a text may be, what pads it, and what stands where none is."""

from __future__ import annotations

import logging
import threading
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

LONGEST_TEXT = 512  # tokens; the limit of most encoders, for tokenizers that state none
NO_LIMIT = 10**6  # what tokenizers state that do not know: 10 to the power of 30, or some other very large number
SIGLIP_TEXT = 64  # tokens, of every text: SigLIP's encoders were trained on padding that they see
_TURN = threading.Lock()


def tokenize(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    """`tokenizer(texts, **options)`, one thread at a time: padding and truncation are set on the tokenizer itself."""
    with _TURN:
        return tokenizer(texts, **options)


def has_fixed_length(tokenizer: Any) -> bool:
    """Whether all texts are padded to one length and the padding is seen: SigLIP's tokenizers, and others by its model.

    >>> from transformers import Siglip2Tokenizer
    >>> has_fixed_length(Siglip2Tokenizer())
    True
    """
    return getattr(tokenizer, "fixed_length", type(tokenizer).__name__.startswith("Siglip"))


def longest_text(tokenizer: Any) -> int:
    """The tokens that are read of a text."""
    unstated = SIGLIP_TEXT if has_fixed_length(tokenizer) else LONGEST_TEXT
    return tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else unstated


def give_padding(modality: str, tokenizer: Any) -> None:
    """Its end token to a tokenizer without a padding token (Llama, Mistral): padding is never read."""
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer given for {modality!r} has neither a padding nor an end token: set its pad_token to one of "
            "its tokens"
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.warning(
        "the tokenizer for %s has no padding token: its end token %r pads, which no encoder reads; set pad_token to "
        "choose another",
        modality,
        tokenizer.eos_token,
    )


def show_a_token(inputs: dict[str, Tensor], absent: Tensor, tokenizer: Any) -> None:
    """Make absent rows padding behind one visible token: attention over nothing gives NaN in some kernels."""
    special = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    inputs["input_ids"][absent] = tokenizer.pad_token_id
    inputs["input_ids"][absent, 0] = next(token for token in special if token is not None)
    if "attention_mask" in inputs:
        inputs["attention_mask"][absent, 0] = 1
