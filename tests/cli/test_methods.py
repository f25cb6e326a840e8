"""surgery methods: the table, as JSON, and quiet."""

from __future__ import annotations

import dataclasses
import json

from surgery.methods.catalogue import MethodInfo
from surgery.methods.registry import method_infos, method_names
from tests.helpers.command_line import invoke


def test_methods_table() -> None:
    result = invoke("methods")
    assert result.stderr == ""
    header, _, *rows = result.stdout.splitlines()
    assert header.split()[:1] == ["method"] and max(map(len, result.stdout.splitlines())) <= 80
    for row, info in zip(rows, method_infos(), strict=False):
        assert row.startswith(info.name) and info.change in row and row.endswith(info.peft_type)
    for info in method_infos():
        assert f"{info.name}: {info.title}, {info.paper}" in rows
        assert f"  trains {info.trains}" in rows and f"  stores {info.stores}" in rows


def test_methods_json() -> None:
    (line,) = invoke("methods", "--json").stdout.splitlines()
    report = json.loads(line)
    assert report["command"] == "methods"
    assert [row["name"] for row in report["methods"]] == method_names()
    fields = {field.name for field in dataclasses.fields(MethodInfo)}
    assert all(set(row) == fields for row in report["methods"])


def test_methods_quiet() -> None:
    assert invoke("methods", "-q").stdout.split() == method_names()
