"""Check pods against the restricted profile of Kubernetes' Pod Security Standards."""

from __future__ import annotations

from collections.abc import Iterator

from tests.chart.rendering import Manifest

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_PROFILES = ("RuntimeDefault", "Localhost")


def violations(pod: Manifest) -> Iterator[str]:
    """Yield the violations in a pod or in a pod's template."""
    spec = pod["spec"]
    whole = spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield name
    for volume in spec.get("volumes", ()):
        if not _VOLUMES & volume.keys():
            yield f"volume {volume['name']}"
    if whole.get("sysctls") or whole.get("seLinuxOptions"):
        yield "sysctls or seLinuxOptions"
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        own = container.get("securityContext", {})
        both = whole | own
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            yield f"{container['name']}: may be root"
        if both.get("seccompProfile", {}).get("type") not in _PROFILES:
            yield f"{container['name']}: seccompProfile"
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{container['name']}: privileges"
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{container['name']}: capabilities"
        if any("hostPort" in port for port in container.get("ports", ())) or "procMount" in own:
            yield f"{container['name']}: hostPort or procMount"
