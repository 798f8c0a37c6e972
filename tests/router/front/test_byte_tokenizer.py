import random

import pytest

from engine.errors import InvalidRequest
from router.byte_tokenizer import byte_tokenizer


def test_any_text_comes_back_with_a_token_for_each_byte() -> None:
    tokenizer = byte_tokenizer(1000)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(1, 128), rng.randrange(128, 0xD800)])) for _ in range(20))
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert max(ids) < 256
        assert tokenizer.decode(ids) == text


def test_every_token_that_a_model_may_sample_shows_as_text() -> None:
    tokenizer = byte_tokenizer(1000)
    assert tokenizer.vocab_size == 1000
    decoder = tokenizer.decoder(skip_special_tokens=True)
    assert [decoder.push([token_id]) for token_id in (300, 999)] == [" t300", " t999"]
    assert len({tokenizer.token_string(token_id) for token_id in range(1000)}) == 1000


def test_a_conversation_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        byte_tokenizer(1000).chat.render([{"role": "user", "content": "Hello"}])
