"""surgery push: what is printed where, and what a dry run shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.helpers.command_line import invoke
from tests.helpers.loopback import Hub
from tests.helpers.pushes import BASE, REPO


def test_stdout_gets_the_address_alone(hub: Hub, adapter: Path) -> None:
    arguments = ["push", adapter, REPO, "--base-model", BASE]
    result = invoke(*arguments)
    assert result.stdout == f"{hub.url}/{REPO}\n"
    assert "adapter_model.safetensors" in result.stderr and "in a new public repository" in result.stderr
    assert "no commit was made" in invoke(*arguments).stderr
    quiet = invoke(*arguments, "-q")
    assert (quiet.stdout, quiet.stderr) == (f"{hub.url}/{REPO}\n", "")
    report = json.loads(invoke(*arguments, "--json").stdout)
    assert report["command"] == "push" and report["out"] == f"{hub.url}/{REPO}" and report["unchanged"] is True
    assert {"peft_type", "modules", "trainable_parameters", "bytes", "seconds", "files", "commit_url"} <= set(report)


def test_an_error_is_one_line(hub: Hub, adapter: Path) -> None:
    result = invoke("push", adapter, REPO)
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: \S+: names 'model' on a disk, .* --base-model ORG/NAME\n", result.stderr)
    for name in ("no-organisation", "a/b/c", "org/a--b", "org/a..b", "org/-a", "https://host/org/a", f"org/{'a' * 97}"):
        result = invoke("push", adapter, name, "--base-model", BASE, "--dry-run")
        assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, name
        assert "is no repository's name" in result.stderr
    assert hub.requests == []


def test_the_plan_is_shown_before_anything_is_sent(hub: Hub, adapter: Path) -> None:
    hub.answer("GET /api/whoami", 401)
    result = invoke("push", adapter, REPO, "--base-model", BASE, "--private")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.index("org/small, branch main, private") < result.stderr.index("Error: ")
