"""Which ids stand for text, for whoever predicts or masks tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.tokenizer.specs import MASK
from transformerlm.tokenizer.tokenizer import Tokenizer


def ids_without_text(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """bool [vocab_size]: ids that are never written: special tokens but the end of text, and gaps in the ids."""
    result = tokenizer.byte_lengths() == 0
    result[tokenizer.eot_id] = False
    return result


def checked_mask_id(tokenizer: Tokenizer) -> int:
    """The id that stands for a masked token; `UserError` when it is missing, or is another token as well."""
    mask_id = tokenizer.mask_id
    for name, other in tokenizer.special_tokens.items():
        if other == mask_id and name != MASK:
            raise UserError(
                f"the tokenizer gives {MASK} and {name} the same id, {mask_id}; diffusion needs a mask of its own: "
                "train a tokenizer, or give it three different special tokens",
                EXIT_USAGE,
            )
    if tokenizer.byte_lengths()[mask_id]:
        raise UserError(
            f"the tokenizer's {MASK} has the id {mask_id}, which is the id of a piece of text; give it its own",
            EXIT_USAGE,
        )
    return mask_id
