"""A tokenizer for a model that comes without one: a byte is a token, and every other id has a name of its own.

Used by `baton/` for random weights (`load: dummy`), where text only has to be something. Clients that measure send
token ids; text of N bytes is N tokens, and each generated token shows as some text.
"""

from datetime import datetime

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from router.chat_template import ChatTemplates
from router.tokenizer import Tokenizer

NUM_BYTES = 256


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Ids below 256 are bytes; id 300 shows as " t300". It has no special tokens and no chat template."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\u0120"  # as the byte-level alphabet writes it
    names += [f"{space}t{token_id}" for token_id in range(NUM_BYTES, vocab_size)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, ChatTemplates({}, {}, datetime.now))
