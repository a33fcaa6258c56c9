"""What can be set in the Helm chart: Moray's own config under `config`, and the chart's keys beside it.

`helm/moray/values.schema.json` is generated from these types (`python -m cluster.render schema`), and
`helm/moray/values.yaml` states the same defaults, so that Helm refuses what Moray would refuse. The chart's
own keys are camelCase, as Helm users expect; keys below `config` are Moray's.
"""

from typing import Any, Literal

from pydantic import Field

from cluster.config import ControllerConfig, MorayConfig
from router.config import RouterConfig
from wire.config import FrozenConfig
from workers.config import AttentionConfig, ExpertConfig

GROUP_LABEL = "moray.io/group"
"""Label on Ray nodes and on pods that says which group of workers they host."""

Manifest = dict[str, Any]
"""A piece of a Kubernetes manifest that is passed on as it is; the API server checks it."""


class ChartRouterConfig(RouterConfig):
    """Router config in pods: fixed ports, every interface, and no router inside Ray."""

    replicas: Literal[0] = 0
    """Always 0: the routers are the pods of the router Deployment (see `router.replicas`)."""
    host: str = "0.0.0.0"
    """Address to listen on; a Service reaches pods only on every interface."""
    grpc_port: int = Field(50051, ge=1, le=65535)
    """Port of the gRPC API, of its container port and of its Service."""
    http_port: int = Field(8000, ge=1, le=65535)
    """Port of /metrics, /sd, /healthz and /readyz, of the container port and of the Service."""


class ChartControllerConfig(ControllerConfig):
    """Controller config in pods: fixed ports, since Services and probes name them."""

    port: int = Field(6390, ge=1, le=65535)
    """Port of the table stream; routers reach it through the head Service."""
    metrics_port: int = Field(6391, ge=1, le=65535)
    """Port of the controller's own metrics."""


class ChartConfig(MorayConfig):
    """Moray's config as a pod reads it: the ConfigMap holds exactly this."""

    expert: ExpertConfig = ExpertConfig(node_selector={GROUP_LABEL: "expert"})
    prefill: AttentionConfig = AttentionConfig(node_selector={GROUP_LABEL: "prefill"})
    decode: AttentionConfig = AttentionConfig(node_selector={GROUP_LABEL: "decode"})
    both: AttentionConfig = AttentionConfig(replicas=0, node_selector={GROUP_LABEL: "both"})
    router: ChartRouterConfig = ChartRouterConfig()
    controller: ChartControllerConfig = ChartControllerConfig()


class ImageValues(FrozenConfig):
    """The one image of every pod."""

    repository: str = "moray"
    """Registry and name."""
    tag: str = ""
    """Tag; empty = the chart's appVersion."""
    digest: str = ""
    """sha256:... wins over the tag."""
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the kubelet pulls."""


class ResourceValues(FrozenConfig):
    """Requests and limits; quantities are strings, as server-side apply on old API servers demands."""

    requests: dict[str, str] = Field(default_factory=dict)
    """Quantity of each resource that is set aside."""
    limits: dict[str, str] = Field(default_factory=dict)
    """Quantity of each resource that is never passed; GPUs belong here."""


class PodValues(FrozenConfig):
    """Where pods run and what else they carry."""

    resources: ResourceValues = ResourceValues()
    """Requests and limits of the main container."""
    nodeSelector: dict[str, str] = Field(default_factory=dict)
    """Kubernetes node labels that a node must carry."""
    tolerations: list[Manifest] = Field(default_factory=list)
    """Taints that these pods accept."""
    affinity: Manifest = Field(default_factory=dict)
    """Node and pod affinity."""
    topologySpreadConstraints: list[Manifest] = Field(default_factory=list)
    """Spread over nodes and zones; empty = prefer different nodes."""
    priorityClassName: str = ""
    """PriorityClass."""
    runtimeClassName: str = ""
    """RuntimeClass, e.g. nvidia."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """More annotations of the pods."""
    labels: dict[str, str] = Field(default_factory=dict)
    """More labels of the pods."""
    extraEnv: list[Manifest] = Field(default_factory=list)
    """More environment of the containers."""
    extraVolumes: list[Manifest] = Field(default_factory=list)
    """More volumes of the pods."""
    extraVolumeMounts: list[Manifest] = Field(default_factory=list)
    """More mounts of the containers."""
    terminationGracePeriodSeconds: int = Field(60, ge=40)
    """Seconds from SIGTERM to SIGKILL; Ray itself drains a node for up to 30."""


class HeadValues(PodValues):
    """The head pod: Ray's control plane and Moray's controller."""

    resources: ResourceValues = ResourceValues(
        requests={"cpu": "200m", "memory": "1Gi"}, limits={"memory": "4Gi"}
    )
    """Requests and limits of the ray-head container."""
    controllerResources: ResourceValues = ResourceValues(
        requests={"cpu": "100m", "memory": "512Mi"}, limits={"memory": "4Gi"}
    )
    """Requests and limits of the controller container."""


class GroupValues(PodValues):
    """The pods of one group of workers; each is one Ray node that hosts one or more workers."""

    resources: ResourceValues = ResourceValues(
        requests={"cpu": "100m", "memory": "768Mi"}, limits={"memory": "4Gi"}
    )
    """Requests and limits of each pod; all its workers share them."""
    pods: int = Field(1, ge=0)
    """Pods; the workers of `config.<group>.replicas` are spread over them."""


class GroupsValues(FrozenConfig):
    """One entry for each group of workers."""

    expert: GroupValues = GroupValues(pods=2)
    prefill: GroupValues = GroupValues(pods=1)
    decode: GroupValues = GroupValues(pods=1)
    both: GroupValues = GroupValues(pods=0)


class ServiceValues(FrozenConfig):
    """The Service that clients call."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """How it is reached."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations, e.g. for a cloud's load balancer."""


