"""The Helm charts: rendered by Helm's own engine, held against Kubernetes' schemas, and against what they promise."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.site_file import SiteFile

helm_python = pytest.importorskip("helm_python", reason="needs the extra `deploy`: Helm's engine")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra `deploy`: Kubernetes' schemas")

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
CHARTS = ROOT / "deploy" / "helm"
SITE = {
    "superlink": {"host": "superlink.example.org", "ip": "203.0.113.7"},
    "data": {"persistentVolumeClaim": {"claimName": "patients", "readOnly": True}},
    "models": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
}
VALUES: dict[str, dict[str, Any]] = {"fedgiva-server": {}, "fedgiva-site": SITE}
#: The oldest version that the charts take, and the newest whose schemas are at hand.
KUBERNETES = ("1.27", "1.37")


def rendered(chart: str, values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of a chart by kind and name."""
    return {
        (item["kind"], item["metadata"]["name"]): item
        for text in _texts(chart, json.dumps(values))
        for item in yaml.safe_load_all(text)
        if item
    }


@functools.cache
def _texts(chart: str, values: str) -> list[str]:
    with helm_python.Chart.load(str(CHARTS / chart)) as loaded:
        files = loaded.render(json.loads(values), name="fed", namespace="hospital")
    return [text for name, text in files.items() if name.endswith(".yaml")]


def pods(chart: str) -> Iterator[dict[str, Any]]:
    for item in rendered(chart, VALUES[chart]).values():
        if "template" in item.get("spec", {}):
            yield item["spec"]["template"]["spec"]


def site_pod(**values: Any) -> dict[str, Any]:
    pod: dict[str, Any] = rendered("fedgiva-site", {**SITE, **values})["Deployment", "fed"]["spec"]["template"]["spec"]
    return pod


def container(pod: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in pod["containers"] if item["name"] == name)


@pytest.mark.parametrize("chart", VALUES)
def test_chart_has_no_fault_that_helm_sees(chart: str) -> None:
    report = helm_python.lint(str(CHARTS / chart), VALUES[chart], strict=True)
    assert report["errors"] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("chart", VALUES)
def test_objects_are_what_kubernetes_takes(chart: str, version: str) -> None:
    objects = rendered(chart, VALUES[chart])
    assert len(objects) >= 3
    for item in objects.values():
        kubernetes_validate.validate(item, version, strict=True)  # raises, and names the field


@pytest.mark.parametrize("chart", VALUES)
def test_containers_have_no_powers(chart: str) -> None:
    for pod in pods(chart):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for item in [*pod["containers"], *pod.get("initContainers", [])]:
            context = item["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in item["resources"]["limits"]


@pytest.mark.parametrize("chart", VALUES)
def test_every_container_that_stays_is_watched(chart: str) -> None:
    for pod in pods(chart):
        assert all("livenessProbe" in item for item in pod["containers"])


def test_only_the_worker_sees_data_and_only_the_messenger_the_key() -> None:
    pod = site_pod()
    volumes = {item["name"]: item for item in pod["volumes"]}
    mounts = {
        name: {mount["name"]: mount for mount in container(pod, name)["volumeMounts"]}
        for name in ("messenger", "worker")
    }
    assert {"data", "models", "cache", "site"} & set(mounts["messenger"]) == set()
    assert "key" not in mounts["worker"]
    assert set(mounts["messenger"]) & set(mounts["worker"]) == {"socket"}
    assert mounts["worker"]["data"]["readOnly"] and mounts["worker"]["models"]["readOnly"]
    assert "secret" in volumes["key"] and volumes["data"]["persistentVolumeClaim"]["claimName"] == "patients"


def test_site_reaches_the_superlink_and_nothing_else() -> None:
    objects = rendered("fedgiva-site", SITE)
    policy = objects["NetworkPolicy", "fed"]["spec"]
    labels = objects["Deployment", "fed"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert "ingress" not in policy
    assert policy["egress"] == [
        {"to": [{"ipBlock": {"cidr": "203.0.113.7/32"}}], "ports": [{"protocol": "TCP", "port": 8443}]}
    ]
    assert site_pod()["hostAliases"] == [{"ip": "203.0.113.7", "hostnames": ["superlink.example.org"]}]


def test_site_of_an_ipv6_superlink() -> None:
    objects = rendered("fedgiva-site", {**SITE, "superlink": {"host": "s.example.org", "ip": "2001:db8::7"}})
    assert objects["NetworkPolicy", "fed"]["spec"]["egress"][0]["to"] == [{"ipBlock": {"cidr": "2001:db8::7/128"}}]


def test_site_file_of_the_chart_is_one_that_the_worker_takes(tmp_path: Path) -> None:
    text = rendered("fedgiva-site", SITE)["ConfigMap", "fed"]["data"]["site.toml"]
    site = SiteFile.from_tables(tomllib.loads(text), tmp_path)
    assert site.worker.network == "none"
    mounts = [mount["mountPath"] for mount in container(site_pod(), "worker")["volumeMounts"]]
    assert {site.data.folder, str(Path(site.worker.socket).parent), site.worker.cache} <= set(mounts)
    socket = container(site_pod(), "messenger")["args"][-1]
    assert socket == f'--node-config=worker="{site.worker.socket}"'


def test_gpu_and_scheduling_reach_the_pod() -> None:
    worker = {"resources": {"limits": {"memory": "8Gi", "nvidia.com/gpu": 1}}}
    pod = site_pod(worker=worker, nodeSelector={"gpu": "yes"}, runtimeClassName="nvidia")
    assert container(pod, "worker")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert (pod["nodeSelector"], pod["runtimeClassName"]) == ({"gpu": "yes"}, "nvidia")


@pytest.mark.parametrize("missing", ["superlink", "data", "models"])
def test_site_without_what_it_needs_is_not_rendered(missing: str) -> None:
    with pytest.raises(helm_python.HelmError, match=f"{missing}.* needed"):
        rendered("fedgiva-site", {key: value for key, value in SITE.items() if key != missing})


def test_nobody_but_gate_and_server_reaches_the_superlink() -> None:
    objects = rendered("fedgiva-server", {})
    assert objects["Service", "fed-superlink"]["spec"]["type"] == "ClusterIP"
    policy = objects["NetworkPolicy", "fed-superlink"]["spec"]
    callers = [
        item["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for item in policy["ingress"][0]["from"]
    ]
    assert callers == ["gate", "server"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"] and "egress" not in policy
    assert "ingress" not in objects["NetworkPolicy", "fed-server"]["spec"]


def test_server_side_is_started_as_in_compose() -> None:
    """What protects the SuperLink stands in two places; they say the same."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    objects = rendered("fedgiva-server", {})
    for name, kind in (("superlink", "StatefulSet"), ("server", "StatefulSet"), ("gate", "Deployment")):
        pod = objects[kind, f"fed-{name}"]["spec"]["template"]["spec"]
        arguments = [text.replace("fed-superlink", "superlink") for text in container(pod, name)["args"]]
        assert set(compose[name]["command"]) <= set(arguments)


def test_gate_does_not_see_the_secret_of_the_server() -> None:
    gate = rendered("fedgiva-server", {})["Deployment", "fed-gate"]["spec"]["template"]["spec"]
    keys = next(item for item in gate["volumes"] if item["name"] == "keys")["secret"]["items"]
    assert [item["key"] for item in keys] == ["ca.crt", "server.crt", "server.key"]
