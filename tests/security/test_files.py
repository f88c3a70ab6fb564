"""Files: nothing outside the working directory can be read (but for the standard library), and nothing written."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("hunter2")
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)  # the walls must hold, not the mode bits
    path.chmod(0o644)
    return path


@pytest.mark.skipif(os.getuid() != 0, reason="only root can read /etc/shadow without a sandbox")
def test_etc_shadow(attack):
    attack("if open('/etc/shadow').read(): print('ESCAPED')")


def test_secret_of_the_host(attack, secret):
    attack(f"if 'hunter2' in open({str(secret)!r}).read(): print('ESCAPED')")


def test_list_a_folder_of_the_host(attack, secret):
    attack(f"import os\nif 'secret.txt' in os.listdir({str(secret.parent)!r}): print('ESCAPED')")


def test_source_of_this_project(attack):
    attack(f"if open({__file__!r}).read(): print('ESCAPED')")


def test_write_outside(attack, tmp_path):
    tmp_path.chmod(0o777)
    target = tmp_path / "written"
    attack(
        f"import os\nopen({str(target)!r}, 'w').write('x')\n"
        f"if os.path.exists({str(target)!r}): print('ESCAPED')\nos.unlink({str(target)!r})"
    )
    assert not target.exists()


@pytest.mark.parametrize(
    "call",
    [
        "open(p, 'a').write('more')",
        "os.truncate(p, 0)",
        "os.close(os.open(p, os.O_RDONLY | os.O_TRUNC))",
        "os.chmod(p, 0o777)",
        "os.utime(p, (1, 1))",
        "os.rename(p, p + '.gone')",
        "os.unlink(p)",
        "os.link(p, 'link'); open('link', 'a').write('more')",
        "os.setxattr(p, b'user.x', b'1')",
    ],
)
def test_change_a_file_of_the_host(bare, boxed, secret, call):
    secret.chmod(0o666)
    secret.parent.chmod(0o777)
    before = (os.lstat(secret).st_mode, secret.read_text())
    code = f"import os\np = {str(secret)!r}\nprint('TRIED')\n{call}\nprint('ESCAPED')"
    result = boxed(code)
    assert "TRIED" in result.stdout and "ESCAPED" not in result.stdout, result
    assert (os.lstat(secret).st_mode, secret.read_text()) == before
    control = bare(code)
    if "setxattr" in call and "ESCAPED" not in control:
        pytest.skip("this file system has no extended attributes")
    assert "ESCAPED" in control


def test_symlink_out_of_the_work_dir(attack, secret):
    attack(
        f"import os\nos.symlink({str(secret)!r}, 'innocent')\n"
        "if 'hunter2' in open('innocent').read(): print('ESCAPED')"
    )
    assert secret.read_text() == "hunter2"


def test_links_left_behind_are_removed_not_followed(boxed, secret):
    code = f"import os\nos.symlink({str(secret.parent)!r}, 'dir')\nos.symlink({str(secret)!r}, 'f')"
    assert boxed(code).exit == 0
    assert boxed("import os\nprint(os.listdir('.'))").stdout == "[]\n"
    assert secret.read_text() == "hunter2"


def test_work_dir_is_private_and_clean(boxed):
    """What one call leaves, however deep and forbidding, the next one does not see."""
    code = """
import os
open('note', 'w').write('from the first call')
for _ in range(300):
    os.mkdir('d' * 200); os.chdir('d' * 200)
open('deep', 'w').write('x')
os.mkdir('locked', 0)
print('left')
"""
    assert boxed(code).stdout == "left\n"
    assert boxed("import os\nprint(os.listdir('.'))").stdout == "[]\n"


def test_work_dir_can_be_used(boxed):
    code = """
import os, tempfile, shutil
os.makedirs('a/b'); open('a/b/f', 'w').write('hello'); os.rename('a/b/f', 'a/g')
with tempfile.NamedTemporaryFile('w+') as file: file.write('x')
shutil.rmtree('a'); print(sorted(os.listdir('.')))
"""
    assert boxed(code).stdout == "[]\n"


def test_installed_packages_are_out_of_reach(attack):
    import numpy

    file = numpy.__file__
    attack(f"if open({file!r}).read(): print('ESCAPED')")


def test_proc_is_not_readable(attack, victim):
    attack(f"if open('/proc/{victim.pid}/cmdline').read(): print('ESCAPED')")


def test_devices(attack):
    attack("import os\nos.open('/dev/full', os.O_WRONLY)\nprint('ESCAPED')")


def test_standard_library_is_there(boxed):
    names = "math, random, decimal, fractions, itertools, collections, json, re, datetime, statistics, sqlite3, hashlib"
    names += (
        ", asyncio, threading, zoneinfo, csv, heapq, functools, string, ctypes, dataclasses, typing"
    )
    result = boxed(f"import {names}\nprint('ok')")
    assert result.stdout == "ok\n", result
    assert Path("/proc/self/fd").exists()  # we, on the other hand, live in an ordinary world
