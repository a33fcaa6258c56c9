"""What the rendered objects say of each other holds: names, selectors, ports, secrets, commands, rights."""

import re
from typing import Any

import pytest
import typer.main
import yaml

from cluster.cli.app import app

VALUE_SETS = ["", "h200-8gpu", "wide-ep-18-nodes", "everything"]
BACKENDS = ["native", "kuberay", "RayJob"]
COMMANDS = typer.main.get_command(app).commands
MORAY_COMMANDS = {"up", "down", "router", "generate"}


@pytest.fixture(
    params=[(v, b) for v in VALUE_SETS for b in BACKENDS], ids=lambda p: f"{p[0] or 'default'}-{p[1]}"
)
def result(request, render) -> Any:
    values, backend = request.param
    settings = ["backend=kuberay", "kuberay.kind=RayJob"] if backend == "RayJob" else [f"backend={backend}"]
    return render(values, *settings)


def containers(pods: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every container of the pods, with a name for messages."""
    return [(f"{name}/{c['name']}", c) for name, pod in pods for c in pod["spec"]["containers"]]


def labels_of(pod: dict[str, Any]) -> dict[str, str]:
    """Labels of a pod template."""
    return pod.get("metadata", {}).get("labels", {})


def ports_of(pod: dict[str, Any]) -> dict[str, int]:
    """Container ports of a pod by name."""
    return {p["name"]: p["containerPort"] for c in pod["spec"]["containers"] for p in c.get("ports", [])}


def test_every_service_selects_pods_that_have_its_ports(result, pods_of):
    pods = pods_of(result.objects)
    for service in result.of_kind("Service"):
        selector = service["spec"]["selector"].items()
        chosen = [pod for _, pod in pods if selector <= labels_of(pod).items() and "kind" not in pod]
        if service["spec"].get("clusterIP") == "None":
            chosen = [pod for pod in chosen if labels_of(pod)["moray.io/group"] != "router"]
        assert chosen, service["metadata"]["name"]
        for pod in chosen:
            for port in service["spec"]["ports"]:
                assert ports_of(pod)[port["targetPort"]] == port["port"]


def test_every_service_port_names_its_protocol(result):
    ports = [port for service in result.of_kind("Service") for port in service["spec"]["ports"]]
    assert {port["protocol"] for port in ports} == {"TCP"}


def test_selectors_of_workloads_match_their_own_pods_only(result, pods_of):
    pods = pods_of(result.objects)
    workloads = [*result.of_kind("StatefulSet"), *result.of_kind("Deployment")]
    for selector in [w["spec"]["selector"]["matchLabels"] for w in workloads]:
        assert len([1 for _, pod in pods if selector.items() <= labels_of(pod).items()]) == 1


def test_disruption_budgets_select_exactly_one_group(result, pods_of):
    pods = pods_of(result.objects)
    for budget in result.of_kind("PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"].items()
        assert len([1 for _, pod in pods if selector <= labels_of(pod).items()]) == 1


def test_every_group_of_the_config_finds_pods_with_its_label(result, pods_of):
    config = yaml.safe_load(result.of_kind("ConfigMap")[0]["data"]["config.yaml"])
    hosts = {labels_of(pod).get("moray.io/group") for _, pod in pods_of(result.objects)}
    groups = [config[name] for name in ("expert", "prefill", "decode", "both")]
    wanted = {group["node_selector"]["moray.io/group"] for group in groups if group["replicas"]}
    assert wanted <= hosts


def test_ray_nodes_carry_the_label_of_their_group(result, pods_of):
    for item in result.objects:
        spec = item.get("spec", {})
        if item["kind"] in ("RayCluster", "RayJob"):
            cluster = spec.get("rayClusterSpec", spec)
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                assert group["labels"]["moray.io/group"] == labels_of(group["template"])["moray.io/group"]
        if item["kind"] == "StatefulSet":
            pod = spec["template"]
            args = pod["spec"]["containers"][0]["args"][0]
            assert f"--labels=moray.io/group={labels_of(pod)['moray.io/group']} " in args


def test_every_ray_container_has_the_token(result, pods_of):
    secrets = {s["metadata"]["name"] for s in result.of_kind("Secret")} | {"my-token"}
    ray = [(n, c) for n, c in containers(pods_of(result.objects)) if c["name"] not in ("router", "generate")]
    assert len(ray) >= 3
    for name, container in ray:
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token", name
        reference = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference["key"] == "auth_token"
        assert reference["name"] in secrets


def test_disabled_auth_is_said_and_makes_no_secret(render, pods_of):
    result = render("", "auth.mode=disabled", "backend=native")
    assert result.of_kind("Secret") == []
    env = [c["env"] for _, c in containers(pods_of(result.objects)) if c["name"].startswith("ray")]
    modes = [entry["value"] for entries in env for entry in entries if entry["name"] == "RAY_AUTH_MODE"]
    assert modes == ["disabled"] * len(env)


def test_token_can_be_given_and_is_random_otherwise(render):
    assert render("", "auth.token=abc").of_kind("Secret")[0]["data"]["auth_token"] == "YWJj"
    first = render("", "fullnameOverride=a").of_kind("Secret")[0]["data"]["auth_token"]
    second = render("", "fullnameOverride=a", "router.replicas=3").of_kind("Secret")[0]["data"]["auth_token"]
    assert first != second
    assert len(first) == 64


def test_mounts_name_volumes_of_their_pod(result, pods_of):
    for name, pod in pods_of(result.objects):
        volumes = [volume["name"] for volume in pod["spec"].get("volumes", [])]
        assert len(volumes) == len(set(volumes)), name
        for container in pod["spec"]["containers"]:
            mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
            assert set(mounts) <= set(volumes), f"{name}/{container['name']}"


def test_config_maps_and_claims_that_pods_mount_exist(result, pods_of):
    made = {(o["kind"], o["metadata"]["name"]) for o in result.objects}
    for _, pod in pods_of(result.objects):
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim in (None, "deepseek-v32") or ("PersistentVolumeClaim", claim) in made


def test_moray_commands_exist(result, pods_of):
    lines = [item["spec"]["entrypoint"] for item in result.of_kind("RayJob")]
    for _, container in containers(pods_of(result.objects)):
        lines += [*container.get("command", []), *container.get("args", [])]
    text = re.sub(r"#.*", "", "\n".join(lines))
    used = re.findall(r"\bmoray (\w+)((?: +--[a-z-]+ \S+)*)", text)
    assert {command for command, _ in used} <= MORAY_COMMANDS
    assert {command for command, _ in used} >= {"up", "router", "generate"}
    for command, flags in used:
        known = {name for option in COMMANDS[command].params for name in option.opts}
        assert set(re.findall(r"--[a-z-]+", flags)) <= known


def test_controller_port_is_the_same_everywhere(result, pods_of):
    config = yaml.safe_load(result.of_kind("ConfigMap")[0]["data"]["config.yaml"])
    port = config["controller"]["port"]
    router = next(c for n, c in containers(pods_of(result.objects)) if c["name"] == "router")
    assert router["args"][0].rstrip().endswith(f':{port}"')
    head = next(s for s in result.of_kind("Service") if s["metadata"]["name"].endswith("-head"))
    assert {p["name"]: p["port"] for p in head["spec"]["ports"]}["controller"] == port


def test_pods_of_attention_workers_drain_before_ray_stops(result, pods_of):
    config = yaml.safe_load(result.of_kind("ConfigMap")[0]["data"]["config.yaml"])
    hooks = {}
    for name, container in containers(pods_of(result.objects)):
        if container["name"] == "ray-worker":
            hooks[name] = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    assert hooks
    for name, command in hooks.items():
        if "expert" in name:
            assert command == []
        else:
            assert f':{config["controller"]["port"]}"' in command[-1]
            assert command[-1].startswith('moray drain "$MORAY_POD_IP" --controller ')
            known = {name for option in COMMANDS["drain"].params for name in option.opts}
            assert set(re.findall(r"--[a-z-]+", command[-1])) <= known


def test_head_service_answers_before_the_head_is_ready(result):
    head = next(s for s in result.of_kind("Service") if s["metadata"]["name"].endswith("-head"))
    assert head["spec"]["publishNotReadyAddresses"] is True
    assert head["spec"].get("clusterIP") != "None"


def test_head_is_found_without_cluster_dns(result, pods_of):
    head = next(s for s in result.of_kind("Service") if s["metadata"]["name"].endswith("-head"))
    variable = head["metadata"]["name"].upper().replace("-", "_") + "_SERVICE_HOST"
    router = next(c for n, c in containers(pods_of(result.objects)) if c["name"] == "router")
    assert f"${{{variable}:-" in router["args"][0]


def test_containers_are_confined(result, pods_of):
    for name, pod in pods_of(result.objects):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert own["readOnlyRootFilesystem"] is True


def test_startup_may_take_three_minutes(result, pods_of):
    for name, container in containers(pods_of(result.objects)):
        if "livenessProbe" in container:
            probe = container["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] >= 180, name


def test_probes_use_ports_of_their_container(result, pods_of):
    for name, container in containers(pods_of(result.objects)):
        names = {port["name"] for port in container.get("ports", [])}
        for probe in (container.get(k) for k in ("startupProbe", "livenessProbe", "readinessProbe")):
            if probe:
                assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in names, name


def test_only_the_head_may_ask_the_api_server(result, pods_of):
    account = result.of_kind("ServiceAccount")[0]["metadata"]["name"]
    for name, pod in pods_of(result.objects):
        is_head = labels_of(pod).get("moray.io/group") == "head"
        assert pod["spec"]["automountServiceAccountToken"] is is_head, name
        assert pod["spec"].get("serviceAccountName") == (account if is_head else None), name


def test_rights_are_reading_pods_and_nodes(result):
    role, cluster_role = result.of_kind("Role")[0], result.of_kind("ClusterRole")[0]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}]
    assert cluster_role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list"]}]
    account = result.of_kind("ServiceAccount")[0]["metadata"]
    for binding in [*result.of_kind("RoleBinding"), *result.of_kind("ClusterRoleBinding")]:
        subject = {"kind": "ServiceAccount", "name": account["name"], "namespace": "ns"}
        assert binding["subjects"] == [subject]


@pytest.mark.parametrize("backend", ["native", "kuberay"])
def test_changed_config_rolls_every_pod(backend, render, pods_of):
    def checksums(*settings: str) -> list[str]:
        pods = pods_of(render("", f"backend={backend}", *settings).objects)
        annotations = [pod["metadata"]["annotations"] for _, pod in pods if "kind" not in pod]
        return [found["checksum/config"] for found in annotations]

    before, after = checksums(), checksums("config.expert.num_slots=7")
    assert len(before) == 5
    assert set(before).isdisjoint(after)
    if backend == "kuberay":
        cluster = render("", "backend=kuberay").of_kind("RayCluster")[0]
        assert cluster["spec"]["upgradeStrategy"] == {"type": "Recreate"}


def test_gpus_are_announced_to_ray(render):
    result = render("wide-ep-18-nodes", "backend=native")
    expert = next(s for s in result.of_kind("StatefulSet") if s["metadata"]["name"].endswith("-expert"))
    assert expert["spec"]["replicas"] == 18
    assert "--num-gpus=8 " in expert["spec"]["template"]["spec"]["containers"][0]["args"][0]


def test_no_gpu_is_given_out_twice(render):
    for values in ("h200-8gpu", "wide-ep-18-nodes"):
        result = render(values, "backend=native")
        config = yaml.safe_load(result.of_kind("ConfigMap")[0]["data"]["config.yaml"])
        for group in ("expert", "prefill"):
            used = [
                config[name]["replicas"] * config[name]["num_gpus"]
                for name in ("expert", "prefill", "decode", "both")
                if config[name]["node_selector"]["moray.io/group"] == group
            ]
            sets = [s for s in result.of_kind("StatefulSet") if s["metadata"]["name"].endswith(group)]
            limits = [s["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] for s in sets]
            owned = sum(
                s["spec"]["replicas"] * int(limit["nvidia.com/gpu"])
                for s, limit in zip(sets, limits, strict=True)
            )
            assert sum(used) == pytest.approx(owned)


def test_kuberay_head_pods_leave_the_operators_labels_alone(render, pods_of):
    for _, pod in pods_of(render("").of_kind("RayCluster")):
        assert "app.kubernetes.io/name" not in labels_of(pod)
        assert "app.kubernetes.io/created-by" not in labels_of(pod)
