import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import yaml

from cluster.spec import ClusterSpec, check_device, format_size, parse_size, threads_per_worker, worker_id
from cluster.spec_errors import SpecError
from cluster.spec_file import explained_yaml, load_spec, parse_spec, plain_data, save_spec


def problems(fields: dict[object, object]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec({"model": "tiny"} | fields)
    return caught.value.problems


def test_a_model_alone_is_a_whole_cluster(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model: org/name\n")
    spec = load_spec(path)
    assert (spec.prefill.replicas, spec.decode.replicas, spec.router.port) == (1, 1, 8000)
    assert spec.public_model_name == "org/name"
    assert spec.pool("decode").kv_memory == 1 << 30


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"router": {"port": 99999}}, ["router.port", "99999", "from 0 to 65535"]),
        ({"router": {"policy": "fastest"}}, ["router.policy", "'fastest'", "prefix_aware, round_robin, least_loaded"]),
        ({"router": {"prot": 1}}, ["router.prot", "unknown", "did you mean 'port'", "max_queue"]),
        ({"router": 8000}, ["router:", "8000", "mapping", "port"]),
        ({"router": {"max_body_bytes": "32 MB"}}, ["router.max_body_bytes", "'32 MB'", "512MiB"]),
        ({"router": {"request_timeout_s": float("nan")}}, ["router.request_timeout_s", "nan", "a number"]),
        ({"engine": "tensorrt"}, ["engine", "'tensorrt'", "torch, simulated"]),
        ({"block_size": 12}, ["block_size", "12", "1, 2, 4, 8, 16"]),
        ({"prefill": {"replicas": "two"}}, ["prefill.replicas", "'two'", "a whole number from 0"]),
        ({"prefill": {"replicas": True}}, ["prefill.replicas", "True", "a whole number from 0"]),
        ({"decode": {"threads": 0}}, ["decode.threads", "0", "from 1", "or null"]),
        ({"name": "My Cluster"}, ["name", "'My Cluster'", "lower-case"]),
        ({"registry": "etcd://x"}, ["registry", "'etcd://x'", "redis://host:port/db"]),
        ({"model": None}, ["model", "None", "text"]),
        ({"transfer": {"lease_s": 0}}, ["transfer.lease_s", "0", "above 0"]),
        ({3: 4}, ["3", "unknown field", "model"]),
        ({"decode": {"replicas": 0}}, ["decode.replicas", "0", "at least 1"]),
        ({"router": {"policy": "least_loaded", "slo": {"tpot_s": 1}}}, ["router.slo", "least_loaded", "prefix_aware"]),
        ({"transfer": {"lease_s": 2, "silence_s": 2}}, ["transfer.lease_s", "2", "more than transfer.silence_s"]),
        ({"prefill": {"engine": "simulated"}}, ["prefill.engine", "'simulated'", "decode.engine", "'torch'"]),
        ({"prefill": {"engine": "onxx"}}, ["prefill.engine", "'onxx'", "torch, auto, tensorrt, onnx, simulated"]),
        ({"decode": {"engine": "tensorrt"}}, ["decode.engine", "'tensorrt'", "compiled for prefill only", "torch"]),
        ({"decode": {"engine": "auto"}}, ["decode.engine", "'auto'", "compiled for prefill only", "torch"]),
        (
            {"prefill": {"engine": "tensorrt", "device": "cpu"}},
            ["prefill.engine", "'tensorrt'", "device cpu", "NVIDIA GPUs", "onnx"],
        ),
        ({"prefill": {"engine": "onnx", "device": "cuda"}}, ["prefill.engine", "'onnx'", "device cuda", "tensorrt"]),
        (
            {"kv_cache": {"dtype": "fp8"}, "device": "cuda", "prefill": {"engine": "tensorrt"}},
            ["prefill", "kv_cache.dtype 'fp8'", "engine tensorrt", "auto"],
        ),
        (
            {"engine": "simulated", "prefill": {"engine": "tensorrt"}},
            ["prefill.engine", "'tensorrt'", "decode.engine", "'simulated'"],
        ),
        ({"tensorrt": {"max_tokens": 0}}, ["tensorrt.max_tokens", "0", "from 1", "or null"]),
        (
            {"scheduler": {"max_batch_tokens": 512}, "decode": {"scheduler": {"max_num_seqs": 999}}},
            ["decode", "max_num_seqs 999", "max_batch_tokens", "512"],
        ),
        ({"device": "gpu"}, ["device", "'gpu'", "auto, cpu, cuda"]),
        ({"load": "random"}, ["load", "'random'", "auto, dummy"]),
        ({"quantization": "int4"}, ["quantization", "'int4'", "fp8, or null"]),
        ({"gpu_memory_fraction": 1.5}, ["gpu_memory_fraction", "1.5", "up to 1", "or null"]),
        ({"kv_cache": {"dtype": "int8"}}, ["kv_cache.dtype", "'int8'", "auto, fp8"]),
        ({"transfer": {"transport": "rdma"}}, ["transfer.transport", "'rdma'", "cuda_ipc, nccl"]),
        (
            {"prefill": {"kv_cache": {"dtype": "fp8"}}},
            ["prefill.kv_cache.dtype", "'fp8'", "decode.kv_cache.dtype", "'auto'"],
        ),
        (
            {"max_model_len": 100, "decode": {"kv_cache": {"num_blocks": 6}}},
            ["decode", "num_blocks 6", "max_model_len 100", "7 blocks"],
        ),
        (
            {"engine": "simulated", "max_model_len": 99999},
            ["max_model_len", "99999", "simulated.max_model_len", "32768"],
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    fields: dict[str, object], expected: list[str]
) -> None:
    (problem,) = problems(fields)
    assert [part for part in expected if part not in problem] == [], problem


