"""Counts signatures of dense code and fails where one is worse than committed.

python .ci/ratchet.py            compare with .ci/ratchet.json
python .ci/ratchet.py --write    keep today's counts, once they are better
"""

import ast
import json
import sys
from pathlib import Path

KEPT = Path(__file__).with_name("ratchet.json")
PACKED = (ast.Tuple, ast.GeneratorExp)
FOLDERS = ("allattn", "benchmarks", "tests")


def counts(folder: str) -> dict[str, float]:
    """Every signature: a share of the assignments or of 1,000 code lines, or a plain number."""
    nodes: list[ast.AST] = []
    lines: list[str] = []
    for file in sorted(Path(folder).rglob("*.py")):
        text = file.read_text(encoding="utf8")
        nodes += ast.walk(ast.parse(text))
        lines += [line for line in text.splitlines() if line.strip()]
    code = [line for line in lines if not line.lstrip().startswith("#")]
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    tuples = [node.value for node in assignments if isinstance(node.targets[0], ast.Tuple)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    arguments = [a for call in calls for a in (*call.args, *(k.value for k in call.keywords))]
    literals = [node for node in nodes if isinstance(node, ast.Starred)]
    return {
        "tuple assignments, %": 100 * sum(isinstance(v, PACKED) for v in tuples) / len(assignments),
        "generator unpackings": sum(isinstance(v, ast.GeneratorExp) for v in tuples),
        "unpacked literals": sum(isinstance(s.value, (ast.Tuple, ast.List)) for s in literals),
        "conditional arguments per 1,000 lines": per_1000(arguments, ast.IfExp, code),
        "conditional expressions per 1,000 lines": per_1000(nodes, ast.IfExp, code),
        "lines over 100 columns": sum(len(line) > 100 for line in lines),
        "code lines per comment line": len(code) / max(1, len(lines) - len(code)),
    }


def per_1000(nodes: list, kind: type, code: list[str]) -> float:
    return 1000 * sum(isinstance(node, kind) for node in nodes) / len(code)


def main() -> int:
    """Print every count beside the committed one; the number of those that rose."""
    found = {
        f"{folder}: {name}": round(value, 2)
        for folder in FOLDERS
        for name, value in counts(folder).items()
    }
    if "--write" in sys.argv:
        KEPT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf8")
    kept = json.loads(KEPT.read_text(encoding="utf8"))
    risen = [name for name in found if found[name] > kept[name]]
    for name, value in found.items():
        print(f"{name:52}{value:8.2f}{kept[name]:8.2f}{'  ROSE' if name in risen else ''}")
    return len(risen)


if __name__ == "__main__":
    sys.exit(main())
