"""What two workers must have in common to exchange KV, as one readable string.

Made once for each worker by whoever composes it; compared at the first message of every link and for every offer.
Block size and the place of a rank are left out: the transfer plan converts those.
"""

from collections.abc import Sequence
from hashlib import blake2b

from engine.kv.layout import KvLayout

MAX_LENGTH = 1024


def fingerprint(model_hash: str, layouts: Sequence[KvLayout], hash_secret: bytes) -> str:
    """`layouts` of all ranks of the worker. `hash_secret` seeds the block hashes; it cannot be read back."""
    first = layouts[0]
    fields = {
        "model": model_hash,
        "dtype": first.dtype,
        "layers": max(layout.first_layer + layout.num_layers for layout in layouts),
        "kv_heads": max(layout.first_kv_head + layout.num_kv_heads for layout in layouts),
        "head_dim": first.head_dim,
        "hash_seed": blake2b(hash_secret, digest_size=8, person=b"baton-kv").hexdigest(),
    }
    return " ".join(f"{name}={value}" for name, value in fields.items())


def difference(ours: str, theirs: str) -> str:
    """Names the fields that differ, empty when none does. `theirs` may be anything."""
    if ours == theirs:
        return ""
    if len(theirs) > MAX_LENGTH:
        return "fingerprint: too long"
    mine, other = _fields(ours), _fields(theirs)
    names = [name for name in mine if mine[name] != other.get(name)] or ["fingerprint"]
    return "; ".join(f"{name}: {other.get(name, 'nothing')} is not {mine.get(name, ours)}" for name in names)


def _fields(text: str) -> dict[str, str]:
    pairs = (field.partition("=") for field in text.split(" "))
    return {name: value for name, _, value in pairs}
