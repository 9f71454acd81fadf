"""Griffe takes a section of a docstring for one only behind an empty line, which ours do without."""

import re

import griffe

SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Raises|Returns|Yields):\n)")


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
