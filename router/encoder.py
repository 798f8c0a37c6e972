"""From text to token ids, by the fastest encoder that gives the ids of `tokenizers`.

`fastokens` takes a fifth of the time where it is installed and knows the tokenizer's kind; `tokenizers` does all else.
Used by `router.tokenizer`; safe to use from threads.
"""

import logging
from collections.abc import Callable

import tokenizers

try:
    import fastokens
except ImportError:  # there is not a wheel for every machine
    fastokens = None

Encode = Callable[[str, bool], list[int]]  # a text, and whether special tokens are to be added -> ids

log = logging.getLogger(__name__)

_PROBES = (  # a tokenizer is left to `tokenizers` when the two differ on one of these
    "",
    "Hello,  world's END!\r\n\tdef f(x_1): return 12345 + 6.7 # \u00a0 Don'T\n\n  ",
    "Grüße, naïve e\u0301 ﬁ 你好。안녕 Привет مرحبا 🙂👩\u200d👧½٣２",
    " " * 40 + "a" * 200 + "-" * 50 + "\n" * 20 + "<|x",
)


def make_encoder(backend: tokenizers.Tokenizer) -> Encode:
    """The encoder of a tokenizer, as it stands now."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        # The only call that does not map each token back to its characters, which takes a quarter longer.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    return _faster(backend, encode) or encode


def _faster(backend: tokenizers.Tokenizer, encode: Encode) -> Encode | None:
    if fastokens is None:
        return None
    try:
        fast = fastokens.Tokenizer.from_json_str(backend.to_str())
    except ValueError as error:  # a kind that it does not know
        log.info("the tokenizer is left to the slower encoder: %s", error)
        return None

    def encode_fast(text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = fast.encode(text, add_special_tokens=add_special_tokens).ids
        except ValueError:  # its patterns' matching is bounded
            return encode(text, add_special_tokens)
        return ids

    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    probes = (*_PROBES, " a ".join(added), "".join(added))
    if any(encode_fast(probe, special) != encode(probe, special) for probe in probes for special in (True, False)):
        log.warning("the faster encoder gives other ids for this tokenizer, and is not used")
        return None
    return encode_fast
