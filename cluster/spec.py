"""The cluster spec: everything a deployment decides, read once from YAML, then frozen.

`baton/` loads it and gives each object only what that object needs; nothing below `cluster` sees it. `model` alone is
a working cluster on one machine. A value of None in a pool means: what the top level says.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cluster.devices import Device, FoundDevice, kv_bytes, step_limits
from cluster.spec_errors import FIELDS_TOGETHER
from engine.auth import is_loopback

Role = Literal["prefill", "decode"]
WorkerId = NewType("WorkerId", str)
ROLES: tuple[Role, Role] = ("prefill", "decode")

SIZE_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SIZE_PATTERN = r"^\d+(\.\d+)?\s*(B|KiB|MiB|GiB|TiB)?$"
REGISTRY_PATTERN = r"^(file|file:/.+|rediss?://.+|unix:///.+)$"


def parse_size(value: Any) -> Any:
    """Bytes of '512MiB' and the like; anything else is left for the type check to refuse."""
    match = re.match(SIZE_PATTERN, value) if isinstance(value, str) else None
    if match is None:
        return value
    number = value.removesuffix(match[2] or "")
    return math.floor(float(number) * SIZE_UNITS[match[2] or ""])


def format_size(num_bytes: int) -> str:
    unit = max((u for u in SIZE_UNITS if num_bytes % SIZE_UNITS[u] == 0), key=lambda u: SIZE_UNITS[u])
    return f"{num_bytes // SIZE_UNITS[unit]}{unit}"


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("not a power of two")
    return value


def _path_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size),
    Field(ge=1),
    WithJsonSchema({"type": "string", "pattern": SIZE_PATTERN, "x-allowed": "a size such as 512MiB or 2GiB"}),
]
BlockSize = Annotated[
    int,
    Field(ge=1, le=256),
    AfterValidator(_power_of_two),
    WithJsonSchema({"enum": [1 << i for i in range(9)]}),
]
FilePath = Annotated[
    str, BeforeValidator(_path_text), Field(min_length=1), Field(json_schema_extra={"x-allowed": "a path"})
]
FileOrName = Annotated[str, Field(min_length=1, json_schema_extra={"x-allowed": "a path or a name"})]
Host = Annotated[str, Field(min_length=1, json_schema_extra={"x-allowed": "a host name or address"})]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Engine = Literal["torch", "simulated"]
PoolEngine = Literal["torch", "auto", "tensorrt", "onnx", "simulated"]
COMPILED: tuple[PoolEngine, ...] = ("auto", "tensorrt", "onnx")  # where the prefill pool alone may differ from torch
KvDtype = Literal["auto", "fp8"]
Load = Literal["auto", "dummy"]
Transport = Literal["auto", "shared_memory", "tcp", "cuda_ipc", "nccl"]
TRANSPORT_DEVICES: Mapping[str, FoundDevice] = {"shared_memory": "cpu", "cuda_ipc": "cuda", "nccl": "cuda"}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SchedulerSpec(Section):
    max_batch_tokens: Count | None = Field(
        None,
        description="tokens one step may compute, prefill and decode together; null: 512 on a CPU, on a GPU 8192 in "
        "prefill workers and 1024 in decode workers; simulated workers: as on the device of their profile",
    )
    max_num_seqs: Count | None = Field(
        None,
        description="sequences one worker runs at a time; null: 64 on a CPU, 256 on a GPU; simulated workers: as on "
        "the device of their profile",
    )


class KvCacheSpec(Section):
    memory: Size | None = Field(
        None,
        description="memory for KV blocks, per worker; null: 1GiB on a CPU, on a GPU what gpu_memory_fraction leaves",
    )
    num_blocks: Count | None = Field(None, description="number of blocks; overrides memory")
    dtype: KvDtype = Field("auto", description="auto: the dtype the model computes in; fp8 (e4m3): half the memory")


class PoolSpec(Section):
    replicas: int = Field(1, ge=0, le=1024, description="number of workers")
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="CPU threads of each worker; null: this machine's cores shared among its workers"
    )
    engine: PoolEngine | None = Field(
        None,
        description="overrides engine; prefill may run compiled TensorRT engines (tensorrt; auto: where it can, else "
        "torch), or for a check on the CPU the graphs that they are compiled from, by onnxruntime (onnx)",
    )
    device: Device | None = Field(None, description="overrides device")
    gpu_memory_fraction: Fraction | None = Field(None, description="overrides gpu_memory_fraction")
    block_size: BlockSize | None = Field(None, description="overrides block_size")
    scheduler: SchedulerSpec | None = Field(None, description="overrides the fields of scheduler it names")
    kv_cache: KvCacheSpec | None = Field(None, description="overrides kv_cache; memory or num_blocks replaces both")
    host: Host | None = Field(None, description="address its ports bind to; null: security.bind_host")
    port: Port = Field(0, description="port for routers and decode workers; 0: any free one")


class SloSpec(Section):
    ttft_s: Seconds | None = Field(None, description="until the first token, from a request's arrival; null: any time")
    tpot_s: Seconds | None = Field(None, description="for each later token; null: any time")


class RouterSpec(Section):
    host: Host = Field("127.0.0.1", description="address the HTTP port binds to")
    port: Port = Field(8000, description="HTTP port; 0: any free one")
    workers: int = Field(1, ge=1, le=256, description="processes that share the HTTP port, for more cores")
    policy: Literal["prefix_aware", "round_robin", "least_loaded"] = Field(
        "prefix_aware", description="how workers are chosen"
    )
    local_prefill_max_tokens: int | None = Field(
        None,
        ge=0,
        description="the decode worker may prefill prompts with at most this many tokens to compute, where that is "
        "cheaper than a handoff; null: any number; 0: never",
    )
    answer_price: float | None = Field(
        None,
        gt=0,
        le=10,
        description="what a second of an answer is worth beside one before its first token: more for smoother streams, "
        "less for earlier first tokens; null: as slo says, where it sets both times, else 0.2",
    )
    slo: SloSpec = Field(
        SloSpec(), description="times that requests should keep; one that no worker can serve so gets 429"
    )
    max_queue: Count = Field(1024, description="requests waiting for a worker before new ones get 429")
    max_running: Count | None = Field(
        None, description="requests on workers at once, by each router; null: as many as workers take"
    )
    request_timeout_s: Seconds = Field(600, description="longest life of a request")
    api_key_file: FilePath | None = Field(
        None,
        description="file of keys, one to a line, each a tenant's: clients must send one of them; lines that begin "
        "with # do not count; null: no key",
    )
    max_body_bytes: Size = Field(32 << 20, description="longest request body")
    stream_interval: int = Field(
        1,
        ge=1,
        le=1024,
        description="tokens of a streamed answer in one event; the first goes at once. More make each cheaper for the "
        "router",
    )


class TransferSpec(Section):
    transport: Transport = Field(
        "auto",
        description="how KV travels; auto: shared memory or CUDA IPC on one host, else NCCL between GPUs, else TCP",
    )
    lease_s: Seconds = Field(30, description="how long a prefill worker keeps offered blocks without a renewal")
    silence_s: Seconds = Field(2, description="a link is lost after this long without a message")


class SecuritySpec(Section):
    bind_host: Host = Field("127.0.0.1", description="address internal ports bind to")
    token_file: FilePath | None = Field(
        None, description="file with the deployment's token; needed when an internal port is not on loopback"
    )


class SimulatedSpec(Section):
    profile: FileOrName | None = Field(
        None,
        description="measured step times, in place of the four speeds below: a file of `baton profile`, or the name of "
        "one that comes with Baton, such as h200-llama-3-8b",
    )
    prefill_tokens_per_s: Rate = Field(20_000, description="speed of prefill")
    step_base_s: float = Field(0.005, ge=0, description="fixed time of a step")
    decode_s_per_sequence: float = Field(0.0001, ge=0, description="added for each decoding sequence")
    kv_read_tokens_per_s: Rate = Field(50_000_000, description="speed of reading KV during attention")
    vocab_size: Count = Field(32_000, description="token ids it emits are below this")
    max_model_len: Count = Field(32_768, description="longest prompt plus output")


class TensorRTSpec(Section):
    cache_dir: FilePath | None = Field(
        None, description="where compiled engines are kept; null: ~/.cache/baton/engines"
    )
    max_tokens: Count | None = Field(
        None,
        description="tokens that an engine computes at a time; a step with more is cut; "
        "null: 2048, or scheduler.max_batch_tokens if that is less",
    )


class ClusterSpec(Section):
    model: str = Field(min_length=1, description="checkpoint: a directory or a Hugging Face hub id")
    name: str = Field(
        "baton",
        pattern=r"^[a-z0-9][a-z0-9-]{0,39}$",
        description="name of the deployment",
        json_schema_extra={"x-allowed": "1 to 40 lower-case letters, digits and hyphens"},
    )
    served_model_name: str | None = Field(None, min_length=1, description="name in the API; null: from model")
    engine: Engine = Field("torch", description="what computes; simulated: a timing model in place of the math")
    device: Device = Field("auto", description="where workers compute; auto: on a GPU where PyTorch sees one")
    load: Load = Field("auto", description="auto: the checkpoint's weights; dummy: random ones, config.json is enough")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: the checkpoint's own")
    quantization: Literal["fp8"] | None = Field(
        None, description="fp8 (e4m3): weights are quantized while loading; null: as the checkpoint is"
    )
    gpu_memory_fraction: Fraction | None = Field(
        None, description="share of a GPU's memory one worker may use; null: 0.9 shared among the GPU's workers"
    )
    max_model_len: Count | None = Field(None, description="longest prompt plus output; null: the model's own limit")
    block_size: BlockSize = Field(16, description="tokens in a KV block")
    scheduler: SchedulerSpec = Field(SchedulerSpec(), description="limits of one step")
    kv_cache: KvCacheSpec = Field(KvCacheSpec(), description="size of the KV pool")
    prefill: PoolSpec = Field(PoolSpec(), description="the prefill pool; replicas 0: decode workers prefill")
    decode: PoolSpec = Field(PoolSpec(), description="the decode pool")
    router: RouterSpec = Field(RouterSpec(), description="the HTTP front and router")
    transfer: TransferSpec = Field(TransferSpec(), description="how KV moves from prefill to decode")
    tensorrt: TensorRTSpec = Field(TensorRTSpec(), description="compiled engines of prefill.engine")
    registry: str = Field(
        "file",
        pattern=REGISTRY_PATTERN,
        description="where workers announce themselves",
        json_schema_extra={"x-allowed": "file (below run_dir), file:/directory, redis://host:port/db, unix:///socket"},
    )
    security: SecuritySpec = Field(SecuritySpec(), description="who may reach internal ports")
    simulated: SimulatedSpec = Field(SimulatedSpec(), description="the timing model of engine: simulated")
    run_dir: FilePath | None = Field(
        None, description="logs and lease files; null: a private directory named after name and router.port"
    )

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        problems = dict.fromkeys(check_together(self))
        if problems:
            raise PydanticCustomError(FIELDS_TOGETHER, "{problems}", {"problems": "\n".join(problems)})
        return self

    @property
    def public_model_name(self) -> str:
        if self.served_model_name:
            return self.served_model_name
        return Path(self.model).name if Path(self.model).is_absolute() else self.model

    def pool(self, role: Role, auto: FoundDevice = "cpu") -> "PoolSettings":
        """The pool with everything it inherits filled in. `auto` is what device `auto` turns out to be; of simulated
        workers, the one that their profile was measured on."""
        pool = self.prefill if role == "prefill" else self.decode
        engine: PoolEngine = pool.engine or self.engine
        device = pool.device or self.device
        if engine == "simulated" or (engine == "onnx" and device == "auto"):
            device = "cpu"
        found: FoundDevice = auto if device == "auto" else device
        steps = _overridden(self.scheduler, pool.scheduler)
        limits_of = auto if engine == "simulated" else found
        max_batch_tokens, max_num_seqs = step_limits(
            limits_of, steps.max_batch_tokens, steps.max_num_seqs, streams=role == "decode"
        )
        kv_cache = _kv_cache(self.kv_cache, pool.kv_cache)
        return PoolSettings(
            role=role,
            replicas=pool.replicas,
            threads=pool.threads,
            engine=engine,
            device=found,
            gpu_memory_fraction=pool.gpu_memory_fraction or self.gpu_memory_fraction,
            block_size=pool.block_size or self.block_size,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            kv_memory=kv_bytes(limits_of, kv_cache.memory),
            num_blocks=kv_cache.num_blocks,
            kv_dtype=kv_cache.dtype,
            host=pool.host or self.security.bind_host,
            port=pool.port,
        )

    def possible_devices(self, role: Role) -> set[FoundDevice]:
        """Where the workers of a pool may compute, as far as the spec tells."""
        return {self.pool(role, "cpu").device, self.pool(role, "cuda").device}


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What one pool of workers runs with."""

    role: Role
    replicas: int
    threads: int | None
    engine: PoolEngine
    device: FoundDevice
    gpu_memory_fraction: float | None  # None: the worker has its GPU for itself
    block_size: int
    max_batch_tokens: int
    max_num_seqs: int
    kv_memory: int | None  # bytes; None: what the GPU has left
    num_blocks: int | None  # overrides kv_memory
    kv_dtype: KvDtype
    host: str
    port: int


