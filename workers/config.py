"""What can be set of the workers: expert groups and attention groups."""

from typing import Literal

from pydantic import Field

from wire.config import FrozenConfig


class WorkerGroupConfig(FrozenConfig):
    """What every group of workers has: how many, and what each one gets."""

    replicas: int = Field(1, ge=0, le=4096)
    """Workers in the group."""
    num_threads: int = Field(1, ge=1, le=1024)
    """Threads of arithmetic in each worker."""
    num_cpus: float = Field(0.0, ge=0)
    """CPUs that Ray reserves for each worker; 0 reserves none."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs that Ray reserves for each worker; more than 0 puts its weights on the GPU."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that a node must carry to host this group; empty = any node."""
    max_per_node: int = Field(0, ge=0)
    """Workers of this group on one node at most; 0 = as many as its CPUs and GPUs allow."""


class ExpertConfig(WorkerGroupConfig):
    """The expert workers."""

    replicas: int = Field(2, ge=1, le=4096)
    """Expert workers."""
    num_slots: int = Field(0, ge=0)
    """Expert slots of each worker in each MoE layer; 0 = just enough for every expert once."""
    on_demand_experts: int = Field(256, ge=1)
    """Experts outside its slots that a worker keeps after it had to load them for a lost worker's rows."""
    bind_threads: bool = True
    """Whether a worker computes on processors of its own, where its host has some that no other expert worker
    has taken; never in a pod that shares its node's."""


class AttentionConfig(WorkerGroupConfig):
    """One group of attention workers: prefill, decode, or both in one."""

    num_pages: int = Field(1024, ge=1)
    """KV pages of each worker; a page holds `kv.page_tokens` tokens of all layers."""
    max_batch_requests: int = Field(64, ge=1)
    """Requests that hold pages and decode together; more wait in line."""
    max_step_tokens: int = Field(512, ge=1)
    """Tokens of one step, decode rows and prompt chunks together; fewer where they look back at many."""
    lookahead_tokens: int = Field(64, ge=1)
    """New tokens for which a request has pages when it starts; it gets more, page by page, as it grows."""
    max_queued_requests: int = Field(256, ge=1)
    """Requests that wait in a worker; more are refused with RESOURCE_EXHAUSTED at once."""
    max_queue_s: float = Field(30.0, gt=0)
    """Seconds that a request waits; one that would wait longer is refused at once, or after twice as long."""
    context_cost_tokens: int = Field(65536, ge=1)
    """Context behind which a prompt token counts as two of a step: the indexer scores all of it."""
    micro_batches: int = Field(1, ge=1, le=2)
    """Parts of a step that take turns: one computes attention while the experts of the other are under way.
    2 pays where expert workers have machines of their own; each part reads its experts' weights."""
    drain_s: float = Field(30.0, ge=0)
    """Seconds that requests get to finish on a worker that leaves; then the router replays them elsewhere."""
    probe_s: float = Field(10.0, ge=0)
    """Seconds without a new token after which a worker makes one, to know that it can; 0 = never."""
    stuck_s: float = Field(20.0, gt=0)
    """Seconds of a step after which a worker is not ready; `dispatch.deadline_s` later it is replaced."""


class ComputeConfig(FrozenConfig):
    """How weights are held and multiplied; the same in every worker."""

    dtype: Literal["auto", "float32", "bfloat16", "fp8", "int8"] = "auto"
    """Form of the weights in memory (docs/precision.md); auto = as the checkpoint stores them."""
    kernels: Literal["auto", "torch"] = "auto"
    """auto = the native ones where they are built and the processor can run them, torch elsewhere."""


class KvConfig(FrozenConfig):
    """The paged latent cache; the same in every attention worker."""

    page_tokens: int = Field(16, ge=1, le=4096)
    """Tokens of one page."""
    dtype: Literal["float32", "bfloat16", "fp8"] = "float32"
    """How latents and rope keys are held; fp8 = latents in E4M3 with factors, rope keys in bfloat16."""
    lease_s: float = Field(4.0, gt=0, le=600)
    """Seconds without a sign of the other worker before a hand-over is given up and its pages are freed."""
    transport: Literal["grpc", "nixl"] = "grpc"
    """How rows go from prefill to decode workers; nixl = by UCX, which needs `moray[nixl]` (docs/kv.md)."""
    nixl_bytes: int = Field(67_108_864, ge=65_536)
    """With nixl: memory of each worker for rows that leave, and as much again for rows that come."""
    index_keys: Literal["float32", "int8"] = "float32"
    """How the indexer's keys are held; int8 reads a quarter of the bytes and may select other near-ties."""
    prefix_reuse: bool = True
    """Full pages stay after their request, and requests that begin with the same tokens share them."""
    host_tier_bytes: int = Field(0, ge=0)
    """Memory of each worker for full pages that the cache has no room for; 0 = none."""
    disk_tier_bytes: int = Field(0, ge=0)
    """Files of each worker for full pages that its memory has no room for; 0 = none."""
    disk_tier_dir: str = ""
    """Directory of these files; empty = the system's directory for temporary files."""


class MtpConfig(FrozenConfig):
    """The multi-token-prediction layer."""

    max_drafts: int = Field(0, ge=0, le=4)
    """Tokens that it drafts at most for each step of a request, if the model has one; 0 = none."""
    zero_first_embedding: bool = False
    """Zero the embedding at position 0 before the layer, as vLLM does and SGLang does not."""


class SelectionBiasConfig(FrozenConfig):
    """Online selection bias: moves the gate's choices toward experts with less load. It changes outputs."""

    enabled: bool = False
    """Whether attention workers do it."""
    step: float = Field(0.001, gt=0, le=0.1)
    """How far an expert's bias moves at a time, toward mean load."""
    limit: float = Field(0.02, gt=0, le=1)
    """Largest move of either sign in all."""
    most_changed_share: float = Field(0.02, gt=0, le=1)
    """Share of choices that may differ from the plain gate's; above it, a worker stops doing it."""


class DispatchConfig(FrozenConfig):
    """How attention workers send tokens to expert workers."""

    transport: Literal["auto", "grpc", "local", "torch"] = "auto"
    """What carries calls: auto = shared memory within a host and gRPC between hosts (docs/transports.md)."""
    torch_backend: Literal["gloo", "nccl"] = "gloo"
    """With torch: of torch.distributed; nccl needs a GPU for every worker."""
    local_checksum: bool = False
    """Whether frames in shared memory have a checksum of their tensors, too: the bytes never leave memory."""
    payload: Literal["float32", "bfloat16", "fp8"] = "float32"
    """How rows travel; fp8 = E4M3 with one scale for 128 values (docs/transports.md has their errors)."""
    combine: Literal["exact", "fp32", "bf16"] = "exact"
    """How partial sums travel; exact = FP64: placement changes no bit; fp32 and bf16 are not order-free."""
    deadline_s: float = Field(60.0, gt=0)
    """Seconds for one layer's dispatch, retries included, before its requests fail."""
    attempt_s: float = Field(1.0, gt=0)
    """Seconds that an expert worker gets at least to answer before its rows are sent elsewhere too."""
    quarantine_s: float = Field(0.5, gt=0)
    """Seconds without rows for an expert worker that failed; each further failure doubles them, up to 30."""
