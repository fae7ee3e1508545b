"""Import rules, read from the source, and the modules that light imports load, tried."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "cnnopt").rglob("*.py"))
}
# The launcher also runs on hosts that have neither TensorFlow nor Horovod but in an image.
PURE = [
    "cnnopt.config",
    "cnnopt.schedules",
    "cnnopt.model.topology",
    "cnnopt.distributed.child",
    "cnnopt.distributed.cpu_tuning",
    "cnnopt.distributed.slurm",
    "cnnopt.distributed.rendezvous",
    "cnnopt.launch",
]
# That cnnopt.quantize needs Horovod for --qat alone is tried in test_quantize.py, without Horovod.
NO_HOROVOD = [
    "cnnopt.model.resnet",
    "cnnopt.compare",
    "cnnopt.study",
    *(name for name in MODULES if name.startswith("cnnopt.export")),
]


def imports(source: str, package: str = "cnnopt") -> set[str]:
    """Every module that the source imports anywhere in it, under its full name.

    ``from a import b`` counts as both ``a`` and ``a.b``, since ``b`` may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"{package}.{base}".rstrip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def reached(module: str) -> set[str]:
    """The modules of cnnopt that importing this one loads, itself among them."""
    todo, seen = [module, "cnnopt"], set()
    while todo:
        name = todo.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            todo += imports(MODULES[name].read_text())
    return seen


def test_imports_are_found_wherever_and_however_they_are_written():
    source = """
import a.b
from c import d
from . import e
from .f import g
def inside():
    import h
"""
    assert imports(source) == {"a.b", "c", "c.d", "cnnopt", "cnnopt.e", "cnnopt.f", "cnnopt.f.g", "h"}


def definitions(source: str) -> set[str]:
    """Every name that the source defines anywhere in it."""
    nodes = list(ast.walk(ast.parse(source)))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_a_name_is_imported_from_the_module_that_defines_it():
    sources = [*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "train_hvd.py"]
    defined = {name: definitions(path.read_text()) for name, path in MODULES.items()}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cnnopt"):
                for alias in node.names:
                    known = f"{node.module}.{alias.name}" in MODULES or alias.name in defined.get(node.module, ())
                    assert known, f"{path}: {alias.name} is not defined in {node.module}"


def test_only_distributed_imports_horovod():
    importers = [name for name, path in MODULES.items() if "horovod" in tops(imports(path.read_text()))]
    assert importers == ["cnnopt.distributed.collectives"]
    assert "horovod" not in tops(imports((ROOT / "train_hvd.py").read_text()))


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_need_the_standard_library_only(module):
    for name in reached(module):
        foreign = tops(imports(MODULES[name].read_text())) - sys.stdlib_module_names - {"cnnopt"}
        assert not foreign, f"{module} reaches {name}, which imports {sorted(foreign)}"


@pytest.mark.parametrize("module", NO_HOROVOD)
def test_models_and_export_do_not_need_horovod(module):
    assert "cnnopt.distributed.collectives" not in reached(module)


@pytest.mark.parametrize(
    "module", ["cnnopt", "cnnopt.quantize", "cnnopt.compare", "cnnopt.predict", "cnnopt.study", *PURE]
)
def test_importing_it_loads_nothing_slow(module):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint({"tensorflow", "keras", "tf_keras", "horovod", "numpy", "sklearn"})


def test_the_old_name_of_the_comparison_is_answered_with_the_new_one():
    command = [sys.executable, "-m", "cnnopt.report", "runs/a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "python -m cnnopt.compare" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("cnnopt.report", None),
        ("cnnopt.models", None),
        ("cnnopt.callbacks", None),
        ("cnnopt.environment", None),
        ("cnnopt.exchange", None),
        ("cnnopt.record", None),
        ("cnnopt.export.card", None),
        # Files once, folders now, which hold no names of their own.
        ("cnnopt.training", "build_model"),
        ("cnnopt.data", "load"),
        ("cnnopt.distributed", "start"),
    ],
)
def test_old_import_paths_fail(module, name):
    if name is None:
        with pytest.raises(ImportError):
            importlib.import_module(module)
    else:
        assert not hasattr(importlib.import_module(module), name)


def old_pythons() -> list[str]:
    """The oldest Pythons that may run the launcher, where they are installed."""
    names = [f"python3.{minor}" for minor in (8, 9)]
    found = [sorted(Path.home().glob(f".pyenv/versions/*/bin/{name}")) or [shutil.which(name)] for name in names]
    return [str(paths[-1]) for paths in found if paths[-1]]


@pytest.mark.parametrize("python", old_pythons() or [None])
def test_the_launcher_and_the_definition_of_the_image_need_no_new_python(python):
    if python is None:
        pytest.skip("neither Python 3.8 nor 3.9 is installed here")
    launched = subprocess.run([python, "-m", "cnnopt.launch", "-np", "2", "--", "echo", "a rank"], cwd=ROOT,
                              capture_output=True, text=True)  # fmt: skip
    assert (launched.returncode, launched.stdout, launched.stderr) == (0, "a rank\na rank\n", "")
    for target in ("cpu", "gpu"):
        printed = subprocess.run([python, "docker/apptainer.py", target], cwd=ROOT, capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr
        assert printed.stdout.startswith("Bootstrap: ")