SomeSection = TypeVar("SomeSection", bound=Section)


def _overridden(base: SomeSection, override: SomeSection | None) -> SomeSection:
    if override is None:
        return base
    return base.model_copy(update={field: getattr(override, field) for field in override.model_fields_set})


def _kv_cache(base: KvCacheSpec, override: KvCacheSpec | None) -> KvCacheSpec:
    """A size in one unit takes the place of a size in the other."""
    if override and override.model_fields_set & {"memory", "num_blocks"}:
        base = base.model_copy(update={"memory": None, "num_blocks": None})
    return _overridden(base, override)


def worker_id(role: Role, index: int) -> WorkerId:
    """The name a worker keeps over restarts; its epoch tells the lives apart."""
    return WorkerId(f"{role}-{index}")


def threads_per_worker(spec: ClusterSpec, role: Role, num_cores: int) -> int:
    """CPU threads of each worker of a pool when the whole cluster runs on a machine with `num_cores`."""
    num_workers = spec.prefill.replicas + spec.decode.replicas
    return spec.pool(role).threads or max(1, num_cores // num_workers)


def check_together(spec: ClusterSpec) -> Iterator[str]:
    """Problems that no field has alone, one line each."""
    if spec.decode.replicas < 1:
        yield "decode.replicas: 0 is not allowed: every answer comes from a decode worker; allowed: at least 1"
    yield from _check_alike(spec.pool("prefill"), spec.pool("decode"))
    for role in ROLES:
        pool = spec.pool(role)
        yield from _check_pool(spec, pool)
        if len(spec.possible_devices(role)) == 1:
            yield from check_device(spec, pool)
    slo = spec.router.slo
    if spec.router.policy != "prefix_aware" and (slo.ttft_s is not None or slo.tpot_s is not None):
        yield (
            f"router.slo: is not allowed with router.policy {spec.router.policy!r}, which predicts no times; "
            "allowed: with prefix_aware"
        )
    if spec.transfer.lease_s <= spec.transfer.silence_s:
        yield (
            f"transfer.lease_s: {spec.transfer.lease_s} is not allowed: a lease must outlast a silent link; "
            f"allowed: more than transfer.silence_s, which is {spec.transfer.silence_s}"
        )


def check_device(spec: ClusterSpec, pool: PoolSettings) -> Iterator[str]:
    """Problems of the pool on the device it has; a worker looks again when it has found out what `auto` is."""
    transport = spec.transfer.transport
    needed = TRANSPORT_DEVICES.get(transport, pool.device)
    if needed != pool.device:
        yield (
            f"transfer.transport: {transport!r} is not allowed where {pool.role} workers compute on device "
            f"{pool.device}; allowed: auto, tcp, or one for {pool.device}"
        )
    if pool.device == "cpu" and pool.engine == "tensorrt":
        yield (
            f"{pool.role}.engine: 'tensorrt' is not allowed on device cpu: TensorRT computes on NVIDIA GPUs; allowed: "
            "torch, auto, or for a check onnx"
        )
    if pool.device == "cuda" and pool.engine == "onnx":
        yield (
            f"{pool.role}.engine: 'onnx' is not allowed on device cuda: it is for checking the TensorRT path on a CPU; "
            "allowed: torch, auto, tensorrt, or device cpu"
        )
    if pool.device == "cpu" and pool.engine != "simulated" and pool.kv_dtype == "fp8":
        yield f"{pool.role}: kv_cache.dtype 'fp8' is not allowed on device cpu; allowed: auto, or device cuda"


def _check_alike(prefill: PoolSettings, decode: PoolSettings) -> Iterator[str]:
    """What both pools must have in common, for a decode worker goes on with a prefill worker's KV."""
    fields: tuple[tuple[str, str, str], ...] = (("kv_cache.dtype", prefill.kv_dtype, decode.kv_dtype),)
    if "simulated" in (prefill.engine, decode.engine):  # the others make the same KV
        fields = (("engine", prefill.engine, decode.engine), *fields)
    for name, ours, theirs in fields:
        if ours != theirs:
            yield (
                f"prefill.{name}: {ours!r} is not allowed beside decode.{name} {theirs!r}, "
                f"for neither can use the other's KV; allowed: the same {name} in both pools"
            )


def _check_pool(spec: ClusterSpec, pool: PoolSettings) -> Iterator[str]:
    blocks = pool.num_blocks
    if pool.max_num_seqs > pool.max_batch_tokens:
        yield (
            f"{pool.role}: scheduler.max_num_seqs {pool.max_num_seqs} is not allowed: each running sequence needs a "
            f"token in every step; allowed: at most scheduler.max_batch_tokens, which is {pool.max_batch_tokens}"
        )
    if spec.max_model_len and blocks and blocks * pool.block_size < spec.max_model_len:
        yield (
            f"{pool.role}: kv_cache.num_blocks {blocks} is not allowed: one request of max_model_len "
            f"{spec.max_model_len} needs {-(-spec.max_model_len // pool.block_size)} blocks of {pool.block_size} tokens"
        )
    if pool.engine in COMPILED and pool.role == "decode":
        yield (
            f"decode.engine: {pool.engine!r} is not allowed: engines are compiled for prefill only; "
            "allowed: torch, or simulated"
        )
    if pool.engine in ("tensorrt", "onnx") and pool.kv_dtype == "fp8":
        yield f"{pool.role}: kv_cache.dtype 'fp8' is not allowed with engine {pool.engine}; allowed: auto, or torch"
    if pool.engine == "simulated" and (spec.max_model_len or 0) > spec.simulated.max_model_len:
        yield (
            f"max_model_len: {spec.max_model_len} is not allowed with engine simulated; "
            f"allowed: at most simulated.max_model_len, which is {spec.simulated.max_model_len}"
        )
    if spec.security.token_file is None and not is_loopback(pool.host):
        field = f"{pool.role}.host" if pool.host != spec.security.bind_host else "security.bind_host"
        yield (
            f"{field}: {pool.host!r} is not allowed while security.token_file is null: other machines could reach "
            f"{pool.role} workers; allowed: a loopback address, or any with security.token_file set"
        )
