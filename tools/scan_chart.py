"""Scan the chart, rendered with each values file, with checkov.

    scan_chart.py PATH_OF_CHECKOV

Findings other than the explained ones below fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chart.rendering import VALUES, merged, render, values_of

EXPLAINED = {
    "CKV_K8S_11": "CPU limits throttle latency-bound services; requests share CPUs fairly without them",
    "CKV_K8S_15": "tags name fixed versions; pulling always would load tens of GB of CUDA at every restart",
    "CKV_K8S_43": "images are the user's own; images.digests pins them",
    "CKV_K8S_35": "the queue's URL contains its password; settings come from the environment or ConfigMaps",
}
OF_FOLLOWERS = {
    "CKV_K8S_8": "the first pod detects a hanging follower of the learner and restarts all",
    "CKV_K8S_9": "no client calls a follower of the learner, and an update must not wait for one",
}
OF_TEST_POD = {
    "CKV_K8S_8": "the pod of `helm test` runs once, to completion",
    "CKV_K8S_9": "the pod of `helm test` runs once, to completion",
}
EVERYTHING = {
    "tls": {"enabled": True, "existingSecret": "certificate"},
    "monitoring": {"podMonitor": True, "rules": True, "dashboard": True},
    "networkPolicy": {"monitors": [{"namespaceSelector": {}}]},
    "generation": {"autoscaling": {"enabled": True}},
    "learner": {"config": {"max_staleness": 1}},
    "train": {"config": {"max_staleness": 1}},
}
"""Optional parts, enabled for a second scan of each values file."""


def findings(checkov: str, folder: Path) -> list[dict[str, Any]]:
    """Return checkov's failed checks of the manifests in a folder."""
    command = [checkov, "--directory", str(folder), "--framework", "kubernetes", "--output", "json", "--quiet"]
    done = subprocess.run([*command, "--skip-download"], capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"checkov failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}") from None
    answer = answer[0] if isinstance(answer, list) else answer
    if answer["summary"]["passed"] == 0 or answer["summary"]["parsing_errors"]:
        raise SystemExit(f"checkov parsed no manifest: {answer['summary']}")
    failed: list[dict[str, Any]] = answer["results"]["failed_checks"]
    print(f"checkov: {answer['summary']['passed']} checks passed, {len(failed)} did not")
    return failed


def is_explained(finding: dict[str, Any]) -> bool:
    """Return whether a finding is accepted above."""
    check: str = finding["check_id"]
    resource: str = finding["resource"]
    return (
        check in EXPLAINED
        or (check in OF_TEST_POD and resource.endswith("-test"))
        or (check in OF_FOLLOWERS and resource.endswith("-learner-follower"))
    )


def main() -> int:
    """Render, scan and print the findings."""
    with tempfile.TemporaryDirectory() as folder:
        for name in VALUES:
            for suffix, changes in (("", {}), ("-everything", EVERYTHING)):
                manifests = render(merged(values_of(name), changes)).manifests
                path = Path(folder) / f"{name}{suffix}.yaml"
                path.write_text("---\n".join(yaml.safe_dump(manifest) for manifest in manifests))
        left = [finding for finding in findings(sys.argv[1], Path(folder)) if not is_explained(finding)]
    for finding in left:
        print(f"{finding['check_id']} {finding['check_name']}: {finding['resource']}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
