"""The checkpoint's tokenizer: text to ids and back, from tokenizer.json and tokenizer_config.json alone.

Loaded once by `baton/` and shared by every request; immutable after loading, and safe to use from threads. Ids and
chat prompts equal those of `transformers`; no code that comes with a checkpoint is run.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from router.chat_template import ChatTemplates, load_chat_templates
from router.detokenizer import (
    ByteLevelDecoder,
    ByteLevelPieces,
    Decoder,
    SentencePieceDecoder,
    SentencePieces,
    parse_rules,
)
from router.encoder import make_encoder

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """`chat` renders conversations; `vocab_size` counts the tokens that have a string.

    `cut_tokens` are those (with their ids) behind which a text can be cut, and its parts be encoded by themselves
    without special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, chat: ChatTemplates) -> None:
        self.chat = chat
        self._backend = backend
        self._encode = make_encoder(backend)
        self.vocab_size: int = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        described = json.loads(backend.to_str())
        self.cut_tokens = _cut_tokens(described)
        self._rules = parse_rules(described["decoder"])
        self._pieces = {skip: self._make_pieces(skip) for skip in (False, True)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. With special tokens the beginning of a text is marked as the model expects it."""
        return self._encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def decoder(self, *, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> Decoder:
        pieces = self._pieces[skip_special_tokens]
        if isinstance(pieces, ByteLevelPieces):
            return ByteLevelDecoder(pieces)
        begins_text = not any(pieces[token_id] for token_id in prompt)
        return SentencePieceDecoder(pieces, self._rules.num_stripped if begins_text else 0)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, special tokens shown. Not always whole characters."""
        piece = self._pieces[False][token_id]
        if isinstance(piece, bytes):
            return piece
        return piece.encode() if isinstance(piece, str) else bytes([piece])

    def token_string(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it."""
        string: str | None = self._backend.id_to_token(token_id)
        return string

    def _make_pieces(self, skip_special_tokens: bool) -> ByteLevelPieces | SentencePieces:
        def shown(token_id: int) -> str | None:
            return None if token_id in self._special_ids else self.token_string(token_id)

        token_string = shown if skip_special_tokens else self.token_string
        if self._rules.space_marker is None:
            return ByteLevelPieces(token_string)
        return SentencePieces(token_string, self._rules)


def load_tokenizer(path: Path, *, now: Callable[[], datetime] = datetime.now) -> Tokenizer:
    """Load from a checkpoint's directory. Raises ValueError when there is no tokenizer that can be used."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{path} has no tokenizer.json (only fast tokenizers are supported)")
    settings = _read_settings(path / "tokenizer_config.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise than Exception
        raise ValueError(f"{file} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    special_tokens = {
        name: _content(settings[name]) for name in _SPECIAL_TOKENS if settings.get(name) not in (None, "", {})
    }
    _add_tokens(backend, settings, special_tokens)
    chat = ChatTemplates(load_chat_templates(path, settings), special_tokens, now)
    return Tokenizer(backend, chat)


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _add_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Tokens that only tokenizer_config.json knows, in the order in which `transformers` adds them."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, entry in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        given = {flag: entry[flag] for flag in flags if flag in entry}
        backend.add_tokens([tokenizers.AddedToken(entry["content"], **given)])
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    names = [*special_tokens.values(), *(_content(token) for token in extra if isinstance(extra, list))]
    backend.add_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(names)])


def _cut_tokens(described: dict[str, Any]) -> dict[str, int]:
    """Special tokens that are always found whole, in a tokenizer that treats the parts between them alike wherever
    they stand: without a space that is put before the text's beginning. Normalizers see each part by itself."""
    pre, normalizer = described["pre_tokenizer"] or {}, described["normalizer"]
    steps = pre.get("pretokenizers", [pre])
    forms = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if any(form["type"] not in ("NFC", "NFD", "NFKC", "NFKD") for form in forms) or any(
        step.get("type") not in ("ByteLevel", "Split", "Digits") or step.get("add_prefix_space") for step in steps
    ):
        return {}
    added = {token["content"]: token for token in described["added_tokens"]}

    def always_found(cut: str) -> bool:
        others = [content for content in added if content != cut]
        # What begins earlier wins: nothing may reach into the token from the left, nor contain it.
        overlaps = any(text.endswith(cut[:size]) for text in added for size in range(1, len(cut)))
        return not overlaps and not any(cut in other for other in others)

    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return {
        content: token["id"]
        for content, token in added.items()
        if token["special"]
        and not any(token[flag] for flag in flags)
        and not (content[0].isspace() or content[-1].isalnum() or content[-1] == "_")
        and always_found(content)
    }
