"""The files under cluster/: read by what they are written for, or checked field by field."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jsonschema
import pydantic
import pytest
import ray
import yaml
from kubernetes_types import (
    MANIFEST,
    RAY_VERSION,
    Container,
    Manifest,
    PersistentVolumeClaim,
    Pod,
    RayClusterSpec,
)

from autoquant_ray.cli.main import main
from autoquant_ray.distributed.metrics import METRICS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER_FILES = sorted(CLUSTER.glob("*.yaml"))
KUBERNETES_FILES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
RAY_OBJECTS = ("ray-cluster", "ray-job", "ray-cron-job")
JOB_FILES = "/etc/autoquant/"


def read(name: str) -> list[dict[str, Any]]:
    """The documents of a file of cluster/kubernetes."""
    return list(yaml.safe_load_all((CLUSTER / "kubernetes" / f"{name}.yaml").read_text()))


def parse(name: str) -> Any:
    """The one object of a file."""
    (document,) = read(name)
    return MANIFEST.validate_python(document)


def inside(value: Any, kind: type[Any]) -> Iterator[Any]:
    """All objects of a kind in a tree of models."""
    if isinstance(value, kind):
        yield value
    if isinstance(value, pydantic.BaseModel):
        for name in type(value).model_fields:
            yield from inside(getattr(value, name), kind)
    elif isinstance(value, list):
        for item in value:
            yield from inside(item, kind)


def ray_cluster(manifest: Manifest) -> RayClusterSpec:
    (cluster,) = inside(manifest, RayClusterSpec)
    assert isinstance(cluster, RayClusterSpec)
    return cluster


def parse_command(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """What the command line makes of words, without running it: the command and its arguments."""
    program, *arguments = words
    assert program == "autoquant-ray"
    with click.Context(main, info_name=program) as context:
        name, command, rest = main.resolve_command(context, list(arguments))
        assert command is not None
        return str(name), command.make_context(name, rest, parent=context).params


def entrypoint(name: str) -> list[str]:
    """The words that the driver is started with."""
    manifest = parse(name)
    if name == "ray-job":
        return shlex.split(manifest.spec.entrypoint)
    if name == "ray-cron-job":
        return shlex.split(manifest.spec.jobTemplate.entrypoint)
    (container,) = inside(manifest, Container)
    return list(container.args[container.args.index("--") + 1 :])


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.name)
def test_launcher_file_fits_the_schema_of_ray(path: Path) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.name)
def test_launcher_file_wants_a_token_and_keeps_workers_off_the_head(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert "~/.ray/auth_token" in values["file_mounts"].values()
    assert not re.search(r"RAY_AUTH_TOKEN=|AKIA|PRIVATE KEY", path.read_text())
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in values[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    in_container = "--env RAY_AUTH_MODE=token" in values.get("docker", {}).get("run_options", [])
    for command in starts:
        assert in_container or command.startswith("RAY_AUTH_MODE=token ")
        assert "--metrics-export-port=8080" in command
    assert "--num-gpus=0" in starts[0]


def test_aws_file_has_a_cpu_head_and_gpu_workers_in_our_image() -> None:
    values = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    types = values["available_node_types"]
    assert "GPU" not in types[values["head_node_type"]]["resources"]
    workers = [kind for name, kind in types.items() if name != values["head_node_type"]]
    assert all(kind["resources"]["GPU"] >= 1 for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) <= values["max_workers"]
    assert values["docker"]["image"].endswith(f"/autoquant-ray:{RAY_VERSION}")


@pytest.mark.parametrize("path", KUBERNETES_FILES, ids=lambda path: path.stem)
def test_kubernetes_file_has_only_known_fields(path: Path) -> None:
    documents = read(path.stem)
    assert documents
    for document in documents:
        MANIFEST.validate_python(document)


CORE_KINDS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}-{document['metadata']['name']}")
    for path in KUBERNETES_FILES
    for document in read(path.stem)
    if document["apiVersion"] in ("v1", "batch/v1")
]
"""What is Kubernetes' own, of which it publishes schemas."""