def test_every_problem_is_listed() -> None:
    found = problems({"block_size": 3, "router": {"port": -1}, "nonsense": 1})
    assert [problem.partition(":")[0] for problem in found] == ["block_size", "router.port", "nonsense"]


def test_a_missing_model_is_asked_for() -> None:
    with pytest.raises(SpecError, match="model: missing; needed: checkpoint: a directory or a Hugging Face hub id"):
        parse_spec({})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"security": {"bind_host": "0.0.0.0"}}, "security.bind_host: '0.0.0.0'"),
        ({"decode": {"host": "10.0.0.7"}}, "decode.host: '10.0.0.7'"),
        ({"prefill": {"host": "some-name"}}, "prefill.host: 'some-name'"),
    ],
)
def test_an_address_beyond_loopback_needs_a_token(fields: dict[str, dict[str, str]], field: str) -> None:
    found = problems(fields)
    assert all(field in problem and "security.token_file" in problem for problem in found)
    security = fields.get("security", {}) | {"token_file": "/secret"}
    parse_spec({"model": "tiny"} | fields | {"security": security})


def test_prefill_may_run_compiled_engines_beside_a_torch_decode_pool() -> None:
    spec = parse_spec({"model": "tiny", "prefill": {"engine": "auto"}, "tensorrt": {"cache_dir": "/engines"}})
    assert (spec.pool("prefill").engine, spec.pool("decode").engine) == ("auto", "torch")
    assert spec.tensorrt.cache_dir == "/engines"
    assert list(check_device(spec, spec.pool("prefill", "cpu"))) == []


def test_graphs_in_onnxruntime_are_for_the_cpu_also_where_there_is_a_gpu() -> None:
    spec = parse_spec({"model": "tiny", "prefill": {"engine": "onnx"}})
    assert (spec.pool("prefill", "cuda").device, spec.pool("decode", "cuda").device) == ("cpu", "cuda")


def test_a_pool_inherits_what_it_does_not_name() -> None:
    spec = parse_spec(
        {
            "model": "tiny",
            "scheduler": {"max_batch_tokens": 100, "max_num_seqs": 7},
            "kv_cache": {"num_blocks": 50},
            "prefill": {"block_size": 32, "scheduler": {"max_batch_tokens": 2048}, "kv_cache": {"memory": "2MiB"}},
            "decode": {"host": "127.0.0.2"},
        }
    )
    prefill, decode = spec.pool("prefill"), spec.pool("decode")
    assert (prefill.block_size, prefill.max_batch_tokens, prefill.max_num_seqs) == (32, 2048, 7)
    assert (prefill.kv_memory, prefill.num_blocks) == (2 << 20, None)
    assert (decode.block_size, decode.max_batch_tokens, decode.num_blocks) == (16, 100, 50)
    assert (prefill.host, decode.host) == ("127.0.0.1", "127.0.0.2")


