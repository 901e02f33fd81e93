"""What an administrator sets: from the environment, prefix `LORA_SWEEPS_`, and from the options of `serve`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sweeps.errors import InputError

_PREFIX = "LORA_SWEEPS_"

NOT_SETTINGS = frozenset({"HOME", "CHECKPOINTS", "DATABASE", "DATABASE_FILE", "SERVER", "TOKEN", "TOKEN_FILE", "LOCK"})
"""Names with the prefix that other parts read: the state directory, checkpoints, the ledger, the client."""

_List = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Settings of a service. Lists are written with commas between: `LORA_SWEEPS_ALLOWED_HOSTS=a.example,b.example`."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback: only with tokens, and with TLS or behind a proxy that has it."""
    port: int = Field(8321, ge=0, le=65535)
    """Port to listen on; 0: any free one."""
    allowed_hosts: _List = ()
    """Names that requests may call the service by, beside localhost and `host`."""
    behind_proxy: bool = False
    """Whether a proxy in front of it has TLS, and says who asks in X-Forwarded-For."""
    proxies: _List = ("127.0.0.1",)
    """Addresses of that proxy, the only ones whose X-Forwarded-For is believed."""
    tls_certificate: Path | None = None
    """PEM file with the certificate and its chain."""
    tls_key: Path | None = None
    """PEM file with its key."""

    models: Path | None = None
    """Root of the models that specs may name."""
    data: Path | None = None
    """Root of the data that specs may name."""
    entrypoints: _List = ()
    """Functions, as package.module:function, that specs with `task: {type: python}` may name; none by default."""

    devices: int | None = Field(None, ge=1, le=1_000_000)
    """GPUs, or CPU cores where there are none, that all sweeps together may use; None: those of this machine."""
    most_workers: int | None = Field(None, ge=1)
    """Workers that one sweep gets at most; None: as many as there are devices for."""
    ray_address: str | None = None
    """Dashboard of a Ray cluster (http://HEAD:8265), where each sweep is a Ray job; None: processes on this machine."""

    user_running: int | None = Field(None, ge=1)
    """Sweeps that one user may have running at once."""
    user_trials: int | None = Field(None, ge=1)
    """Trials that one user's unfinished sweeps may have together."""
    user_device_hours: float | None = Field(None, gt=0)
    """Device-hours that one user may use within the window; beyond them sweeps wait, and running ones are paused."""
    window_hours: float = Field(168.0, gt=0)
    """Hours that device-hours are counted over: for the limit, and for whose turn it is."""
    weights: Annotated[dict[str, float], NoDecode] = {}
    """Users' shares, where they are not 1: `alice=2,bob=0.5`."""

    tracking_uri: SecretStr | None = None
    """MLflow's tracking URI; None: MLFLOW_TRACKING_URI, else a database in the state directory."""
    with_mlflow: bool = False
    """Whether the service runs an MLflow server of its own, on loopback."""
    mlflow_port: int = Field(5000, ge=1, le=65535)
    """Its port."""
    mlflow_database: SecretStr | None = None
    """Where it keeps runs; None: a SQLite file in the state directory."""
    mlflow_url: str | None = None
    """Where people reach MLflow, if that is another address than the tracking URI."""

    planners: int = Field(1, ge=1, le=16)
    """Processes that plan sweeps and render reports."""
    planning_s: float = Field(120.0, gt=0)
    """Seconds that a plan or a report may take."""
    cancel_s: float = Field(120.0, gt=0)
    """Seconds that a cancelled sweep has to end in order, before it is killed."""

    @field_validator("allowed_hosts", "entrypoints", "proxies", mode="before")
    @classmethod
    def _split(cls, raw: Any) -> Any:
        return tuple(part.strip() for part in raw.split(",") if part.strip()) if isinstance(raw, str) else raw

    @field_validator("weights", mode="before")
    @classmethod
    def _split_weights(cls, raw: Any) -> Any:
        if not isinstance(raw, str):
            return raw
        pairs = [part.partition("=") for part in raw.split(",") if part.strip()]
        return {user.strip(): weight for user, _, weight in pairs}

    @field_validator("weights")
    @classmethod
    def _are_positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for user, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {user} must be a number above 0; found {weight:g}")
        return weights

    @field_validator("models", "data")
    @classmethod
    def _is_a_directory(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError(f"must be a directory; {path} is none")
        return path if path is None else path.resolve()

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: set both or neither")
        return self

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every name that requests may call the service by."""
        own = () if self.host in ("0.0.0.0", "::") else (self.host,)
        return tuple(dict.fromkeys((*own, "localhost", "127.0.0.1", "[::1]", *self.allowed_hosts)))


def read_settings(options: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads the settings; options win over the environment.

    Args:
        options: of the command line; None where one was not given.
        environment: the variables, for which names with the prefix that nobody reads are refused: a limit that is
            misspelt would not hold.

    Raises:
        InputError: every wrong one, with its name, what was required and what was found.
    """
    known = {name.upper() for name in Settings.model_fields} | NOT_SETTINGS
    faults = []
    for name in environment:
        if name.startswith(_PREFIX) and (own := name.removeprefix(_PREFIX)) not in known:
            near = difflib.get_close_matches(own, known, 1)
            faults.append(f"{name}: no such setting" + (f"; did you mean {_PREFIX}{near[0]}?" if near else ""))
    settings: Settings | None = None
    try:
        settings = Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        for one in error.errors(include_url=False, include_input=False):
            where = _PREFIX + ".".join(str(part).upper() for part in one["loc"]) if one["loc"] else "settings"
            faults.append(f"{where}: {one['msg'].removeprefix('Value error, ')}")
    if settings is None or faults:
        raise InputError("the service's settings must be right before it starts:\n  " + "\n  ".join(faults))
    return settings
