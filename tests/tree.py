"""The tree of packages in CONTRIBUTING.md, from their docstrings. `make readme` writes it; a test compares."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
WIDTH = 20


def floors() -> list[list[str]]:
    """The names at the top of `job/`, as the import contract orders them: who imports stands above."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["job"])
    return [layer.split(" | ") for layer in layers]


def tree() -> str:
    """One line for each package, and for the two modules beside them; packages inside packages are indented."""
    lines = ["job/"]
    for name in (name for floor in floors() for name in floor):
        lines += _lines(ROOT / "job" / name, depth=1)
    return "\n".join(lines) + "\n"


def _lines(path: Path, *, depth: int) -> list[str]:
    if not path.is_dir():
        return [_line(f"{path.name}.py", path.with_suffix(".py"), depth)]
    inner = sorted(inside.parent for inside in path.glob("*/__init__.py"))
    below = [line for folder in inner for line in _lines(folder, depth=depth + 1)]
    return [_line(f"{path.name}/", path / "__init__.py", depth), *below]


def _line(name: str, module: Path, depth: int) -> str:
    return f"{'  ' * depth}{name}".ljust(WIDTH) + f" {_first_sentence(module)}"


def _first_sentence(module: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(module.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", text)[0].removesuffix(".")


def rendered(text: str) -> str:
    """CONTRIBUTING.md with the tree as the code has it now."""
    pattern = r"(<!-- packages: written by make readme -->\n```text\n).*?(```\n)"
    return re.sub(pattern, lambda match: match[1] + tree() + match[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    CONTRIBUTING.write_text(rendered(CONTRIBUTING.read_text()))
