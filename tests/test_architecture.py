"""The house's own rules: who may import whom, and how light the light parts are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("lora_core", "sweeps", "services")
"""From the bottom up: a package imports itself and those before it."""

ONLY_IN = {
    "ray": {
        "services/ray_client.py",
        "sweeps/autoscaling.py",
        "sweeps/engine.py",
        "sweeps/nodes.py",
        "sweeps/worker.py",
    },
    "optuna": {"sweeps/study.py"},
    "fsspec": {"sweeps/storage.py"},
    "mlflow": {"sweeps/tracking.py"},
    "sqlalchemy": {
        "services/store.py",
        "sweeps/database.py",
        "sweeps/ledger.py",
        "sweeps/tracking.py",
        "sweeps/tracking_address.py",
    },
    "matplotlib": {"sweeps/plots.py"},
    "transformers": {"sweeps/tasks/pretrained.py"},
    "datasets": {"sweeps/tasks/samples.py"},
    "pyarrow": {"sweeps/storage.py", "sweeps/tasks/samples.py"},
    "jinja2": {"services/templating.py", "sweeps/report.py"},
    "httpx2": {"services/connection.py"},
    "ruamel": {"sweeps/autoscaling.py", "sweeps/yaml_text.py"},
    "click": {
        "services/certifying.py",
        "services/cli.py",
        "services/discovering.py",
        "services/doctor.py",
        "services/driving.py",
        "services/exporting.py",
        "services/job_driver.py",
        "services/options.py",
        "services/outcome.py",
        "services/output.py",
        "services/progress.py",
        "services/remote_run.py",
        "services/serving.py",
        "services/showing.py",
        "services/submitting.py",
        "services/tokens.py",
        "services/translating.py",
        "services/words.py",
    },
}
"""Each heavy dependency has its one place. MLflow's database stores raise SQLAlchemy's exceptions."""

NOT_IN_LORA_CORE = {"ray", "optuna", "mlflow", "transformers", "pydantic", "sqlalchemy", "numpy", "scipy", "sklearn"}

SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path: Path):
    own = LAYERS.index(path.relative_to(ROOT).parts[0])
    assert not top_levels(path) & set(LAYERS[own + 1 :])


@pytest.mark.parametrize("dependency", ONLY_IN)
def test_a_heavy_dependency_is_imported_in_its_place_only(dependency: str):
    places = {str(path.relative_to(ROOT)) for path in SOURCES if dependency in top_levels(path)}
    assert places <= ONLY_IN[dependency]
    assert places, f"{dependency} is imported nowhere: take it off the list and out of pyproject.toml"


def test_lora_core_needs_torch_and_safetensors_only():
    found = set().union(*(top_levels(path) for path in SOURCES if "lora_core" in path.parts))
    outside = {name for name in found if name not in sys.stdlib_module_names} - {"lora_core"}
    assert outside == {"torch", "safetensors"}


def test_no_module_imports_itself_in_a_circle():
    graph = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # A package's __init__ may name its own modules: `from sweeps.export import peft`.
        graph[name] = {found for found in imports(path) if found.partition(".")[0] in LAYERS} - {name}

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        for below in graph.get(name, ()):
            visit(below, (*above, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import sweeps.spec", ("torch", "ray", "optuna", "mlflow", "numpy", "sqlalchemy")),
        ("import services.cli", ("torch", "ray", "optuna", "mlflow", "pydantic", "rich", "ruamel.yaml")),
        ("import sweeps.reduction, sweeps.records, sweeps.ledger", ("torch", "ray", "optuna", "mlflow")),
        ("import services.api, services.serving", ("torch", "ray", "optuna", "mlflow", "numpy", "matplotlib")),
        ("import services.words", ("torch", "ray", "optuna", "mlflow", "numpy", "matplotlib")),
        ("import services.pages", ("torch", "ray", "optuna", "mlflow", "numpy", "matplotlib")),
        (
            "import services.client, services.showing, services.progress, services.outcome, services.words",
            ("torch", "ray", "optuna", "mlflow", "numpy", "matplotlib", "sqlalchemy", "fastapi", "starlette"),
        ),
        ("import services.backend", ("torch", "ray", "optuna", "mlflow", "numpy", "matplotlib", "httpx2")),
        ("import sweeps.tracking", ("mlflow", "torch", "ray")),
        ("import sweeps.training", ("ray", "mlflow", "optuna")),
        (
            "import services.ray_jobs, services.remote_run, services.mlflow_server",
            ("torch", "ray", "mlflow", "optuna", "numpy"),
        ),
    ],
)
def test_light_modules_load_nothing_heavy(statement: str, heavy: tuple[str, ...]):
    probe = f"{statement}\nimport sys\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_neither_ray_nor_torch():
    probe = (
        "import sys\nfrom services.cli import cli\n"
        "try:\n    cli(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('ray', 'torch', 'mlflow', 'optuna', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip().endswith("[]")


def test_no_file_names_a_path_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    needles = [f"/{name}/" for name in ("work", "root", "opt/wheels")]
    found = []
    for name in tracked:
        text = (ROOT / name).read_text(errors="ignore") if (ROOT / name).is_file() else ""
        found += [f"{name}: {needle}" for needle in needles if needle in text]
    assert not found