def test_a_pool_s_own_size_of_the_kv_cache_keeps_the_dtype_of_all() -> None:
    spec = parse_spec(
        {
            "model": "tiny",
            "device": "cuda",
            "kv_cache": {"num_blocks": 50, "dtype": "fp8"},
            "decode": {"kv_cache": {"memory": "2MiB"}},
        }
    )
    prefill, decode = spec.pool("prefill"), spec.pool("decode")
    assert (prefill.num_blocks, prefill.kv_dtype) == (50, "fp8")
    assert (decode.num_blocks, decode.kv_memory, decode.kv_dtype) == (None, 2 << 20, "fp8")


def test_what_a_spec_leaves_open_the_device_decides() -> None:
    spec = parse_spec({"model": "tiny", "decode": {"device": "cpu"}, "prefill": {"gpu_memory_fraction": 0.5}})
    on_cpu, on_gpu = spec.pool("prefill", "cpu"), spec.pool("prefill", "cuda")
    assert (on_cpu.device, on_cpu.max_batch_tokens, on_cpu.max_num_seqs, on_cpu.kv_memory) == ("cpu", 512, 64, 1 << 30)
    assert (on_gpu.device, on_gpu.max_batch_tokens, on_gpu.max_num_seqs, on_gpu.kv_memory) == ("cuda", 8192, 256, None)
    assert on_gpu.gpu_memory_fraction == 0.5
    streams = parse_spec({"model": "tiny"}).pool("decode", "cuda")
    assert (streams.max_batch_tokens, streams.max_num_seqs) == (1024, 256)
    assert spec.pool("decode", "cuda").device == "cpu"
    assert parse_spec({"model": "tiny", "engine": "simulated"}).pool("decode", "cuda").device == "cpu"


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({"max_num_seqs": 1000}, (1000, 1000)),
        ({"max_batch_tokens": 32}, (32, 32)),
        ({"max_batch_tokens": 2048}, (2048, 64)),
        ({"max_num_seqs": 8, "max_batch_tokens": 9}, (9, 8)),
    ],
)
def test_the_limit_not_given_makes_room_for_the_one_given(given: dict[str, int], limits: tuple[int, int]) -> None:
    pool = parse_spec({"model": "tiny", "scheduler": given}).pool("decode", "cpu")
    assert (pool.max_batch_tokens, pool.max_num_seqs) == limits


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"device": "cpu", "transfer": {"transport": "cuda_ipc"}}, "transfer.transport: 'cuda_ipc' is not allowed"),
        ({"device": "cpu", "transfer": {"transport": "nccl"}}, "transfer.transport: 'nccl' is not allowed"),
        ({"device": "cuda", "transfer": {"transport": "shared_memory"}}, "transfer.transport: 'shared_memory' is not"),
        ({"engine": "simulated", "transfer": {"transport": "nccl"}}, "transfer.transport: 'nccl' is not allowed"),
        ({"device": "cpu", "kv_cache": {"dtype": "fp8"}}, "kv_cache.dtype 'fp8' is not allowed on device cpu"),
    ],
)
def test_what_the_device_cannot_do_is_refused(fields: dict[object, object], expected: str) -> None:
    found = problems(fields)
    assert len(found) == 2
    assert all(expected in problem for problem in found), found
    if "device" in fields:  # left open, only the worker's process knows
        spec = parse_spec({"model": "tiny"} | fields | {"device": "auto"})
        wrong, right = ("cuda", "cpu") if fields["device"] == "cuda" else ("cpu", "cuda")
        assert expected in next(check_device(spec, spec.pool("decode", wrong)))
        assert list(check_device(spec, spec.pool("decode", right))) == []


