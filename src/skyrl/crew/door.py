"""How a process gets into a Ray cluster: who answers at its address, and whether it wants a token.

Ray finds the token in ``$RAY_AUTH_TOKEN``, in the file ``$RAY_AUTH_TOKEN_PATH`` or in ``~/.ray/auth_token``, and shows
it only where ``RAY_AUTH_MODE=token`` is set. A cluster that was started with that mode refuses whoever shows
none; the processes of one that was started without it show none to each other. So the mode must be the cluster's.

``python -m skyrl.crew.door HOST:PORT`` asks, for the scripts in cluster/.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skyrl.records import SkyrlError

MODE = "RAY_AUTH_MODE"
SECONDS = 20.0
"""How long a head may take to answer."""
MEND = "copy ~/.ray/auth_token of the head's user to the same place here (cluster/README.md), or set RAY_AUTH_TOKEN"


def enter(address: str, seconds: float = SECONDS) -> None:
    """Ask the head at ``address``, and set this process's ``RAY_AUTH_MODE`` if it is not set and the cluster wants a
    token.

    Args:
        address: ``host:port``. Anything else (``auto``, ``ray://…``) is left to Ray.

    Raises:
        SkyrlError: if nobody answers within so many seconds, or the cluster wants a token and there is none here, or
            another one, or the cluster has none and ``RAY_AUTH_MODE=token`` is set.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    wants = not _lets_in(address, None, seconds)
    mode = os.environ.get(MODE, "").lower()
    if not wants:
        if mode == "token":
            raise SkyrlError(
                f"the Ray cluster at {address} has no token, so whoever reaches it can run code there; start it with "
                f"cluster/start_head.sh, or unset {MODE} to join it all the same"
            )
        return
    if mode not in ("", "token"):
        raise SkyrlError(f"the Ray cluster at {address} wants a token; unset {MODE}, which is {mode!r}")
    if (token := own_token()) is None:
        raise SkyrlError(f"the Ray cluster at {address} wants a token, and there is none here: {MEND}")
    if not _lets_in(address, token, seconds):
        raise SkyrlError(f"the Ray cluster at {address} has another token than this user here: {MEND}")
    if not mode:
        from ray._raylet import Config  # type: ignore[attr-defined]

        os.environ[MODE] = "token"
        Config.initialize("")  # Ray has read the environment before


def own_token() -> str | None:
    """The token that Ray would show, looked for where Ray looks."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    try:
        return token_file().read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def token_file() -> Path:
    """Where a token lies, or would lie."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def make_token() -> None:
    """Make a token for this user if there is none. Ray would make it itself, readable for every user of the host; one
    that it made so is closed."""
    if os.environ.get(MODE, "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = token_file()
    if own_token() is not None:
        if file.stat().st_uid == os.getuid() and file.stat().st_mode & 0o077:
            file.chmod(0o600)
        return
    import secrets

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_name(f"{file.name}.{os.getpid()}")
        with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as writer:
            writer.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another run of this user may have come first
            os.link(own, file)
        own.unlink()
    except OSError as error:
        raise SkyrlError(f"Ray's token can't be written to {file}: {error}; set RAY_AUTH_TOKEN_PATH") from error


def opened(dashboard: str) -> str:
    """The address of this process's Ray dashboard, and how it lets one in.

    Args:
        dashboard: ``host:port``.
    """
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        return f"http://{dashboard}"
    ray = Path(sys.executable).with_name("ray")
    return f"http://{dashboard} (it asks for the token that {ray} get-auth-token prints)"


@contextmanager
def loopback() -> Iterator[None]:
    """Within the block, a Ray that is started is on 127.0.0.1 only, all of its ports. On Linux it would take the
    address of the default route and listen on every interface; on others it is what ray does itself."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _lets_in(address: str, token: str | None, seconds: float) -> bool:
    """Whether the head answers a question that is asked with this token, or with none."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with _channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.CheckAlive(
                gcs_service_pb2.CheckAliveRequest(),
                timeout=seconds,
                metadata=[("authorization", f"Bearer {token}")] if token else None,
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise SkyrlError(f"no head of a Ray cluster answers at {address}: {error.details()}") from error
    return True


def _channel(address: str):  # type: ignore[no-untyped-def]
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address)
    from ray._private.tls_utils import load_certs_from_env

    chain, key, authority = load_certs_from_env()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain))


def main() -> None:
    """Exit status 1 and one line if this host can't join the cluster whose address is given."""
    try:
        enter(sys.argv[1])
    except SkyrlError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
