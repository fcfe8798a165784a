"""Settings: what is none, or has no good value, is refused by name, and every one is documented."""

import re
from pathlib import Path

import pytest

from penumbra.models.errors import BadOption
from penumbra.serving.settings import Settings, read_settings

PAGE = Path(__file__).parents[2] / "docs" / "operate" / "settings.md"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PENUMBRA_TIMEOUT", "PENUMBRA_TIMEOUT_S"), ("PENUMBRA_API_KEY_FILE", "PENUMBRA_API_KEYS_FILE"),
        ("PENUMBRA_THREAD", "PENUMBRA_THREADS"), ("penumbra_devise", "PENUMBRA_DEVICE"), ("PENUMBRA_", "PENUMBRA_"),
        ("PENUMBRA_PORT", "PENUMBRA_"),
    ],
)  # fmt: skip
def test_an_unknown_variable_is_refused_with_the_nearest_known_one(
    name: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0123456789-secret")
    with pytest.raises(BadOption, match=f"^{name} is no setting; the nearest is {nearest}") as refusal:
        read_settings()
    assert "secret" not in str(refusal.value)
    with pytest.raises(ValueError, match="is no setting"):
        Settings()


def test_what_kubernetes_and_our_own_tests_set_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PENUMBRA_SERVICE_HOST": "10.0.0.1", "PENUMBRA_SERVICE_PORT": "3000", "PENUMBRA_SERVICE_PORT_HTTP": "3000",
        "PENUMBRA_PORT": "tcp://10.0.0.1:3000", "PENUMBRA_PORT_3000_TCP": "tcp://10.0.0.1:3000",
        "PENUMBRA_PORT_3000_TCP_ADDR": "10.0.0.1", "PENUMBRA_GPU_SERVICE_HOST": "10.0.0.2",
        "PENUMBRA_GOLDEN": "/golden",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert read_settings() == Settings()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LIMIT_PIXELS", "many", "valid integer"), ("CACHE_MB", "-1", "greater than or equal to 0"),
        ("DEVICE", "foo", "cuda:N"), ("DEVICE", "cuda:x", "cuda:N"), ("LOG_LEVEL", "loud", "'WARNING'"),
        ("GRPC_ADDRESS", "here", "HOST:PORT"), ("MODEL_CONTROL", "perhaps", "boolean"), ("TIMEOUT_S", "0", "greater"),
        ("THREADS", "999999999999", "equal to 1024"), ("LANES", "1025", "equal to 1024"),
        *((name, value, "less than or equal to 1000000000") for value in ("inf", "1e300")
          for name in ("TIMEOUT_S", "WATCH_STORE_S", "PREDRAIN_S", "JOB_KEEP_S", "TARGET_MS")),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_name_the_value_and_what_would_be_right(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PENUMBRA_{name}", value)
    with pytest.raises(BadOption) as refusal:
        read_settings()
    sentence = str(refusal.value)
    assert sentence.startswith(f"PENUMBRA_{name} is '{value}'; ") and expected in sentence and "\n" not in sentence


def test_the_page_of_settings_has_them_all_and_no_others() -> None:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    names = [name for line in table for name in re.findall(r"`PENUMBRA_(\w+)`", line)]
    assert sorted(names) == sorted(name.upper() for name in Settings.model_fields)
