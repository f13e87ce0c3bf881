"""Griffe extension: shows Sphinx roles in docstrings as code.

The docstrings name other objects as ``:class:`~eplb_fsm.core.rank.RankCore```, which editors and Sphinx
understand; the site is Markdown, where it should read `RankCore`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:py:)?(?:class|meth|func|mod|data|attr|exc|obj):`~?([^`]+)`")


class DocstringRoles(griffe.Extension):
    """Rewrites the roles of each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring; the last part of a dotted name is what is shown."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: f"`{role[1].rsplit('.', 1)[-1]}`", obj.docstring.value)
