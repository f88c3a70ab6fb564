"""In the folder above a clone called `appo`, where Python finds the clone before an installed appo."""

import pytest
from support import builds

USE = "import appo, appo.kernels as k; appo.load_config; k.future_value; print(appo.__file__)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return builds.copy_tree(tmp_path_factory.mktemp("above") / "appo")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return str(builds.environment(tmp_path_factory.mktemp("environment") / "venv"))


def use(python, clone):
    """`python -c` and `python -m` from above the clone: both run its appo."""
    env = builds.clean(APPO_NO_NATIVE="1")
    said = builds.run([python, "-c", USE], cwd=clone.parent, env=env)
    assert said.strip() == str(clone / "appo" / "__init__.py")
    assert "appo [OPTIONS] COMMAND" in builds.run([python, "-m", "appo", "--help"], cwd=clone.parent, env=env)  # fmt: skip


def test_not_installed(clone, python):
    use(python, clone)


@pytest.mark.slow
def test_editable_install(clone, python):
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "-e",
        str(clone),
    ]
    builds.run(install, cwd=clone.parent, env=builds.clean(APPO_NO_NATIVE="1"))
    use(python, clone)


def test_pytest_in_the_clone(clone, python):
    """Its root is a package of that name for pytest, too; tests still get the real appo."""
    test = clone / "tests" / "packaging" / "test_imports.py"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    said = builds.run([*command, "-k", "unknown_name"], cwd=clone, env=builds.clean())
    assert "1 passed" in said
