"""The two ways of using the provider: installed from a wheel, and as Airflow's own folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("airflow_provider_post_training", "__editable__", "post_training", "lightning_modules")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every installed package but ours, as links."""
    folder = tmp_path_factory.mktemp("libraries")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OURS) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built and installed into a folder."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    target = tmp_path_factory.mktemp("installed")
    # A build leaves its folder behind, and the next one packs what is still in it.
    for name in ("plugins", "lightning_modules", "dags"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return target


def python(program: str, *search_path: Path, plugins_folder: Path | None = None) -> str:
    """Run a program that finds packages in these folders alone; return its last line."""
    environment = {
        **os.environ,
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(plugins_folder or "/nonexistent"),
        "PYTHONPATH": os.pathsep.join(map(str, search_path)),
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


PLUGINS = """
import json
from airflow.plugins_manager import get_plugin_info
print(json.dumps([str(p["source"]) for p in get_plugin_info() if p["name"] == "post_training"]))
"""
PROVIDER = """
import json
from airflow.providers_manager import ProvidersManager
manager = ProvidersManager()
ours = manager.providers["airflow-provider-post-training"]
hooks = [name for name, hook in manager.hooks.items() if name in ("mlflow", "post_training") and hook]
print(json.dumps([ours.version, sorted(hooks)]))
"""
DAGS = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag({folder})
print(json.dumps([sorted(bag.dags), bag.import_errors]))
"""
SHIPPED_DAGS = [
    "preference_optimize",
    "preference_optimize_search",
    "reconcile",
    "rollback_model",
    "scheduled_retraining",
    "supervised_fine_tune",
    "supervised_fine_tune_search",
]


def test_installed_it_is_a_provider_with_its_plugin_and_connections(libraries: Path, installed: Path) -> None:
    assert json.loads(python(PROVIDER, installed, libraries)) == ["0.1.0", ["mlflow", "post_training"]]
    (source,) = json.loads(python(PLUGINS, installed, libraries))
    assert "EntryPoint" in source


def test_installed_the_page_comes_with_it(installed: Path) -> None:
    folder = Path("plugins", "post_training", "ui")
    files = [path.relative_to(ROOT / "plugins") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if not (installed / path).is_file()] == []


def test_installed_the_dags_come_with_it(libraries: Path, installed: Path) -> None:
    program = DAGS.format(folder="__import__('post_training').__path__[0] + '/dags'")
    assert json.loads(python(program, installed, libraries)) == [SHIPPED_DAGS, {}]


def test_installed_the_command_line_comes_with_it(libraries: Path, installed: Path) -> None:
    (entry_points,) = installed.glob("airflow_provider_post_training-*.dist-info/entry_points.txt")
    assert "post-training = post_training.cli.app:app" in entry_points.read_text()
    program = "from post_training.cli.app import app; app(['--version'])"
    assert python(program, installed, libraries) == "0.1.0"
    program = "from post_training.cli.servers import dags_folder; print(dags_folder())"
    assert python(program, installed, libraries) == str(installed / "post_training" / "dags")


def test_as_folders_it_needs_no_installation(libraries: Path) -> None:
    plugins = ROOT / "plugins"
    (source,) = json.loads(python(PLUGINS, libraries, plugins_folder=plugins))
    assert "post_training_plugin.py" in source
    program = (
        "from airflow.settings import prepare_syspath_for_config_and_plugins as prepare\n"
        f"prepare()\n{DAGS.format(folder=repr(str(ROOT / 'dags')))}"
    )
    assert json.loads(python(program, libraries, plugins_folder=plugins)) == [SHIPPED_DAGS, {}]


def test_both_ways_together_register_once(libraries: Path, installed: Path) -> None:
    found = json.loads(python(PLUGINS, installed, libraries, plugins_folder=ROOT / "plugins"))
    assert len(found) == 1


def test_the_installed_trainer_is_found_by_name(libraries: Path, installed: Path) -> None:
    program = "import lightning_modules.train as t; print(t.__file__)"
    assert python(program, installed, libraries).startswith(str(installed))
