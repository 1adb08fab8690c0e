"""Settings: precedence, and errors that name the path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cola_runtime.config import ServiceSettings, client_settings, join_settings, service_settings
from cola_runtime.errors import InvalidInput
from cola_runtime.process_environment import own_ray_environment


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "COLA_BASE_MODELS__0__DTYPE",
        "COLA_BASE_MODELS__1__DTYPE",
        "COLA_LISTEN",
        "COLA_API_KEY",
        "RAY_ADDRESS",
        "COLA_ADAPTER_MODULES",
    ):
        monkeypatch.delenv(name, raising=False)


def settings_file(folder: Path, text: str) -> Path:
    path = folder / "service.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flag_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settings_file(
        tmp_path, "base_models: [{dtype: bfloat16, threads: 3}]\ndevices: {count: 5}\nlisten: 127.0.0.1:1\n"
    )
    monkeypatch.setenv("COLA_BASE_MODELS__0__DTYPE", "float64")
    monkeypatch.setenv("COLA_LISTEN", "127.0.0.1:2")
    settings = service_settings(file, listen="127.0.0.1:3", devices={"count": None})
    assert settings.listen == "127.0.0.1:3"
    assert settings.base_models[0].dtype == "float64"
    assert settings.base_models[0].threads == 3
    assert settings.devices.count == 5
    assert settings.scheduler.base_steps_in_flight == 2


def test_several_base_models_are_a_list_of_which_flags_and_numbers_in_the_environment_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settings_file(
        tmp_path,
        "base_models:\n- {name: one, replicas: 2, bind: '0.0.0.0:8440'}\n- {name: two, token_budget: 4096}\n",
    )
    monkeypatch.setenv("COLA_BASE_MODELS__1__DTYPE", "float64")
    settings = service_settings(file, base_models=[{"threads": 3, "name": None}])
    one, two = settings.base_models
    assert (one.name, one.threads, one.replicas, one.dtype) == ("one", 3, 2, "float32")
    assert (two.name, two.threads, two.token_budget, two.dtype) == ("two", 1, 4096, "float64")
    assert [one.of_replica(number).bind for number in range(2)] == ["0.0.0.0:8440", "0.0.0.0:8441"]
    assert two.of_replica(1).bind == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_models: []", "base_models"),
        ("base_models: [{name: a}, {name: a}]", "two base models are named a"),
        ("base_models: [{name: a, bind: 'h:10', replicas: 3}, {name: b, bind: 'h:12'}]", "listen on port 12"),
        ("base_models: [{bind: everywhere}]", r"base_models\.0\.bind"),
        ("base_models: [{replicas: 0}]", r"base_models\.0\.replicas"),
    ],
)
def test_base_models_that_cannot_be_served_together_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        service_settings(settings_file(tmp_path, text))


def test_an_unknown_key_is_named_with_its_path_and_file(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "scheduler: {token_bugdet: 5}\n")
    with pytest.raises(InvalidInput, match=r"scheduler\.token_bugdet") as failure:
        service_settings(file)
    assert failure.value.reason == "SETTING_INVALID"
    assert failure.value.where == str(file)


def test_a_value_out_of_range_is_named_with_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLA_BASE_MODELS__0__DTYPE", "float8")
    with pytest.raises(InvalidInput, match=r"base_models\.0\.dtype"):
        service_settings()


@pytest.mark.parametrize("text", ["- a list\n", "a: [unclosed\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        service_settings(settings_file(tmp_path, text))
    assert failure.value.reason == "SETTING_FILE"


def test_an_existing_cluster_is_taken_from_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert service_settings().ray_address == "head:6379"


def test_a_key_never_shows_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLA_API_KEY", "tml-secret")
    settings = client_settings()
    assert settings.api_key.get_secret_value() == "tml-secret"
    assert "tml-secret" not in repr(settings)


def test_adapter_modules_are_a_list_in_the_file_and_commas_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settings_file(tmp_path, "adapter_modules: [one, two.three]\n")
    assert service_settings(file).adapter_modules == ("one", "two.three")
    monkeypatch.setenv("COLA_ADAPTER_MODULES", "four, five.six")
    assert service_settings(file).adapter_modules == ("four", "five.six")
    assert join_settings().adapter_modules == ("four", "five.six")
    assert service_settings(file, adapter_modules=["seven"]).adapter_modules == ("seven",)


@pytest.mark.parametrize("name", ["../up", "a b", "a.", "1a", "a-b", "a;b"])
def test_an_adapter_module_is_a_dotted_python_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="adapter_modules"):
        service_settings(adapter_modules=[name])


def test_a_database_is_named_by_a_postgresql_url_which_no_error_and_no_listing_shows() -> None:
    secret = "postgresql://cola:hunter2@db/cola"
    settings = ServiceSettings.model_validate({"database": secret})
    assert settings.store_url == secret
    assert "hunter2" not in repr(settings) + settings.model_dump_json()
    assert ServiceSettings(data_dir=Path("/data")).store_url == "sqlite:////data/jobs.sqlite"
    with pytest.raises(InvalidInput) as caught:
        service_settings(database="mysql://cola:hunter2@db/cola")
    assert caught.value.violations[0].where == "database"
    assert "hunter2" not in f"{caught.value} {caught.value.violations}"


def test_a_services_own_ray_is_told_to_stay_on_loopback_and_to_ask_for_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    with own_ray_environment(tmp_path / "ray-token"):
        assert os.environ == {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "ray-token"),
        }
    assert os.environ == {}


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_of_ray_that_the_environment_names_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "environ", {name: "the operator's"})
    with own_ray_environment(tmp_path / "ray-token"):
        named = {each: value for each, value in os.environ.items() if each.startswith("RAY_AUTH_TOKEN")}
        assert named == {name: "the operator's"}
    assert os.environ == {name: "the operator's"}
