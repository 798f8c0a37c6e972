"""Run directories, secrets, checkpoints and addresses: what the machine may refuse, and in which words."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.addresses import free_port, reachable_host
from cluster.checkpoint import resolve_model
from cluster.credentials import read_api_keys, read_token
from cluster.run_dir import locked, prepare_run_dir, with_run_dir
from cluster.spec import ClusterSpec, Load
from cluster.spec_errors import SpecError
from cluster.spec_file import parse_spec


def spec_with_token(path: Path) -> ClusterSpec:
    return parse_spec({"model": "tiny", "security": {"token_file": str(path)}})


def spec_with_keys(path: Path) -> ClusterSpec:
    return parse_spec({"model": "tiny", "router": {"api_key_file": str(path)}})


def secret(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_without_a_file_there_is_no_secret() -> None:
    spec = parse_spec({"model": "tiny"})
    assert (read_token(spec), read_api_keys(spec)) == ("", ())


def test_a_secret_is_read_without_the_line_s_end(tmp_path: Path) -> None:
    assert read_token(spec_with_token(secret(tmp_path / "token", b"s3cret\n"))) == "s3cret"


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"key", ("key",)),
        (b"k1\nk2\n", ("k1", "k2")),
        ("# für A\r\nk 1#\r\n\r\n \t\r\n  #k0\r\n k2 \r\n".encode(), ("k 1#", "k2")),
    ],
)
def test_api_keys_have_a_file_of_their_own_one_to_a_line(tmp_path: Path, content: bytes, keys: tuple[str, ...]) -> None:
    assert read_api_keys(spec_with_keys(secret(tmp_path / "keys", content))) == keys


@contextmanager
def refused(field: str, path: Path, message: str) -> Iterator[None]:
    """The error names field and file, and tells no secret."""
    with pytest.raises(SpecError, match=message) as caught:
        yield
    assert field in str(caught.value)
    assert str(path) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (b"", 0o600, "is empty"),
        (b" \n# nobody yet\n", 0o600, "is empty"),
        (b"k1\nhunter2\n", 0o604, "open to every user"),
        (b"k1\nhunter2\xff\n", 0o600, "printable ASCII"),
        (b"k1\nhunter2\x1cx\n", 0o600, "printable ASCII"),
        (b"hunter2\nk1\n hunter2\n", 0o600, "same key twice"),
    ],
)
def test_each_api_key_is_checked(tmp_path: Path, content: bytes, mode: int, message: str) -> None:
    path = secret(tmp_path / "keys", content, mode)
    with refused("router.api_key_file", path, message):
        read_api_keys(spec_with_keys(path))


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (b"", 0o600, "is empty"),
        (b" \n\n", 0o600, "is empty"),
        (b"hunter2", 0o604, "open to every user"),
        (b"two\nlines", 0o600, "printable ASCII"),
        ("schlüssel".encode(), 0o600, "printable ASCII"),
        (b"hunter2\xff\xfe", 0o600, "printable ASCII"),
    ],
)
def test_a_bad_secret_names_the_field_and_the_file(tmp_path: Path, content: bytes, mode: int, message: str) -> None:
    path = secret(tmp_path / "token", content, mode)
    with refused("security.token_file", path, message):
        read_token(spec_with_token(path))


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_token(spec_with_token(tmp_path / "nowhere"))


def test_the_run_directory_is_named_after_the_cluster() -> None:
    spec = parse_spec({"model": "tiny", "name": "blue", "router": {"port": 9000}})
    assert with_run_dir(spec, {"XDG_RUNTIME_DIR": "/run/user/1"}).run_dir == "/run/user/1/baton/blue-9000"
    assert str(with_run_dir(spec, {}).run_dir).endswith(f"/baton-{os.getuid()}/blue-9000")


def test_a_run_directory_that_is_given_is_kept(tmp_path: Path) -> None:
    spec = parse_spec({"model": "tiny", "run_dir": str(tmp_path)})
    assert with_run_dir(spec, {"XDG_RUNTIME_DIR": "/run/user/1"}).run_dir == str(tmp_path)


def test_a_run_directory_is_private(tmp_path: Path) -> None:
    prepare_run_dir(tmp_path / "base" / "run")
    prepare_run_dir(tmp_path / "base" / "run")
    assert (tmp_path / "base").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "base" / "run").stat().st_mode & 0o777 == 0o700


def test_a_run_directory_that_others_could_change_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(SpecError, match="run_dir"):
        prepare_run_dir(shared)
    with pytest.raises(SpecError, match="can be changed by other users"):
        prepare_run_dir(shared / "run")


def test_a_link_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(SpecError, match="run_dir"):
        prepare_run_dir(tmp_path / "run")


def test_a_run_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"run_dir: .* cannot be made"):
        prepare_run_dir(tmp_path / "file" / "run")


def test_a_lock_is_free_again_after_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(SpecError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_checkpoint_directory_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["/nowhere", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_path_that_is_no_directory_is_not_looked_up_on_the_hub(model: str) -> None:
    with pytest.raises(SpecError, match="is not a directory; needed: a checkpoint directory or a hub id"):
        resolve_model(model)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"without config\.json"):
        resolve_model(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpecError, match=r"model: 'org/name' .*cannot be reached"):
        resolve_model("org/name")


@pytest.mark.parametrize(("load", "weights"), [("auto", True), ("dummy", False)])
def test_random_weights_need_no_download_of_others(
    load: Load, weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        asked.extend([model, *allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/name", load) == tmp_path
    assert ("*.safetensors" in asked) == weights
    assert {"org/name", "*.json"} <= set(asked)


def test_a_name_the_hub_could_not_have_is_said_so() -> None:
    with pytest.raises(SpecError, match="neither a directory nor a valid hub id"):
        resolve_model("not a name")


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "worker-3.pool", "::1"])
def test_an_address_that_is_bound_is_reached_there(host: str) -> None:
    assert reachable_host(host) == host


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_is_reached_at_an_address_of_this_machine(wildcard: str) -> None:
    host = reachable_host(wildcard)
    assert host not in ("0.0.0.0", "::")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if family == socket.AF_INET or socket.has_ipv6:
        with socket.socket(family) as server:
            server.bind((host, 0))  # fails for an address that is not this machine's


def test_a_free_port_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", free_port("127.0.0.1"))) as server:
        assert server.getsockname()[1] > 0
