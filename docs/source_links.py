"""Pages may link to files beside the documentation; in the book these are links to GitHub. Loaded by mkdocs.yml."""

import re
from typing import Any


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Replace ``](../file)`` by the address of that file."""
    address = config.extra["source"]
    return re.sub(r"\]\(\.\./(?=[\w.])", f"]({address}/blob/main/", markdown)
