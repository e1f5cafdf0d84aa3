"""Longest files and functions of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from benchmarks.record import save

PACKAGE = Path(__file__).parent.parent / "rqvae"


def main() -> None:
    files, functions = {}, {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = str(path.relative_to(PACKAGE.parent)), path.read_text()
        files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[f"{name}:{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1

    def digest(sizes: dict[str, int]) -> dict[str, object]:
        values = list(sizes.values())
        longest = max(sizes, key=sizes.__getitem__)
        p90 = float(np.percentile(values, 90))
        return {"count": len(values), "median": float(np.median(values)), "p90": p90, "max": {longest: sizes[longest]}}

    save("code_size", {"lines": sum(files.values()), "files": digest(files), "functions": digest(functions)})


if __name__ == "__main__":
    main()
