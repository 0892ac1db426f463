"""Who is let into a Ray cluster, against a stand-in for its head that asks for a token as Ray's does."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from skyrl.crew.door import enter, loopback, make_token, own_token, token_file
from skyrl.records import SkyrlError

TOKEN = "5f" * 32


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    def __init__(self, token: str | None) -> None:
        self.token = token

    def CheckAlive(self, request: Any, context: grpc.ServicerContext) -> Any:
        shown = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and shown != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid or missing authentication token")
        return gcs_service_pb2.CheckAliveReply()


@contextmanager
def head(token: str | None) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(token), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def from_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN + "\n")


def from_other_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "own").write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "own"))


def from_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.mark.parametrize("given", [from_file, from_other_file, from_variable])
def test_the_token_is_found_and_ray_is_told_to_show_it(
    given: Callable[[Path, pytest.MonkeyPatch], None], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(home, monkeypatch)
    with head(TOKEN) as address:
        enter(address)
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_an_open_cluster_is_joined_without_the_token_of_another(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_file(home, monkeypatch)
    with head(None) as address:
        enter(address)
        assert "RAY_AUTH_MODE" not in os.environ  # its processes show none, so ours must ask for none
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(SkyrlError, match=f"^the Ray cluster at {address} has no token, so whoever reaches it can "):
            enter(address)


def test_a_missing_and_a_wrong_token_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with head(TOKEN) as address:
        with pytest.raises(SkyrlError, match=f"^the Ray cluster at {address} wants a token, and there is none here: "):
            enter(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN[1:])
        with pytest.raises(SkyrlError, match=f"^the Ray cluster at {address} has another token than this user here: "):
            enter(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(SkyrlError, match=r"wants a token; unset RAY_AUTH_MODE, which is 'disabled'$"):
            enter(address)


def test_a_head_that_does_not_answer_is_named() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(SkyrlError, match=f"^no head of a Ray cluster answers at {address}: .*refused"):
            enter(address)
        listening.listen()  # takes the connection, and says nothing
        with pytest.raises(SkyrlError, match=f"^no head of a Ray cluster answers at {address}: "):
            enter(address, seconds=0.3)


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:1", "local"])
def test_other_forms_of_an_address_are_left_to_ray(address: str) -> None:
    enter(address)


def test_the_token_of_local_runs_is_for_this_user_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_token()
    token = own_token()
    assert token is not None and len(token) == 64
    assert token_file() == home / ".ray" / "auth_token" and token_file().stat().st_mode & 0o777 == 0o600
    token_file().chmod(0o644)  # as Ray writes it
    make_token()
    assert own_token() == token and token_file().stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none" / "there"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    make_token()
    assert own_token() is None


def test_a_ray_of_this_process_alone_takes_the_loopback_address() -> None:
    from ray._private import services

    with loopback():
        assert services.get_node_ip_address() == "127.0.0.1"
    assert services.get_node_ip_address() == services.node_ip_address_from_perspective(None)
