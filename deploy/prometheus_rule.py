"""deploy/prometheus/rules.yaml as the object that the Prometheus Operator reads: `make rules`.

The rules are indented and nothing else, so that comments and order stay.
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
    """The rules under `spec`."""
    _, _, groups = rules.partition("groups:\n")
    lines = groups.splitlines(keepends=True)
    return HEAD + "".join("  " + line if line.strip() else line for line in lines)


def main() -> int:
    """Write it."""
    OBJECT.write_text(as_object(RULES.read_text()))
    print(OBJECT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
