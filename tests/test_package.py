"""What the package says of itself and what its wheel holds."""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import moeisr_basicsr

ROOT = Path(__file__).resolve().parents[1]


def test_the_version_is_the_same_everywhere():
    done = subprocess.run([sys.executable, 'setup.py', '--version'], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == moeisr_basicsr.__version__, done.stderr
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == moeisr_basicsr.__version__


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    """What setuptools would put into sdist and wheel, for a copy of the project in which the files are empty."""
    project = tmp_path / 'project'
    files = {path.relative_to(ROOT) for path in (ROOT / 'moeisr_basicsr').rglob('*.*') if path.is_file()}
    files = {path for path in files if path.suffix not in ('.pyc', '.so')}
    for path in files:
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).touch()
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'moeisr_basicsr/__init__.py'):
        shutil.copy(ROOT / name, project / name)
    command = [sys.executable, 'setup.py', '-q', 'egg_info', '-e', '.', 'build_py', '-d', 'wheel']
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=120)
    listed = (project / 'moeisr_basicsr.egg-info' / 'SOURCES.txt').read_text().splitlines()
    built = {path.relative_to(project / 'wheel') for path in (project / 'wheel').rglob('*.*') if path.is_file()}
    assert files - {Path(line) for line in listed} == set() and files - built == set()
