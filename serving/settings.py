"""How this process runs: every `PENUMBRA_*` variable, read once. Else only libraries read the environment."""

import difflib
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import PILLOW_PIXELS, Limits
from penumbra.serving.engine.signature import PublicKeys, read_public_keys
from penumbra.serving.following import Followed
from penumbra.serving.keys import Keys
from penumbra.serving.tls import Certificate, follow_certificate

PREFIX = "PENUMBRA_"
NO_SETTINGS = ("PENUMBRA_GOLDEN", "PENUMBRA_KSERVE_PYTHON", "PENUMBRA_PERF_ANALYZER")
"""Variables of that prefix which our own tests read."""
LINK = re.compile(r"PENUMBRA_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP|SCTP)\w*|PORT)")
"""What Kubernetes puts into the environment for a service whose name begins with penumbra; its PORT is a URL."""


def _fitting(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(expected)
        return text

    return AfterValidator(check)


PREFIXES = r"((s3|gs|az|abfs)://[^\s/?#*\[\]]+/([^\s?#*\[\]]+/)?( +|$))*"
"""Buckets, or folders of them, with spaces between."""
ENGINE = Limits()
"""The engine's own limits, which are the defaults here."""
LONGEST_S = 1e9
"""The longest time, thirty years; what waits for much longer, or for ever, is no number to the system."""
MOST_THREADS = 1024
"""The most threads, more than any one machine has cores for; every one is made at the start."""


class Settings(BaseSettings):
    """Each field is the environment variable PENUMBRA_<NAME>; docs/operate/settings.md says what it is for.

    A 0 lets threads, lanes and the sizes of batches be found at the start, and switches watch_store_s, shadow_share,
    target_ms, cache_mb and model_mb off. Where a text is empty, there is no gRPC (grpc_address), CUDA is taken if there
    is one (device), jobs have no objects (object_prefixes), no trace is sent (otlp_endpoint), no page of another origin
    may ask (cors_origins), and everybody else may (api_keys); without trusted_keys_file any artifact is taken, and
    without tls_cert and tls_key nothing is encrypted.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    store: Path = Path("store")
    jobs: Path = Path(tempfile.gettempdir()) / "penumbra-jobs"
    grpc_address: Annotated[str, _fitting(r"(.+:\d{1,5})?", "HOST:PORT is wanted")] = "127.0.0.1:3001"
    model_control: bool = False
    watch_store_s: float = Field(0.0, ge=0, le=LONGEST_S)
    shadow_share: float = Field(0.0, ge=0, le=1)
    device: Annotated[str, _fitting(r"(cpu|cuda(:\d+)?)?", "cpu, cuda or cuda:N is wanted")] = ""
    threads: int = Field(0, ge=0, le=MOST_THREADS)
    lanes: int = Field(0, ge=0, le=MOST_THREADS)
    deterministic: bool = False
    windows_per_batch: int = Field(0, ge=0)
    samples_per_call: int = Field(0, ge=0)
    cuda_graphs: bool = False
    target_ms: float = Field(0.0, ge=0, le=1e3 * LONGEST_S)
    large_share: int = Field(ENGINE.large_share, ge=1)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    revision: str = ""
    limit_body_bytes: int = Field(64 * 2**20, ge=1)
    limit_bodies_bytes: int = Field(2**30, ge=1)
    limit_json_bytes: int = Field(8 * 2**20, ge=1)
    limit_head_bytes: int = Field(64 * 2**10, ge=1024)
    limit_pixels: int = Field(ENGINE.pixels, ge=1, le=PILLOW_PIXELS)
    limit_samples: int = Field(ENGINE.samples, ge=1)
    limit_queue_samples: int = Field(ENGINE.queue_samples, ge=1)
    limit_window_pixels: int = Field(ENGINE.window_pixels, ge=1)
    limit_memory_bytes: int = Field(ENGINE.memory_bytes, ge=1)
    limit_requests: int = Field(64, ge=1)
    limit_job_bytes: int = Field(4 * 2**30, ge=1)
    limit_job_pixels: int = Field(2_000_000_000, ge=1)
    limit_jobs: int = Field(16, ge=1)
    object_prefixes: Annotated[
        str, _fitting(PREFIXES, "prefixes as s3://bucket/folder/ with spaces between are wanted")
    ] = ""
    job_keep_s: float = Field(86_400.0, gt=0, le=LONGEST_S)
    cache_mb: int = Field(0, ge=0)
    model_mb: int = Field(0, ge=0)
    timeout_s: float = Field(300.0, gt=0, le=LONGEST_S)
    predrain_s: float = Field(2.0, ge=0, le=LONGEST_S)
    otlp_endpoint: str = ""
    cors_origins: Annotated[str, _fitting(
        r"\*|(https?://[^\s/]+( +|$))*", "origins as https://app.example with spaces between, or *, are wanted"
    )] = ""  # fmt: skip
    api_keys: SecretStr = SecretStr("")
    api_keys_file: Path | None = None
    trusted_keys_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def limits(self) -> Limits:
        """The engine's limits."""
        return Limits(
            self.limit_pixels, self.limit_samples, self.limit_queue_samples, self.limit_window_pixels,
            large_share=self.large_share, memory_bytes=self.limit_memory_bytes, model_bytes=self.model_mb * 2**20,
        )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _know_every_name(cls, values: object) -> object:
        check_environment()
        return values


def check_environment() -> None:
    """Raises ValueError with the nearest known name where a variable has our prefix and is none of ours."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name, value in os.environ.items():
        is_link = LINK.fullmatch(name) and (not name.endswith("_PORT") or "://" in value or "_SERVICE_" in name)
        if name.upper().startswith(PREFIX) and name.upper() not in known and name not in NO_SETTINGS and not is_link:
            near = difflib.get_close_matches(name.upper(), known, 1, cutoff=0)
            raise ValueError(f"{name} is no setting; the nearest is {near[0]}, and docs/operate/settings.md has all")


def check_settings() -> tuple[Settings, Keys, PublicKeys | None, Followed[Certificate] | None]:
    """The settings, and what is in the files of keys and of the certificate that they name. Raises BadOption, also for
    what this installation lacks for them."""
    settings = read_settings()
    if settings.otlp_endpoint and find_spec("opentelemetry.exporter") is None:
        raise BadOption(
            f"PENUMBRA_OTLP_ENDPOINT is {settings.otlp_endpoint!r} and the exporter is not installed; "
            "`pip install 'penumbra-serving[otlp]'` brings it"
        )
    keys = Keys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    trusted_keys = read_public_keys(settings.trusted_keys_file) if settings.trusted_keys_file else None
    return settings, keys, trusted_keys, follow_certificate(settings.tls_cert, settings.tls_key)


def paths_of(settings: Settings) -> dict[str, str]:
    """The variables that name files, as they are to be read in any directory; the server works in another than its
    caller."""
    named = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {f"{PREFIX}{name.upper()}": str(path.absolute()) for name, path in named.items() if isinstance(path, Path)}


def read_settings() -> Settings:
    """The settings of this process. Raises BadOption with every variable that has no good value."""
    try:
        return Settings()
    except ValidationError as error:
        raise BadOption("; ".join(map(_sentence_of, error.errors()))) from None


def _sentence_of(error: ErrorDetails) -> str:
    said = error["msg"].removeprefix("Value error, ").replace("Input", "input")
    if not error["loc"]:
        return said
    return f"{PREFIX}{str(error['loc'][0]).upper()} is {str(error['input'])[:60]!r}; {said}"
