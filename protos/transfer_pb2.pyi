from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_size", "dtype", "first_layer", "first_kv_head")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    first_layer: int
    first_kv_head: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., first_layer: _Optional[int] = ..., first_kv_head: _Optional[int] = ...) -> None: ...

class KvOffer(_message.Message):
    __slots__ = ("lease_id", "worker_id", "epoch", "fingerprint", "link_address", "num_tokens", "block_ids", "layer_groups")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYER_GROUPS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    worker_id: str
    epoch: str
    fingerprint: str
    link_address: str
    num_tokens: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    layer_groups: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., epoch: _Optional[str] = ..., fingerprint: _Optional[str] = ..., link_address: _Optional[str] = ..., num_tokens: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., layer_groups: _Optional[_Iterable[int]] = ...) -> None: ...

class SinkMessage(_message.Message):
    __slots__ = ("hello", "open", "renew", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: Open
    renew: Renew
    close: Close
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "fingerprint", "layout", "transports", "boot_id")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    fingerprint: str
    layout: KvLayout
    transports: _containers.RepeatedScalarFieldContainer[str]
    boot_id: str
    def __init__(self, worker_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., boot_id: _Optional[str] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("lease_id", "first_block")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    first_block: int
    def __init__(self, lease_id: _Optional[str] = ..., first_block: _Optional[int] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lease_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("lease_id", "pulled")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    pulled: bool
    def __init__(self, lease_id: _Optional[str] = ..., pulled: _Optional[bool] = ...) -> None: ...

class SourceMessage(_message.Message):
    __slots__ = ("hello", "announcement", "closed", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: HelloReply
    announcement: Announcement
    closed: Closed
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[HelloReply, _Mapping]] = ..., announcement: _Optional[_Union[Announcement, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("refused", "epoch", "layout", "num_blocks", "lease_ms", "transport", "transport_address", "transport_key")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_KEY_FIELD_NUMBER: _ClassVar[int]
    refused: str
    epoch: str
    layout: KvLayout
    num_blocks: int
    lease_ms: int
    transport: str
    transport_address: str
    transport_key: bytes
    def __init__(self, refused: _Optional[str] = ..., epoch: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., num_blocks: _Optional[int] = ..., lease_ms: _Optional[int] = ..., transport: _Optional[str] = ..., transport_address: _Optional[str] = ..., transport_key: _Optional[bytes] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("lease_id", "pieces", "first_token")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    pieces: _containers.RepeatedCompositeFieldContainer[Pieces]
    first_token: FirstToken
    def __init__(self, lease_id: _Optional[str] = ..., pieces: _Optional[_Iterable[_Union[Pieces, _Mapping]]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ...) -> None: ...

class Pieces(_message.Message):
    __slots__ = ("layer_group", "first_block", "num_blocks", "checksums")
    LAYER_GROUP_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    layer_group: int
    first_block: int
    num_blocks: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer_group: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "finished")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    finished: bool
    def __init__(self, token_id: _Optional[int] = ..., finished: _Optional[bool] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("lease_id", "valid", "reason")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    VALID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    valid: bool
    reason: str
    def __init__(self, lease_id: _Optional[str] = ..., valid: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
