"""`make rules`: write prometheus/rules.yaml as the object that the Prometheus Operator reads.

The rules are only indented, so comments and order stay as they are.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RULES = HERE / "prometheus" / "rules.yaml"
OBJECT = HERE / "k8s" / "base" / "prometheusrule.yaml"
HEAD = """\
# deploy/prometheus/rules.yaml for the Prometheus Operator, made by `make rules`; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: ralf}
spec:
  groups:
"""


def as_object(rules: str) -> str:
    """The rules, put under the object's `spec`."""
    _, _, groups = rules.partition("groups:\n")
    lines = groups.splitlines(keepends=True)
    return HEAD + "".join("  " + line if line.strip() else line for line in lines)


def main() -> int:
    """Write the object beside the other manifests."""
    OBJECT.write_text(as_object(RULES.read_text()))
    print(OBJECT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
