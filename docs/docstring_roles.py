"""Makes the docstrings' ``:class:`...` `` roles and ``::`` blocks readable in Markdown; loaded by mkdocs.yml."""

import re
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr):`~?([\w.]+)`")
_PACKAGE = "lightning_adpsgd"
_IN_REFERENCE = re.findall(r"^::: ([\w.]+)", Path(__file__).with_name("reference.md").read_text(), flags=re.MULTILINE)


class DocstringRoles(griffe.Extension):
    """Turns a role into a link where the reference has the target, and into code where it has not."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that was just loaded."""
        if obj.docstring is None:
            return
        owner = obj if obj.is_class else obj.parent

        def link(match: re.Match[str]) -> str:
            name = match[1].rsplit(".", 1)[-1]
            if name[:1].isupper():
                target = known = f"{_PACKAGE}.{name}"
            else:
                known = _as_in_reference(owner)
                target = f"{known}.{name}"
            return f"[`{name}`][{target}]" if known in _IN_REFERENCE else f"`{name}`"

        text = _ROLE.sub(link, obj.docstring.value)
        obj.docstring.value = re.sub(r"(?<=\w)::$", ":", text, flags=re.MULTILINE)


def _as_in_reference(owner: griffe.Object | None) -> str:
    """The name under which the reference has a class: that of its package, without the module."""
    if owner is None or not owner.is_class:
        return ""
    packages = [_PACKAGE, *(name.rpartition(".")[0] for name in _IN_REFERENCE)]
    package = max((each for each in packages if owner.canonical_path.startswith(f"{each}.")), key=len)
    return f"{package}.{owner.name}"