class RouterValues(PodValues):
    """The router Deployment."""

    resources: ResourceValues = ResourceValues(
        requests={"cpu": "50m", "memory": "256Mi"}, limits={"memory": "2Gi"}
    )
    """Requests and limits of each router."""
    replicas: int = Field(2, ge=1)
    """Router pods."""
    service: ServiceValues = ServiceValues()
    """Their Service."""
    preStopSeconds: int = Field(5, ge=0)
    """Seconds that a leaving router still serves, until load balancers have dropped it."""


class AuthValues(FrozenConfig):
    """Ray's token authentication, set on every Ray container."""

    mode: Literal["token", "disabled"] = "token"
    """disabled lets every pod that reaches the head run code in the cluster."""
    existingSecret: str = ""
    """Secret that holds the token under the key auth_token; empty = the chart makes one and keeps it."""
    token: str = ""
    """Token of the Secret that the chart makes; empty = a random one, kept across upgrades."""


class WeightsValues(FrozenConfig):
    """The volume with checkpoints, mounted read-only; `config.model` names a directory below it."""

    type: Literal["none", "existingClaim", "pvc", "hostPath"] = "none"
    """none = a model in the box; pvc = the chart makes the claim (fill it before pods become ready)."""
    mountPath: str = "/models"
    """Where the volume is seen in pods."""
    claimName: str = ""
    """PersistentVolumeClaim of existingClaim."""
    hostPath: str = ""
    """Directory on every node, for hostPath."""
    size: str = "1Ti"
    """Size of the claim that the chart makes."""
    storageClassName: str = ""
    """Its StorageClass; empty = the cluster's default."""
    accessModes: list[str] = Field(default_factory=lambda: ["ReadOnlyMany"])
    """Its access modes; more than one node must read it."""
    mountInRouter: bool = True
    """Routers read the checkpoint's tokenizer."""


class RayValues(FrozenConfig):
    """How Ray is started in every pod."""

    version: str = "2.60.0"
    """Ray in the image, as KubeRay must know it."""
    gcsPort: int = Field(6379, ge=1, le=65535)
    """Port of the head that Ray nodes join."""
    dashboardPort: int = Field(8265, ge=1, le=65535)
    """Port of the head for the dashboard and `ray job submit`."""
    agentPort: int = Field(52365, ge=1, le=65535)
    """Port of each node's agent, asked by probes."""
    metricsPort: int = Field(8080, ge=1, le=65535)
    """Port of each node for Ray's own metrics."""
    objectStoreMemory: int = Field(100_000_000, ge=80_000_000)
    """Bytes of /dev/shm for Ray's object store; tokens do not pass through it."""
    sharedMemorySize: str = "2Gi"
    """Size of /dev/shm; counts as memory of the pod."""
    startupSeconds: int = Field(300, ge=180)
    """Seconds that a Ray node may take to start before it is started again."""


