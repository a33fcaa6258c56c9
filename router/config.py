"""What can be set of the router."""

from pydantic import Field

from wire.config import FrozenConfig


class RouterConfig(FrozenConfig):
    """The public endpoint: addresses, defaults and limits."""

    replicas: int = Field(1, ge=0, le=1)
    """Routers that the controller starts as Ray actors; 0 where they run outside Ray, as `moray router`."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface (there is no authentication yet)."""
    grpc_port: int = Field(50051, ge=0, le=65535)
    """Port of the gRPC API; 0 picks a free one."""
    http_port: int = Field(8000, ge=0, le=65535)
    """Port of /metrics, /sd, /healthz and /readyz; 0 picks a free one."""
    default_max_tokens: int = Field(256, ge=1)
    """New tokens of a request that does not say max_tokens."""
    max_active_requests: int = Field(1024, ge=1)
    """Requests in flight in this router; one more is refused with RESOURCE_EXHAUSTED."""
    num_replays: int = Field(3, ge=0)
    """Times that a request is started again on other workers before its client sees an error."""
    ready_wait_s: float = Field(30.0, ge=0)
    """Seconds that a request waits for a worker before it is refused with UNAVAILABLE."""
    drain_s: float = Field(30.0, ge=0)
    """Seconds that running requests get to finish after SIGTERM."""
    resume_grace_s: float = Field(10.0, ge=0)
    """Seconds that a request with an id of its client's own goes on after its last stream broke."""
    keep_s: float = Field(60.0, ge=0)
    """Seconds that a whole answer to such a request is kept for a client that asks again."""
    keep_requests: int = Field(1024, ge=0)
    """Such answers kept at most; the oldest goes first."""
    keep_tokens: int = Field(262144, ge=0)
    """Their tokens at most, at about 100 bytes each."""
    prefix_pages: int = Field(65536, ge=0)
    """KV pages of prompts remembered of each worker, at about 200 bytes each, to send prompts to where their
    beginning is cached; 0 = by load alone."""
    max_queued_requests: int = Field(256, ge=0)
    """Requests that wait here for room at the workers; one more is refused with RESOURCE_EXHAUSTED."""
    max_wait_s: float = Field(30.0, ge=0)
    """Seconds that a request may wait for room: one that would wait longer, as the line moved lately, is
    refused at once; one that is in line is refused after twice as long."""
    queue_share: float = Field(0.5, gt=0, le=1)
    """Of the waiting requests, one tenant's at most while others wait too."""
    kv_overcommit: float = Field(2.0, ge=1)
    """KV pages that admitted requests may grow to, over those of all decode workers; few grow so far."""
