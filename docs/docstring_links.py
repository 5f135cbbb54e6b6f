"""Docstrings name things as diffusers' do: [`Name`], or [`word`](Name.word). On the site these are links."""

import re
from typing import Any

import griffe

import diffusers_far

# Where the public names are defined, which is what the pages of the site show.
PLACES = {
    name: f"{module}.{name}"
    for name, module in diffusers_far._MODULES.items()
    if module.startswith("diffusers_far.")
}


def linked(text: str) -> str:
    """`text` with its links as mkdocstrings has them; names that no page shows become code."""

    def link(match: re.Match[str]) -> str:
        shown, target = match[1], match[2] or match[1]
        first, dot, rest = target.partition(".")
        return f"[`{shown}`][{PLACES[first]}{dot}{rest}]" if first in PLACES else f"`{shown}`"

    return re.sub(r"\[`([\w.]+)`\](?:\(([\w.]+)\))?(?!\[)", link, text)


class DocstringLinks(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = linked(obj.docstring.value)
