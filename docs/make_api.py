"""Writes docs/api.md, the public names of the library with their signatures and docstrings, from the source.

python docs/make_api.py

tests/test_docs.py makes the page again and compares.
"""

import ast
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
MODULES = ("ebm", "ebm.inference", "ebm.energies", "ebm.samplers", "ebm.losses", "ebm.evaluation")
WIDTH = 100
INTRODUCTION = """# The Python interface

The public names of the library. This page is made from the docstrings by `python docs/make_api.py`. Shapes are written
`(B, *shape)`: B is the batch size, and `shape` is that of one state, (C, H, W) for an image and (D,) for a vector.
[custom_energies.md](custom_energies.md) is the guide with examples.
"""


def public(module: ModuleType) -> list[str]:
    """The names that a module lists in __all__, functions and classes only."""
    return [name for name in module.__all__ if callable(getattr(module, name))]


def is_public(item: type) -> bool:
    return any(item.__name__ in import_module(name).__all__ for name in MODULES)


def syntax(item: Any) -> Any:
    """The syntax tree of a function or a class."""
    return ast.parse(textwrap.dedent(inspect.getsource(item))).body[0]


def parameters(function: ast.FunctionDef) -> list[str]:
    """The parameters as the source writes them, without self."""
    own = function.args
    plain = [*own.posonlyargs, *own.args]
    defaults = [None] * (len(plain) - len(own.defaults)) + list(own.defaults)
    pairs = list(zip(plain, defaults, strict=True))
    if plain and plain[0].arg in ("self", "cls"):
        pairs = pairs[1:]
    texts = [parameter(*pair) for pair in pairs]
    if own.vararg:
        texts.append("*" + ast.unparse(own.vararg))
    elif own.kwonlyargs:
        texts.append("*")
    texts += [parameter(*pair) for pair in zip(own.kwonlyargs, own.kw_defaults, strict=True)]
    return [*texts, f"**{ast.unparse(own.kwarg)}"] if own.kwarg else texts


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument).strip("'")
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation else f"{text}={ast.unparse(default)}"


def call(name: str, function: ast.FunctionDef, shows_result: bool = True) -> str:
    """`name(parameters) -> result`, a parameter a line where one line is too long."""
    texts = parameters(function)
    result = f" -> {ast.unparse(function.returns)}".replace("'", "") if function.returns and shows_result else ""
    line = f"{name}({', '.join(texts)}){result}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {text}," for text in texts), f"){result}"])


def fields(item: type) -> str:
    """The fields of a named tuple or a dataclass, with their comments, as its source has them."""
    source = textwrap.dedent(inspect.getsource(item)).splitlines()
    lines = [source[node.lineno - 1 : node.end_lineno] for node in syntax(item).body if isinstance(node, ast.AnnAssign)]
    return "\n".join([f"class {item.__name__}:", *(line for part in lines for line in part)])


def methods(item: type, seen: dict[Any, str]) -> str:
    """The public methods and properties of a class: a list, then a section for each with a long signature or docstring.

    Those of a base that is not public itself count as the class's own; `seen` says which class has shown them.
    """
    entries, sections = [], []
    bases = [item, *(base for base in item.__mro__[1:] if base.__module__.startswith("ebm") and not is_public(base))]
    for name in dict.fromkeys(name for base in bases for name in vars(base)):
        member = inspect.getattr_static(item, name)
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__ or name == "forward":
            continue
        if function in seen:
            entries.append(f"- `{name}`: as in [{seen[function]}](#{seen[function].lower()})")
            continue
        seen[function] = item.__name__
        shown = name if isinstance(member, property) else call(name, syntax(function))
        text = inspect.cleandoc(function.__doc__)
        if "\n" in shown or "\n\n" in text:
            sections.append(f"#### {item.__name__}.{name}\n\n```python\n{shown}\n```\n\n{prose(text)}")
        else:
            entries.append(f"- `{shown}`: {escaped(' '.join(text.split()))}")
    return "\n\n".join(["\n".join(entries)] * bool(entries) + sections)


def signature(item: Any) -> str:
    if not inspect.isclass(item):
        return call(item.__name__, syntax(item))
    if hasattr(item, "_fields") or hasattr(item, "__dataclass_fields__"):
        return fields(item)
    start = item.__init__
    in_project = inspect.isfunction(start) and start.__module__.startswith("ebm")
    return call(item.__name__, syntax(start), shows_result=False) if in_project else f"{item.__name__}()"


def escaped(text: str) -> str:
    """Plain text as Markdown that shows it unchanged; what stands in backticks is left alone."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def prose(docstring: str) -> str:
    """A docstring as Markdown: its paragraphs, a list item for each argument below "Args:", examples as code."""
    lines, in_list, in_code = [], False, False
    for line in inspect.cleandoc(docstring).splitlines():
        if line.startswith(">>> ") != in_code:
            in_code = not in_code
            lines.append("```python" if in_code else "```")
        if line.strip() == "Args:":
            in_list = True
            continue
        in_list = in_list and (not line or line.startswith("    "))
        entry = re.match(r"    ([\w, *]+): (.*)", line) if in_list else None
        if entry:
            lines.append(f"- `{entry[1]}`: {escaped(entry[2])}")
        elif in_code:
            lines.append(line.removeprefix(">>> "))
        else:
            lines.append(escaped(line.removeprefix("  ") if in_list else line))
    return "\n".join(lines + ["```"] * in_code)


def entry(item: Any, seen: dict[Any, str]) -> str:
    docstring = item.__doc__ if inspect.isclass(item) else inspect.getdoc(item)
    parts = [f"### {item.__name__}", f"```python\n{signature(item)}\n```"]
    # A named tuple without a docstring has one that Python made of its fields.
    if docstring and not docstring.startswith(f"{item.__name__}("):
        parts.append(prose(docstring))
    if inspect.isclass(item):
        parts.append(methods(item, seen))
    return "\n\n".join(part for part in parts if part)


def page() -> str:
    parts, seen = [INTRODUCTION.rstrip()], {}
    for name in MODULES:
        module = import_module(name)
        parts += [f"## {name}", prose(module.__doc__ or "")]
        parts += [entry(getattr(module, public_name), seen) for public_name in public(module)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page())