def pod_templates(value: Any) -> Iterator[dict[str, Any]]:
    """All templates of pods in a document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("template", "submitterPodTemplate") and "containers" in inner["spec"]:
                yield inner
            else:
                yield from pod_templates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_templates(inner)


POD_TEMPLATES = [
    pytest.param(template, id=f"{name}-{number}")
    for name in RAY_OBJECTS
    for number, template in enumerate(pod_templates(read(name)))
]


@pytest.mark.parametrize("document", CORE_KINDS)
def test_kind_of_kubernetes_fits_its_own_schema(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(document, validator.latest_version(), strict=True)
    broken = document | {"spec": document["spec"] | {"schedul": "0 2 * * *"}}
    with pytest.raises(validator.ValidationError, match="schedul"):
        validator.validate(broken, validator.latest_version(), strict=True)


@pytest.mark.parametrize("template", POD_TEMPLATES)
def test_template_of_pods_fits_kubernetes_own_schema(template: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    head = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}}
    validator.validate(head | {"template": template}, validator.latest_version(), strict=True)
    (container, *_) = template["spec"]["containers"]
    wrong = [container | {"volumeMount": []}]
    broken = template | {"spec": template["spec"] | {"containers": wrong}}
    with pytest.raises(validator.ValidationError, match="volumeMount"):
        validator.validate(head | {"template": broken}, validator.latest_version(), strict=True)


def test_kueue_s_label_is_there_for_who_wants_it() -> None:
    text = (CLUSTER / "kubernetes" / "ray-job.yaml").read_text()
    label = "kueue.x-k8s.io/queue-name"
    queued = yaml.safe_load(text.replace(f"# {label}", label))
    MANIFEST.validate_python(queued)
    assert queued["metadata"]["labels"][label] == "user-queue"
    assert label not in yaml.safe_load(text)["metadata"]["labels"]
    assert queued["spec"]["shutdownAfterJobFinishes"] is True  # what Kueue asks of a RayJob


BROKEN = {
    "misspelled field": ("ray-cluster", ("spec", "headGroupSpec"), {"rayStartParam": {}}),
    "other ray version": ("ray-cluster", ("spec",), {"rayVersion": "2.59.0"}),
    "no token": ("ray-cluster", ("spec", "authOptions"), {"mode": "disabled"}),
    "long name": ("ray-cron-job", ("metadata",), {"name": "a" * 37}),
    "time zone in the schedule": ("ray-cron-job", ("spec",), {"schedule": "TZ=UTC 0 2 * * *"}),
    "overlapping nights": ("cron-job", ("spec",), {"concurrencyPolicy": "Allow"}),
    "job's field in a cron": ("ray-cron-job", ("spec",), {"entrypoint": "true"}),
    "requests below limits": (
        "ray-job",
        ("spec", "submitterPodTemplate", "spec", "containers", 0, "resources", "requests"),
        {"cpu": "100m"},
    ),
    "runs as root": (
        "ray-job",
        ("spec", "submitterPodTemplate", "spec", "securityContext"),
        {"runAsUser": 0},
    ),
    "other image": (
        "cron-job",
        ("spec", "jobTemplate", "spec", "template", "spec", "containers", 0),
        {"image": "registry.example.com/autoquant-ray:latest"},
    ),
    "secret in the file": (
        "cron-job",
        ("spec", "jobTemplate", "spec", "template", "spec", "containers", 0),
        {"env": [{"name": "RAY_AUTH_TOKEN", "value": "abc"}]},
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_kubernetes_file_is_refused(case: str) -> None:
    name, path, change = BROKEN[case]
    (document,) = read(name)
    MANIFEST.validate_python(document)
    place: Any = document
    for key in path:
        place = place[key]
    place.update(change)
    with pytest.raises(pydantic.ValidationError):
        MANIFEST.validate_python(document)


@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("ray-job", "run", {}),
        ("ray-cron-job", "nightly", {"runs": "/runs/nightly", "keep": 30}),
        ("cron-job", "nightly", {"runs": "/runs/nightly", "keep": 30}),
    ],
)
def test_entrypoint_is_understood_by_our_command_line(
    name: str, command: str, expected: dict[str, Any]
) -> None:
    parsed, parameters = parse_command(entrypoint(name))
    assert parsed == command
    job_files = [
        value
        for value in parameters.values()
        if isinstance(value, str) and value.startswith(JOB_FILES)
    ]
    assert len(job_files) == 1
    assert (ROOT / "jobs" / job_files[0].removeprefix(JOB_FILES)).exists()
    assert {key: parameters[key] for key in expected} == expected


def test_entrypoint_check_refuses_what_the_command_line_refuses() -> None:
    with pytest.raises(click.UsageError):
        parse_command(["autoquant-ray", "solve", "runs/x", "--bitz", "5"])
    with pytest.raises(click.UsageError):
        parse_command(["autoquant-ray", "sing"])
    assert parse_command(["autoquant-ray", "solve", "runs/x", "--bits", "5"])[1]["bits"] == 5


def test_fallback_cron_submits_to_the_cluster_that_stays_with_its_token() -> None:
    cluster = parse("ray-cluster").metadata.name
    (container,) = inside(parse("cron-job"), Container)
    assert container.command == ["ray", "job", "submit"]
    assert f"--address=http://{cluster}-head-svc:8265" in container.args
    (token,) = [v for v in container.env if v.name == "RAY_AUTH_TOKEN"]
    assert (token.valueFrom.secretKeyRef.name, token.valueFrom.secretKeyRef.key) == (
        cluster,
        "auth_token",
    )


def test_jobs_run_on_the_same_cluster_as_the_one_that_stays() -> None:
    specs = [ray_cluster(parse(name)) for name in RAY_OBJECTS]
    assert specs[0] == specs[1] == specs[2]


def test_ray_cluster_has_gpu_and_cpu_groups_and_a_head_without_workers() -> None:
    spec = ray_cluster(parse("ray-cluster"))
    assert spec.headGroupSpec.rayStartParams["num-cpus"] == "0"
    gpus = {
        group.groupName: group.template.spec.containers[0].resources.limits.get("nvidia.com/gpu")
        for group in spec.workerGroupSpecs
    }
    assert gpus == {"gpu": "1", "cpu": None}
    assert {g.groupName: g.minReplicas for g in spec.workerGroupSpecs} == {"gpu": 1, "cpu": 0}
    for pod in inside(spec, Pod):
        (container,) = pod.containers
        assert container.readinessProbe is not None
        assert container.livenessProbe is not None
        assert "metrics" in {port.name for port in container.ports}
        assert {"/models"} <= {m.mountPath for m in container.volumeMounts if m.readOnly}


def test_head_has_longer_to_end_than_the_driver() -> None:
    head = ray_cluster(parse("ray-cluster")).headGroupSpec.template.spec
    (container,) = head.containers
    (wait,) = [v.value for v in container.env if v.name == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert head.terminationGracePeriodSeconds > int(wait)
    assert {"/runs", "/etc/autoquant"} <= {mount.mountPath for mount in container.volumeMounts}


@pytest.mark.parametrize("subcommand", ["run", "nightly"])
def test_stop_hook_finds_the_driver_but_not_itself(subcommand: str) -> None:
    head = ray_cluster(parse("ray-cluster")).headGroupSpec.template.spec
    words = head.containers[0].lifecycle.preStop.exec.command
    patterns = set(re.findall(r"'([^']+)'", words[-1]))
    assert len(patterns) == 1
    pattern = re.compile(patterns.pop())
    driver = (
        f"/home/ray/anaconda3/bin/python3.11 /home/ray/anaconda3/bin/autoquant-ray {subcommand} x"
    )
    assert pattern.search(driver)
    assert not pattern.search(" ".join(words))
    assert not pattern.search(f"/bin/sh -c autoquant-ray {subcommand} x")


def test_claims_are_those_of_the_storage_file() -> None:
    claims = [MANIFEST.validate_python(document) for document in read("storage")]
    assert all(isinstance(claim, PersistentVolumeClaim) for claim in claims)
    assert {claim.metadata.name for claim in claims} == {"autoquant-runs", "autoquant-models"}


def test_container_file_starts_from_the_pinned_ray_and_ends_without_root() -> None:
    text = (CLUSTER / "Containerfile").read_text()
    assert re.search(rf"^ARG RAY_IMAGE=\S+/ray:{RAY_VERSION}-py311-gpu$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${RAY_IMAGE}"}
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "1000:100"
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", text, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name


def test_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [variable["definition"] for variable in dashboard["templating"]["list"][1:]]
    shown = set(re.findall(r"ray_\w+", " ".join([*expressions, *queries])))
    assert shown == {metric.exported_name for metric in METRICS}
    labels = set(re.findall(r"by \(([^)]*)\)", " ".join(expressions)))
    assert {name for group in labels for name in group.split(", ")} <= {"run_id", "stage"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_readme_names_every_file() -> None:
    text = (CLUSTER / "README.md").read_text()
    files = {p.relative_to(CLUSTER).as_posix() for p in CLUSTER.rglob("*") if p.is_file()}
    links = set(re.findall(r"\]\(([^)#]+)\)", text))
    assert files - {"README.md"} <= links
    for link in links:
        assert (CLUSTER / link).exists(), link
