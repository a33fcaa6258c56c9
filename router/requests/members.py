"""The newest cluster snapshot as the router sees it: frozen, usable workers only."""

from dataclasses import dataclass

from wire.proto import control_pb2

_PREFILL_ROLES = (control_pb2.ROLE_PREFILL, control_pb2.ROLE_BOTH)
_DECODE_ROLES = (control_pb2.ROLE_DECODE, control_pb2.ROLE_BOTH)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the router needs to know of the model that is served."""

    name: str
    path: str
    """Directory of the checkpoint; may exist on the workers' hosts only."""
    fingerprint: str
    vocab_tokens: int
    max_context_tokens: int
    """Prompt and new tokens together, at most."""
    bos_token_id: int
    eos_token_id: int


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One attention worker that takes requests."""

    worker_id: str
    incarnation: int
    """Start count: the same id under a higher number is another process."""
    address: str
    """host:port of its gRPC server."""
    can_prefill: bool
    can_decode: bool
    num_pages: int
    """KV pages that it has in all."""

    @property
    def key(self) -> str:
        """This process, and not the next one of the same name."""
        return f"{self.worker_id}#{self.incarnation}"


@dataclass(frozen=True, kw_only=True)
class ClusterView:
    """Everything that the request side decides from; the default is the view before any snapshot."""

    version: int = 0
    model: ModelFacts | None = None
    page_tokens: int = 0
    """Tokens of a KV page; 0 = not known."""
    has_table: bool = False
    """Every expert has a loaded replica."""
    workers: tuple[Worker, ...] = ()
    """Usable ones, by id."""
    present: tuple[str, ...] = ()
    """Keys of every attention worker in the snapshot, usable or not, by id."""
    waiting_for: str = "the first snapshot of the controller"
    """What is missing; "" when requests can run."""

    @property
    def prefill(self) -> tuple[Worker, ...]:
        """The workers that can prefill, by id."""
        return tuple(worker for worker in self.workers if worker.can_prefill)

    @property
    def decode(self) -> tuple[Worker, ...]:
        """The workers that can decode, by id."""
        return tuple(worker for worker in self.workers if worker.can_decode)

    @property
    def is_ready(self) -> bool:
        """Whether a request can run from end to end."""
        return not self.waiting_for


def view_of(snapshot: control_pb2.ClusterSnapshot) -> ClusterView:
    """The frozen view of a snapshot."""
    members = sorted(snapshot.members, key=lambda member: (member.worker_id, member.incarnation))
    attention = [member for member in members if member.role in (*_PREFILL_ROLES, control_pb2.ROLE_DECODE)]
    workers = tuple(_worker(member) for member in attention)
    usable = tuple(
        worker
        for worker, member in zip(workers, attention, strict=True)
        if member.is_ready and member.address
    )
    model = _facts(snapshot.model) if snapshot.HasField("model") else None
    has_table = snapshot.HasField("table")
    return ClusterView(
        version=snapshot.version,
        model=model,
        page_tokens=snapshot.page_tokens,
        has_table=has_table,
        workers=usable,
        present=tuple(worker.key for worker in workers),
        waiting_for=_missing(snapshot.waiting_for, model, has_table=has_table, workers=usable),
    )


def _missing(told: str, model: ModelFacts | None, *, has_table: bool, workers: tuple[Worker, ...]) -> str:
    wanted = (
        ("the model", model is not None),
        ("a routing table with every expert", has_table),
        ("a prefill worker", any(worker.can_prefill for worker in workers)),
        ("a decode worker", any(worker.can_decode for worker in workers)),
    )
    missing = ", ".join(what for what, is_there in wanted if not is_there)
    return f"{missing} (controller: {told})" if missing and told else missing


def _worker(member: control_pb2.Member) -> Worker:
    return Worker(
        worker_id=member.worker_id,
        incarnation=member.incarnation,
        address=member.address,
        can_prefill=member.role in _PREFILL_ROLES,
        can_decode=member.role in _DECODE_ROLES,
        num_pages=member.num_pages,
    )


def _facts(model: control_pb2.ModelInfo) -> ModelFacts:
    return ModelFacts(
        name=model.name,
        path=model.path,
        fingerprint=model.fingerprint,
        vocab_tokens=model.vocab_tokens,
        max_context_tokens=model.max_context_tokens,
        bos_token_id=model.bos_token_id,
        eos_token_id=model.eos_token_id,
    )