def test_cores_are_shared_among_the_workers_of_the_machine() -> None:
    spec = parse_spec({"model": "tiny", "prefill": {"replicas": 2, "threads": 3}, "decode": {"replicas": 2}})
    assert threads_per_worker(spec, "prefill", 16) == 3
    assert threads_per_worker(spec, "decode", 16) == 4
    assert threads_per_worker(spec, "decode", 2) == 1


def test_worker_ids_are_stable_and_distinct() -> None:
    assert worker_id("prefill", 0) == "prefill-0"
    assert worker_id("decode", 10) == "decode-10"


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("100", 100), ("7B", 7), ("1KiB", 1024)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_sizes_survive_being_written() -> None:
    rng = random.Random(0)
    sizes = [rng.randrange(1, 1 << rng.randrange(1, 45)) for _ in range(500)] + [1 << i for i in range(45)]
    assert [parse_size(format_size(size)) for size in sizes] == sizes


def test_a_spec_survives_being_written(tmp_path: Path) -> None:
    spec = parse_spec(
        {"model": "tiny", "decode": {"replicas": 3, "kv_cache": {"memory": "3MiB"}}, "transfer": {"lease_s": 5.5}}
    )
    save_spec(spec, tmp_path / "spec.yaml")
    assert load_spec(tmp_path / "spec.yaml") == spec
    assert plain_data(spec) == {
        "model": "tiny",
        "decode": {"replicas": 3, "kv_cache": {"memory": "3MiB"}},
        "transfer": {"lease_s": 5.5},
    }


def test_the_explained_defaults_are_a_spec_that_equals_the_defaults() -> None:
    text = explained_yaml(None)
    assert parse_spec(yaml.safe_load(text)) == ClusterSpec(model="PATH-OR-HUB-ID")
    undocumented = [line for line in text.splitlines() if line and "#" not in line and not line.endswith(":")]
    assert undocumented == []


def test_the_explained_form_shows_the_values_given() -> None:
    spec = parse_spec({"model": "tiny", "prefill": {"scheduler": {"max_num_seqs": 5}}, "served_model_name": "a: b #c"})
    assert parse_spec(yaml.safe_load(explained_yaml(spec))).pool("prefill") == spec.pool("prefill")
    assert yaml.safe_load(explained_yaml(spec))["served_model_name"] == "a: b #c"


def test_paths_are_relative_to_the_spec(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    path = tmp_path / "spec.yaml"
    path.write_text("model: checkpoint\nrun_dir: run\nsecurity: {token_file: /token}\nrouter: {api_key_file: key}\n")
    spec = load_spec(path)
    assert spec.model == str(tmp_path / "checkpoint")
    assert spec.public_model_name == "checkpoint"
    assert spec.run_dir == str(tmp_path / "run")
    assert (spec.security.token_file, spec.router.api_key_file) == ("/token", str(tmp_path / "key"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "not YAML"),
        (b"model: tiny\nmodel: other\n", "'model' is given twice"),
        (b"router: {port: 1, port: 2}\nmodel: x\n", "'port' is given twice"),
        (b"- model\n", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"model: \xff\xfe\n", "not YAML"),
        (b"model: !!python/object/apply:os.system ['true']\n", "not YAML"),
        (b"? [model]\n: x\n", "not YAML"),
        (b"model: " + b"[" * 2000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        load_spec(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere.yaml: cannot be read: No such file"):
        load_spec(tmp_path / "nowhere.yaml")


def test_a_long_value_is_cut_in_the_message() -> None:
    (problem,) = problems({"name": "x" * 10_000})
    assert len(problem) < 300


def test_an_error_is_the_same_after_another_process_has_raised_it() -> None:
    with ProcessPoolExecutor(1) as pool, pytest.raises(SpecError, match=r"^a: is wrong\nb: is missing$") as raised:
        pool.submit(_fail, ["a: is wrong", "b: is missing"]).result()
    assert raised.value.problems == ["a: is wrong", "b: is missing"]


def _fail(problems: list[str]) -> None:
    raise SpecError(problems)
