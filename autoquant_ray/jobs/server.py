"""Connect to the job server of a Ray cluster, or report within seconds why that failed."""

from __future__ import annotations

import http.client
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from autoquant_ray.errors import ClusterError, ConfigError, TokenError, one_line

_TIMEOUT_S = 10.0
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.authentication.http_token_authentication",
    "ray._private.runtime_env.packaging",
)


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Ray's client would follow ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS`` instead of the address
    that it is given; here the given address is used.

    Args:
        address: ``http://HOST:8265``, of the dashboard.

    Raises:
        ConfigError: Not an address of this form.
        ClusterError: Nothing answers there, or not a Ray dashboard.
        TokenError: It requires a token, or refused the one that it got.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    address = _checked(address)
    _require_dashboard(address)
    _require_token_file()
    try:
        with _without(*_OVERRIDES):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise TokenError(_token_problem(address, str(error))) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"{address} cannot be used: {one_line(error)}") from None


def _checked(address: str) -> str:
    try:
        parts = urllib.parse.urlsplit(address)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname)
        has_user, _ = parts.username is not None, parts.port
    except ValueError:
        is_right, has_user = False, False
    if has_user:
        raise ConfigError("`address` holds a user name or password; pass a token in RAY_AUTH_TOKEN")
    if not is_right:
        raise ConfigError(
            f"`address` {address} is not the address of a Ray dashboard; write for example "
            "http://HOST:8265"
        )
    return address.rstrip("/")


def _require_dashboard(address: str) -> None:
    """Fail fast where no dashboard answers; Ray's client has no timeout."""
    remedy = "give the address of the cluster's dashboard, such as http://HOST:8265"
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=_TIMEOUT_S) as answer:
            content = json.loads(answer.read(65536))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there, and wants a token
            return
        content = None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(f"{address} cannot be reached: {reason}; {remedy}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or "ray_version" not in content:
        raise ClusterError(f"{address} answers, but not as a Ray dashboard; {remedy}")


def _require_token_file() -> None:
    """Fail with a message; Ray would end this process at an unreadable token file."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not os.environ.get("RAY_AUTH_TOKEN") and not os.access(Path(path), os.R_OK):
        raise TokenError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read")


def _token_problem(address: str, text: str) -> str:
    where = "RAY_AUTH_TOKEN or ~/.ray/auth_token; 'ray get-auth-token' on the cluster prints it"
    if "Authentication failed" in text:
        return f"{address} refused the token; give the cluster's in {where}"
    return f"{address} wants a token: set RAY_AUTH_MODE=token, and the token in {where}"


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide environment variables while the body runs."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
