"""The fields of Kubernetes' and KubeRay's objects that the files under cluster/kubernetes use.

A field that is misspelled, at the wrong place or of the wrong type is an error here, as it would be
at a cluster with strict validation. Names: the references of Kubernetes and of KubeRay 1.7.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

ROOT = Path(__file__).parents[2]
(RAY_VERSION,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(m|Mi|Gi|Ti)?$")]
Resources = dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]
Seconds = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
Schedule = Annotated[str, Field(pattern=r"^[-0-9*,/]+( [-0-9*,/]+){4}$")]
"""Five fields of numbers; this leaves no room for ``TZ=``, which both kinds of cron refuse."""
Image = Annotated[str, Field(pattern=rf"^registry\.example\.com/autoquant-ray:{RAY_VERSION}$")]


class Strict(BaseModel):
    """Knows its fields and no others, and converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SecretKey(Strict):
    name: Name
    key: str
    optional: bool = False


class ValueFrom(Strict):
    secretKeyRef: SecretKey


class Variable(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: str | None = None
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        assert (self.value is None) != (self.valueFrom is None), "a value or its place"
        is_secret = re.search(r"TOKEN|KEY|SECRET|PASSWORD", self.name)
        assert not is_secret or self.valueFrom is not None, "a secret stands in the file"
        return self


class Requirements(Strict):
    requests: Resources
    limits: Resources

    @model_validator(mode="after")
    def _check(self) -> Self:
        assert self.requests == self.limits, "requests and limits differ"
        assert {"cpu", "memory"} <= set(self.requests), "cpu and memory must be there"
        return self


class HttpGet(Strict):
    path: Literal["/api/healthz", "/api/local_raylet_healthz"]
    port: Port


class Probe(Strict):
    httpGet: HttpGet
    initialDelaySeconds: Seconds
    periodSeconds: Seconds
    timeoutSeconds: Seconds
    failureThreshold: Seconds


class Exec(Strict):
    command: list[str]


class Handler(Strict):
    exec: Exec


class Lifecycle(Strict):
    preStop: Handler


class Capabilities(Strict):
    drop: list[Literal["ALL"]] = Field(min_length=1)


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class ContainerPort(Strict):
    name: Name
    containerPort: Port


class Mount(Strict):
    name: Name
    mountPath: Annotated[str, Field(pattern=r"^/")]
    readOnly: bool = False


class Container(Strict):
    name: Literal["ray-head", "ray-worker", "ray-job-submitter", "submit"]
    image: Image
    command: list[str] = []
    args: list[str] = []
    ports: list[ContainerPort] = []
    resources: Requirements
    env: list[Variable] = []
    volumeMounts: list[Mount] = []
    readinessProbe: Probe | None = None
    livenessProbe: Probe | None = None
    securityContext: ContainerSecurity
    lifecycle: Lifecycle | None = None


class Claim(Strict):
    claimName: Literal["autoquant-runs", "autoquant-models"]
    readOnly: bool = False


class ConfigMap(Strict):
    name: Literal["autoquant-jobs"]


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    configMap: ConfigMap | None = None


class PodSecurity(Strict):
    runAsNonRoot: Literal[True]
    runAsUser: Annotated[int, Field(gt=0)]
    runAsGroup: Annotated[int, Field(gt=0)]
    fsGroup: int | None = None
    fsGroupChangePolicy: Literal["OnRootMismatch"] | None = None


class Toleration(Strict):
    key: Literal["nvidia.com/gpu"]
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class Pod(Strict):
    restartPolicy: Literal["Never"]
    terminationGracePeriodSeconds: Seconds | None = None
    automountServiceAccountToken: bool | None = None
    securityContext: PodSecurity
    tolerations: list[Toleration] = []
    containers: list[Container] = Field(min_length=1, max_length=1)
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        mounted = {mount.name for mount in self.containers[0].volumeMounts}
        assert mounted == {volume.name for volume in self.volumes}, "mounts and volumes differ"
        has_gpu = "nvidia.com/gpu" in self.containers[0].resources.limits
        assert has_gpu == bool(self.tolerations), "GPU nodes are tainted, others are not"
        return self


class Template(Strict):
    spec: Pod


class AuthOptions(Strict):
    mode: Literal["token"]


class AutoscalerOptions(Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: Seconds
    upscalingMode: Literal["Default", "Conservative"]
    resources: Requirements


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: Template

    @model_validator(mode="after")
    def _check(self) -> Self:
        assert self.minReplicas <= self.replicas <= self.maxReplicas, "replicas out of bounds"
        return self


class RayClusterSpec(Strict):
    rayVersion: str = Field(pattern=rf"^{RAY_VERSION}$")
    authOptions: AuthOptions
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class SubmitterConfig(Strict):
    backoffLimit: Count


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode"]
    submitterConfig: SubmitterConfig
    submitterPodTemplate: Template
    backoffLimit: Count
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: Count
    activeDeadlineSeconds: Seconds
    rayClusterSpec: RayClusterSpec


class RayCronJobSpec(Strict):
    schedule: Schedule
    timeZone: Literal["Etc/UTC"]
    suspend: bool
    jobTemplate: RayJobSpec


class JobSpec(Strict):
    backoffLimit: Count
    activeDeadlineSeconds: Seconds
    template: Template


class JobTemplate(Strict):
    spec: JobSpec


class CronJobSpec(Strict):
    schedule: Schedule
    timeZone: Literal["Etc/UTC"]
    concurrencyPolicy: Literal["Forbid"]
    startingDeadlineSeconds: Seconds
    successfulJobsHistoryLimit: Count
    failedJobsHistoryLimit: Count
    jobTemplate: JobTemplate


class Storage(Strict):
    storage: Quantity


class StorageRequest(Strict):
    requests: Storage


class ClaimSpec(Strict):
    accessModes: list[Literal["ReadWriteMany"]] = Field(min_length=1)
    storageClassName: str
    resources: StorageRequest


class Selector(Strict):
    matchLabels: dict[str, str]


class MetricsEndpoint(Strict):
    port: Name
    interval: Annotated[str, Field(pattern=r"^[0-9]+s$")]
    scrapeTimeout: Annotated[str, Field(pattern=r"^[0-9]+s$")]


class PodMonitorSpec(Strict):
    selector: Selector
    podTargetLabels: list[str]
    podMetricsEndpoints: list[MetricsEndpoint]


def metadata(longest_name: int) -> type[Strict]:
    """Metadata whose name leaves room for what a controller appends to it."""

    class Metadata(Strict):
        name: Annotated[Name, Field(max_length=longest_name)]
        labels: dict[str, str] = {}

    return Metadata


Metadata36, Metadata47, Metadata52, Metadata53 = map(metadata, (36, 47, 52, 53))


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata53
    spec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata47
    spec: RayJobSpec


class RayCronJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCronJob"]
    metadata: Metadata36
    spec: RayCronJobSpec


class CronJob(Strict):
    apiVersion: Literal["batch/v1"]
    kind: Literal["CronJob"]
    metadata: Metadata52
    spec: CronJobSpec


class PersistentVolumeClaim(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata53
    spec: ClaimSpec


class PodMonitor(Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata53
    spec: PodMonitorSpec


Manifest = RayCluster | RayJob | RayCronJob | CronJob | PersistentVolumeClaim | PodMonitor
MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])
