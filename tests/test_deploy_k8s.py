"""deploy/k8s: every overlay renders, fits its schemas, and has what the service needs."""

import json
from functools import lru_cache
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ralf.worker.service.url_policy import METADATA
from ralf.worker.settings import GIB, Settings
from tests.deploy_tools import DEPLOY, run

OVERLAYS = ("cpu", "gpu", "mig", "engines", "redis")
SERVICE = ("cpu", "gpu", "mig")
SCHEMAS = Path(__file__).resolve().parent / "schemas"
KUBERNETES = "1.33"
CUSTOM = {
    kind: json.loads((SCHEMAS / f"{kind.lower()}.json").read_text())
    for kind in ("ScaledObject", "ServiceMonitor", "PrometheusRule")
}


@lru_cache
def text_of(overlay: str) -> str:
    """The manifests that kustomize makes of an overlay."""
    return run("kustomize", "build", DEPLOY / "k8s" / overlay)


def rendered(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay."""
    return list(yaml.safe_load_all(text_of(overlay)))


def one(overlay: str, kind: str, name: str) -> dict[str, Any]:
    """The object of that kind and name."""
    (found,) = [
        each
        for each in rendered(overlay)
        if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def pods(overlay: str) -> list[tuple[str, dict[str, Any]]]:
    """Every pod's specification, with its owner's name."""
    owners = {"Deployment", "StatefulSet", "Job"}
    return [
        (each["metadata"]["name"], each["spec"]["template"]["spec"])
        for each in rendered(overlay)
        if each["kind"] in owners
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders_and_fits_kubernetes_own_schemas(overlay: str, tmp_path: Path):
    """The check is strict: an unknown field is refused."""
    known = [each for each in rendered(overlay) if each["kind"] not in CUSTOM]
    assert known
    path = tmp_path / f"{overlay}.yaml"
    path.write_text(yaml.safe_dump_all(known))
    run("kubernetes-validate", "--strict", "--kubernetes-version", KUBERNETES, path)


@pytest.mark.parametrize("overlay", SERVICE)
def test_what_kubernetes_does_not_know_fits_its_owners_interface(overlay: str):
    """The schemas of KEDA and the Prometheus Operator are in tests/schemas."""
    custom = [each for each in rendered(overlay) if each["kind"] in CUSTOM]
    assert {each["kind"] for each in custom} == set(CUSTOM)
    for each in custom:
        jsonschema.validate(each, CUSTOM[each["kind"]])


@pytest.mark.parametrize("kind", CUSTOM)
def test_the_schemas_refuse_what_is_misspelt(kind: str):
    """Otherwise they would prove nothing."""
    document = {"apiVersion": "x", "kind": kind, "metadata": {"name": "a"}, "spec": {"nonsense": 1}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, CUSTOM[kind])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_held_tight(overlay: str):
    """No root user, no capability, no writable root, no token; memory is limited."""
    for name, pod in pods(overlay):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["priorityClassName"].startswith("ralf-"), name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name
            assert "cpu" in container["resources"]["requests"], name
        if name != "redis":  # a Service's variables begin with its name, and Settings refuses those
            assert pod["enableServiceLinks"] is False, name


@pytest.mark.parametrize("overlay", SERVICE)
def test_a_worker_has_time_to_drain_and_its_models_read_only(overlay: str):
    """The pod has more time to end than its job, and every port is declared."""
    pod = one(overlay, "Deployment", "worker")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = {
        key: value
        for each in rendered(overlay)
        if each["kind"] == "ConfigMap"
        for key, value in each["data"].items()
    }
    Settings.from_environment(settings)
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    parents = int(container["args"][container["args"].index("--parents") + 1])

    assert pod["terminationGracePeriodSeconds"] >= float(settings["RALF_GRACE_S"]) + 30
    assert "kill -TERM 1" in " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
    assert mounts["models"]["readOnly"] is True
    assert [port["containerPort"] for port in container["ports"]][:parents] == [
        9100 + number for number in range(parents)
    ]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == "metrics"
    assert "replicas" not in one(overlay, "Deployment", "worker")["spec"]


@pytest.mark.parametrize("overlay", SERVICE)
@pytest.mark.parametrize("role", ["worker", "deliverer", "janitor"])
def test_credentials_are_files_and_in_no_environment(overlay: str, role: str):
    """Each process of a pod can read the environment of the first one."""
    pod = one(overlay, "Deployment", role)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    files = {
        each["name"]: each["value"] for each in container["env"] if each["name"].endswith("_FILE")
    }
    (place,) = [each for each in container["volumeMounts"] if each["name"] == "secrets"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "secrets"]

    assert volume["secret"]["secretName"] == f"ralf-{role}"
    assert place["readOnly"] is True
    assert "RALF_REDIS_URL_FILE" in files
    assert ("RALF_WEBHOOK_SECRETS_FILE" in files) is (role == "deliverer")
    for name, path in files.items():
        assert path == f"{place['mountPath']}/{name.removesuffix('_FILE')}"
    assert not [each for each in container.get("envFrom", ()) if "secretRef" in each]


@pytest.mark.parametrize("overlay", SERVICE)
def test_scaling_counts_what_runs_and_an_unanswered_question_is_no_zero(overlay: str):
    """Busy workers must not be stopped because the queue is empty."""
    scaled = one(overlay, "ScaledObject", "worker")["spec"]
    work, age = scaled["triggers"]
    target = one(overlay, "Deployment", scaled["scaleTargetRef"]["name"])
    arguments = target["spec"]["template"]["spec"]["containers"][0]["args"]
    at_once = "--capacity" if "--capacity" in arguments else "--parents"

    assert "ralf_queued_jobs" in work["metadata"]["query"]
    assert "+ sum(max by (priority) (ralf_started_jobs" in work["metadata"]["query"]
    assert "ralf_queue_oldest_age_seconds" in age["metadata"]["query"]
    assert {t["metadata"]["ignoreNullValues"] for t in (work, age)} == {"false"}
    assert work["metadata"]["threshold"] == arguments[arguments.index(at_once) + 1]
    assert scaled["minReplicaCount"] >= 1


@pytest.mark.parametrize("overlay", ["gpu", "mig"])
def test_a_gpu_pod_asks_for_one_device_and_for_its_decoders(overlay: str):
    """Without the variable in the pod libnvcuvid.so.1 is missing."""
    (container,) = one(overlay, "Deployment", "worker")["spec"]["template"]["spec"]["containers"]
    devices = {k: v for k, v in container["resources"]["limits"].items() if "nvidia.com" in k}

    assert list(devices.values()) == ["1"]
    assert next(iter(devices)).startswith("nvidia.com/mig-") is (overlay == "mig")
    assert {"name": "NVIDIA_DRIVER_CAPABILITIES", "value": "video,compute,utility"} in container[
        "env"
    ]


@pytest.mark.parametrize("overlay", SERVICE)
def test_pods_reach_dns_redis_and_public_addresses_and_nothing_inside(overlay: str):
    """Only Prometheus reaches them; the janitor does not reach the internet."""
    deny = one(overlay, "NetworkPolicy", "ralf-default-deny")["spec"]
    outside = one(overlay, "NetworkPolicy", "ralf-outside")["spec"]
    ports = [rule["ports"] for rule in deny["egress"]]
    (rule,) = outside["egress"]
    blocks = [to["ipBlock"] for to in rule["to"]]

    assert sorted(deny["policyTypes"]) == ["Egress", "Ingress"]
    assert [[port["port"] for port in each] for each in ports] == [[53, 53], [6379]]
    closed = [ip_network(block) for block in blocks[0]["except"]]
    metadata = [address for address in METADATA if address.version == 4]
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} <= set(blocks[0]["except"])
    assert [a for a in metadata if not any(a in block for block in closed)] == []
    assert [port["port"] for port in rule["ports"]] == [443, 80]
    (expression,) = outside["podSelector"]["matchExpressions"]
    assert expression["values"] == ["worker", "deliverer"]


def test_every_service_pod_has_a_budget_and_a_name_that_policies_select():
    """Draining nodes stops at most one pod of each service at a time."""
    for name in ("worker", "deliverer", "janitor"):
        labels = one("cpu", "Deployment", name)["spec"]["template"]["metadata"]["labels"]
        budget = one("cpu", "PodDisruptionBudget", name)["spec"]

        assert labels["app.kubernetes.io/name"] == "ralf"
        assert budget["selector"]["matchLabels"].items() <= labels.items()
        assert budget["maxUnavailable"] == 1


def test_redis_refuses_writes_before_the_kernel_kills_it():
    """It also keeps every write that it acknowledged."""
    (pod,) = [pod for name, pod in pods("redis") if name == "redis"]
    (config,) = [each for each in rendered("redis") if each["kind"] == "ConfigMap"]
    lines = config["data"]["redis.conf"].splitlines()

    assert pod["containers"][0]["resources"]["limits"]["memory"] == "4Gi"
    assert "maxmemory 3gb" in lines
    assert {"appendonly yes", "appendfsync always", "maxmemory-policy noeviction"} <= set(lines)


def test_an_engine_is_built_where_the_node_is_and_written_where_workers_read():
    """The volume is the workers' volume, but writable."""
    ((name, pod),) = pods("engines")
    claims = {v["name"]: v.get("persistentVolumeClaim", {}) for v in pod["volumes"]}

    assert name.startswith("build-")
    assert "nvidia.com/gpu.product" in pod["nodeSelector"]
    assert claims["models"] == {"claimName": "models"}
    assert pod["containers"][0]["args"][0] == "build"


def test_a_gpu_pod_runs_sixteen_jobs_and_has_room_for_their_uploads():
    """Fewer at once leave the device waiting; each worker process may hold the largest upload."""
    pod = one("gpu", "Deployment", "worker")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    parents = int(container["args"][container["args"].index("--parents") + 1])
    (work,) = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "work"]
    policy = one("gpu", "NetworkPolicy", "ralf-default-deny")["spec"]["ingress"][0]["ports"]
    service = one("gpu", "Service", "metrics")["spec"]["ports"]
    monitor = one("gpu", "ServiceMonitor", "ralf")["spec"]["endpoints"]

    assert parents == 16
    assert int(work.removesuffix("Gi")) * GIB >= parents * Settings().max_bytes
    assert policy[0]["endPort"] >= 9100 + parents - 1
    assert [port["port"] for port in service] == [9100 + n for n in range(parents)]
    assert [each["port"] for each in monitor] == [port["name"] for port in service]
