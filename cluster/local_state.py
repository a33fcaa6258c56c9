"""Where the newest cluster of this user runs: a small file, so that `moray generate` needs no address."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from wire.errors import NotReady

DEFAULT_ADDRESS = "127.0.0.1:50051"


@dataclass(frozen=True, kw_only=True)
class LocalCluster:
    """What commands on this host must know of a cluster."""

    router_address: str
    """host:port of the gRPC API; "" when routers run elsewhere."""
    controller_address: str
    pid: int
    """Process that holds it in the foreground; 0 when none does."""


def state_file() -> Path:
    """MORAY_STATE_FILE, or cluster.json in the user's state directory."""
    given = os.environ.get("MORAY_STATE_FILE")
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(given) if given else base / "moray" / "cluster.json"


def save_local_cluster(cluster: LocalCluster) -> None:
    """Notes a cluster; the newest replaces the one before."""
    path = state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(cluster)))
    partial.replace(path)


def load_local_cluster() -> LocalCluster | None:
    """The cluster noted last, or None."""
    try:
        return LocalCluster(**json.loads(state_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None


def forget_local_cluster(cluster: LocalCluster) -> None:
    """Removes the note, if it is still about this cluster."""
    if load_local_cluster() == cluster:
        with contextlib.suppress(OSError):
            state_file().unlink()


def controller_address(given: str | None) -> str:
    """Where the controller is: the flag, or that of the cluster noted last.

    Raises:
        NotReady: neither.
    """
    noted = load_local_cluster()
    address = given or (noted.controller_address if noted else "")
    if not address:
        raise NotReady(f"no cluster is noted in {state_file()}; give --controller HOST:PORT")
    return address


def router_address(given: str | None) -> str:
    """Where to send requests: the flag, MORAY_ADDRESS, the cluster noted last, or the default port here."""
    noted = load_local_cluster()
    return (
        given or os.environ.get("MORAY_ADDRESS") or (noted.router_address if noted else "") or DEFAULT_ADDRESS
    )
