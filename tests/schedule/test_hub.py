"""Policies on the hub: what its client is asked for, with a client that only writes that down. No network."""

from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.schedule import Policy

POLICY = Policy(points=[(1.0, 0.5), (0.4, 0.0)], measured={"speedup": 1.5})


@pytest.fixture
def api(monkeypatch):
    """A hub of one process: repositories as dicts of files."""
    seen = SimpleNamespace(repos={}, calls=[])

    class Api:
        def __init__(self, token=None):
            seen.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            full = repo_id if "/" in repo_id else f"me/{repo_id}"
            seen.repos.setdefault(full, {})
            seen.private = private
            return SimpleNamespace(repo_id=full)

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **more):
            seen.repos[repo_id][path_in_repo] = path_or_fileobj
            seen.calls.append(more)
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return seen


def test_push(api):
    url = POLICY.push_to_hub("sd-policies", "sd15.json", private=True, token="t", create_pr=True)
    assert url == "https://hub/me/sd-policies/commit/1"
    assert (api.token, api.private) == ("t", True)
    assert Policy.from_dict(json.loads(api.repos["me/sd-policies"]["sd15.json"])) == POLICY
    (more,) = api.calls
    assert more == {
        "commit_message": "Upload sd15.json with diffusion_tokred", "create_pr": True, "revision": None,
    }  # fmt: skip
    POLICY.push_to_hub("you/p", commit_message="Tuned again")
    assert list(api.repos["you/p"]) == ["policy.json"] and api.calls[-1]["commit_message"] == "Tuned again"


def test_what_cannot_be_pushed(api, monkeypatch):
    with pytest.raises(ConfigError, match="function cannot be saved"):
        Policy(function=abs).push_to_hub("you/p")
    assert not api.repos

    def refuse(*_, **__):
        raise HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'a/b/c'.\nMore.")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ConfigError, match=r"cannot write policy.json to a/b/c on the hub: Repo id .*'a/b/c'\.$"):
        POLICY.push_to_hub("a/b/c")


def test_pull(monkeypatch, tmp_path):
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        POLICY.save(tmp_path / "cached.json")
        return str(tmp_path / "cached.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Policy.from_hub("you/p", revision="v1", local_files_only=True) == POLICY
    repo, name, options = asked[0]
    assert (repo, name, options["revision"], options["local_files_only"]) == ("you/p", "policy.json", "v1", True)


def test_what_cannot_be_pulled(monkeypatch, tmp_path):
    path = tmp_path / "cached.json"

    def refuse(*_, **__):
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ConfigError, match=r"cannot read policy.json of you/p on the hub: Cannot find the requested"):
        Policy.from_hub("you/p")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    for text, says in [
        ("import os", "is not JSON"),
        ('{"_type": "Policy", "_version": 9, "points": []}', "version 9, this release reads up to 2: update"),
        ("[" * 200_000, "is not JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"you/p/sub/x.json.*{says}"):
            Policy.from_hub("you/p", "x.json", subfolder="sub")
