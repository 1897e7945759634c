"""Makes the docstrings' ``:class:`...` `` roles and ``::`` blocks readable in Markdown; loaded by mkdocs.yml."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr):`~?([\w.]+)`")
_PUBLIC = "lightning_adpsgd"


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
                return f"[`{name}`][{_PUBLIC}.{name}]"
            if owner is not None and owner.is_class:
                return f"[`{name}`][{_PUBLIC}.{owner.name}.{name}]"
            return f"`{name}`"

        text = _ROLE.sub(link, obj.docstring.value)
        obj.docstring.value = re.sub(r"(?<=\w)::$", ":", text, flags=re.MULTILINE)
