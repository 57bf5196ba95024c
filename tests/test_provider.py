"""What Airflow is told of the provider is true and complete."""

from __future__ import annotations

import importlib
import inspect
import json
from importlib.metadata import entry_points
from importlib.resources import files

import jsonschema
from airflow.sdk import BaseHook, BaseOperator

from post_training.get_provider_info import OPTIONS, get_provider_info
from post_training.settings import Settings, load_settings

INFO = get_provider_info()


def test_it_has_airflows_form() -> None:
    schema = json.loads((files("airflow") / "provider_info.schema.json").read_text())
    jsonschema.validate(INFO, schema)


def test_every_module_and_class_it_names_exists() -> None:
    for kind in ("operators", "sensors", "hooks"):
        for entry in INFO[kind]:
            for module in entry["python-modules"]:
                members = vars(importlib.import_module(module)).values()
                own = [m for m in members if inspect.isclass(m) and m.__module__ == module]
                assert any(issubclass(member, BaseOperator | BaseHook) for member in own), module
    for connection in INFO["connection-types"]:
        module, _, name = connection["hook-class-name"].rpartition(".")
        hook = getattr(importlib.import_module(module), name)
        assert hook.conn_type == connection["connection-type"]
        assert hook.hook_name == connection["hook-name"]
    for path in INFO["extra-links"]:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name)


def test_every_setting_is_declared_and_read() -> None:
    assert {*Settings.__dataclass_fields__, "deployment"} == set(OPTIONS), "deployment_name reads the last"
    assert set(INFO["config"]["post_training"]["options"]) == set(OPTIONS)
    settings = load_settings()
    assert settings.allowed_roots == ()
    assert settings.home.name == "post_training"
    assert "{" not in str(settings.home)


def test_the_entry_points_lead_here() -> None:
    (provider,) = [e for e in entry_points(group="apache_airflow_provider") if e.value.startswith("post_")]
    assert provider.load()() == INFO
    (plugin,) = [e for e in entry_points(group="airflow.plugins") if e.name == "post_training"]
    assert plugin.load().name == "post_training"
