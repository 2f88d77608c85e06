"""Policies on the Hugging Face hub: one JSON file in a repository. Nothing of it is ever executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError

FILENAME = "policy.json"


def push(text: str, repo_id: str, filename: str, message: str, private: bool | None, token: str | bool | None,
         create_pr: bool, revision: str | None) -> str:  # fmt: skip
    """Write one file to a repository, which is made if it is not there. Returns the address of the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_file(
            path_or_fileobj=text.encode(), path_in_repo=filename, repo_id=repo_id, commit_message=message,
            create_pr=create_pr, revision=revision,
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"cannot write {filename} to {repo_id} on the hub: {_first_line(error)}") from error
    return str(commit)


def pull(repo_id: str, filename: str, **options: Any) -> Path:
    """One file of a repository, from the local cache if it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repo_id, filename, **options))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConfigError(f"cannot read {filename} of {repo_id} on the hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
