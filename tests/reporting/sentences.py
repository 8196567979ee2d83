"""All sentences that a statement can print, as its code has them; "…" is what is filled in."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fedpriv

ROOT = Path(fedpriv.__file__).parent
#: Where they are.
MODULES = (
    "privacy/advice.py",
    "privacy/charging.py",
    *(
        f"privacy/mechanisms/{name}.py"
        for name in (
            *("base", "gaussian", "allocated", "shares", "local", "silos", "scheduled"),
            "correlated",
        )
    ),
    *(
        f"reporting/{name}.py"
        for name in (
            *("audit", "cautions", "completeness", "data_statement", "overview"),
            *("sign_off", "spent", "statement", "statement_sections", "statement_users"),
        )
    ),
)
# Fewer words are a label or a part of a sentence.
_WORDS = 6


def sentences_of(module: str) -> Iterator[tuple[str, str]]:
    """Yield each sentence of a module, with the function or the constant that it is in."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    for node in tree.body:
        named = getattr(node, "name", None) or ast.unparse(node).split("=")[0].split(":")[0].strip()
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in inner:
            where = (
                f"{named}.{part.name}"
                if isinstance(part, ast.FunctionDef) and part is not node
                else named
            )
            for text in _texts(part):
                yield where, text


def _texts(tree: ast.AST) -> Iterator[str]:
    skipped: set[int] = set()
    for node in ast.walk(tree):
        inner: list[ast.AST] = []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inner = [node.value]  # a docstring
        elif isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call) and ast.unparse(node.func) == "Field"
        ):
            inner = list(ast.walk(node))
        elif isinstance(node, ast.JoinedStr):
            inner = [each for each in node.values if isinstance(each, ast.Constant)]
        skipped |= {id(each) for each in inner}
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        text = _text(node)
        if len(text.split()) >= _WORDS and not text.startswith(("#", "-")):
            yield " ".join(text.split())


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(
        str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values
    )
