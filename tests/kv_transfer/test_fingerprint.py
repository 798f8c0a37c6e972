from dataclasses import replace

from engine.kv.layout import KvLayout
from kv_transfer.fingerprint import difference, fingerprint

LAYOUT = KvLayout(4, 8, 64, 16, "bfloat16")
OURS = fingerprint("abc", [LAYOUT], b"secret")


def test_equal_workers_agree_whatever_their_block_size_and_split() -> None:
    halves = [replace(LAYOUT, num_layers=2, first_layer=first, block_size=32) for first in (0, 2)]
    assert difference(OURS, fingerprint("abc", halves, b"secret")) == ""
    heads = [replace(LAYOUT, num_kv_heads=4, first_kv_head=first) for first in (4, 0)]
    assert difference(OURS, fingerprint("abc", heads, b"secret")) == ""


def test_every_mismatch_is_named() -> None:
    for other, name in (
        (fingerprint("abd", [LAYOUT], b"secret"), "model"),
        (fingerprint("abc", [replace(LAYOUT, dtype="float16")], b"secret"), "dtype"),
        (fingerprint("abc", [replace(LAYOUT, num_layers=5)], b"secret"), "layers"),
        (fingerprint("abc", [replace(LAYOUT, num_kv_heads=4)], b"secret"), "kv_heads"),
        (fingerprint("abc", [replace(LAYOUT, head_dim=128)], b"secret"), "head_dim"),
        (fingerprint("abc", [LAYOUT], b"other"), "hash_seed"),
    ):
        text = difference(OURS, other)
        assert text.startswith(f"{name}: "), text
        assert ";" not in text, "one field differs"


def test_the_secret_cannot_be_read() -> None:
    assert "secret" not in OURS


def test_garbage_is_a_difference() -> None:
    for garbage in ("", "=", "x" * 5000, OURS + " more=1", "model= model"):
        assert difference(OURS, garbage)