class KuberayValues(FrozenConfig):
    """What only the kuberay backend needs."""

    kind: Literal["RayCluster", "RayJob"] = "RayCluster"
    """RayJob runs `moray up` as a submitted job; RayCluster runs it beside the Ray head."""


class CacheValues(FrozenConfig):
    """The emptyDir at /var/cache/moray (MORAY_CACHE_DIR), where models in the box are made."""

    sizeLimit: str = "4Gi"
    """Its largest size."""


class ServiceAccountValues(FrozenConfig):
    """The identity of the head pod."""

    create: bool = True
    """Make it."""
    name: str = ""
    """Its name; empty = the release's, or `default` when not made."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the one that is made."""


class RbacValues(FrozenConfig):
    """Rights of the head pod: read pods of its namespace and read nodes."""

    create: bool = True
    """Without these rights the controller places by Ray node labels."""


class PodDisruptionBudgetValues(FrozenConfig):
    """One budget for each group and one for the routers."""

    enabled: bool = True
    """Make them."""
    maxUnavailable: int = Field(1, ge=1)
    """Pods of a group that a drain may take at once."""


class NetworkPolicyValues(FrozenConfig):
    """Who may connect to Moray's pods."""

    enabled: bool = False
    """Make a policy: pods of the release reach each other, clients reach routers, nothing else."""
    clients: list[Manifest] = Field(default_factory=list)
    """Peers (NetworkPolicyPeer) that may call routers; empty = anyone."""
    operators: list[Manifest] = Field(default_factory=list)
    """Peers that may reach the dashboard, e.g. KubeRay's namespace or those who submit jobs."""
    monitoring: list[Manifest] = Field(default_factory=list)
    """Peers that may read metrics of every pod."""


class MonitorValues(FrozenConfig):
    """One object for the Prometheus operator."""

    enabled: bool = False
    """Make it; the operator's CRD must be there."""
    interval: str = "15s"
    """Time between two scrapes."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels by which a Prometheus selects it."""


class MonitoringValues(FrozenConfig):
    """How Prometheus finds the processes."""

    serviceMonitor: MonitorValues = MonitorValues()
    """Routers, by their Service."""
    podMonitor: MonitorValues = MonitorValues()
    """The controller, and Ray's own metrics of every node."""
    scrapeConfig: MonitorValues = MonitorValues()
    """Every process wherever Ray put it, by the router's /sd."""


class SecurityValues(FrozenConfig):
    """What containers may do."""

    runAsUser: int = Field(10001, ge=1)
    """User of every container; the image's."""
    runAsGroup: int = Field(10001, ge=1)
    """Group of every container."""
    readOnlyRootFilesystem: bool = True
    """Writes go to /tmp, /dev/shm and the cache only."""


class HelmValues(FrozenConfig):
    """Every value of the chart `helm/moray`."""

    backend: Literal["kuberay", "native"] = "kuberay"
    """kuberay = a RayCluster for the KubeRay operator; native = StatefulSets, no operator."""
    nameOverride: str = ""
    """Replaces the chart's name in object names."""
    fullnameOverride: str = Field("", max_length=40)
    """Replaces the whole prefix of object names."""
    commonLabels: dict[str, str] = Field(default_factory=dict)
    """Labels of every object."""
    image: ImageValues = ImageValues()
    imagePullSecrets: list[dict[str, str]] = Field(default_factory=list)
    """Secrets for the registry."""
    config: ChartConfig = ChartConfig()
    """Moray's own config; the ConfigMap that pods read."""
    auth: AuthValues = AuthValues()
    weights: WeightsValues = WeightsValues()
    cache: CacheValues = CacheValues()
    ray: RayValues = RayValues()
    kuberay: KuberayValues = KuberayValues()
    head: HeadValues = HeadValues()
    groups: GroupsValues = GroupsValues()
    router: RouterValues = RouterValues()
    serviceAccount: ServiceAccountValues = ServiceAccountValues()
    rbac: RbacValues = RbacValues()
    security: SecurityValues = SecurityValues()
    podDisruptionBudget: PodDisruptionBudgetValues = PodDisruptionBudgetValues()
    networkPolicy: NetworkPolicyValues = NetworkPolicyValues()
    monitoring: MonitoringValues = MonitoringValues()
    global_: Manifest = Field(default_factory=dict, alias="global")
    """Helm's own: values shared with a parent chart; unused here."""
