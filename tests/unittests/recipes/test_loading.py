"""How the package and the scripts load files.

Authors
 * The sb_memeff authors 2026
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_everything_is_loaded_with_weights_only():
    """In the package and the scripts, whatever the default of torch is."""
    found = 0
    for folder in ("sb_memeff", "recipes", "demo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text("utf-8")
            if "torch.load" not in text and "pickle" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                where = f"{path}:{node.lineno}"
                assert called not in ("pickle.load", "pickle.loads"), where
                if called == "torch.load":
                    found += 1
                    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert given.get("weights_only") == "True", where
    assert found >= 7
