"""Builds a wheel and tries it as a user has it: `python3 scripts/try_wheel.py`. Takes minutes and some GB.

In a temporary folder, from a copy of the package: a wheel is built, a clean environment gets the pinned requirements
and the wheel, the package is imported, its models are listed, and a small image is enlarged. Prints what each step
took. `--python PATH` takes the interpreter of an environment that has the requirements in place of a clean one; the
wheel is then unpacked beside it, and the environment stays as it is.

Exit code 0 if every step worked.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bootstrap

SOURCES = ('setup.py', 'pyproject.toml', 'README.md', 'moeisr_basicsr')
FACTOR, SIZE = 2, (48, 40)
MAKE_IMAGE = (
    f"from PIL import Image; Image.effect_mandelbrot({SIZE}, (-2, -1.5, 1, 1.5), 50).convert('RGB').save('a.png')"
)
CHECK_IMAGE = f"from PIL import Image; assert Image.open('b.png').size == {tuple(FACTOR * side for side in SIZE)}"
CHECK_IMPORT = (
    'import sys, moeisr_basicsr; print(moeisr_basicsr.__version__, moeisr_basicsr.__file__);'
    'assert moeisr_basicsr.__file__.startswith(sys.argv[1])'
)


def main() -> int:
    """Build, install, try; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--python', metavar='PATH', help='interpreter of an environment that has the requirements')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            try_wheel(Path(folder).resolve(), args.python)
        except (bootstrap.SetupError, subprocess.CalledProcessError) as error:
            print(f'Error: {error}', file=sys.stderr)
            return 1
    return 0


def try_wheel(folder: Path, python: str | None) -> None:
    """All steps, below `folder`.

    Raises:
        SetupError: The environment cannot be made.
        CalledProcessError: A step failed; its own message is on the screen.
    """
    if python is None:
        bootstrap.VENV = str(folder / 'venv')
        step('environment', folder / 'venv', bootstrap.make_venv, bootstrap.install_requirements)
        python = bootstrap.venv_python()
    source, target = folder / 'source', folder / 'installed'
    source.mkdir()
    for name in SOURCES:  # a copy: a build leaves files behind, and finds those of earlier ones
        path = Path(bootstrap.ROOT, name)
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(path, source)
    env = {**bootstrap.environment(), 'PYTHONPATH': str(target)}

    def call(*command: str | Path) -> None:
        subprocess.run([str(word) for word in command], cwd=folder, env=env, check=True)

    pip, basicsr = (python, '-m', 'pip', '--quiet'), target / 'bin' / 'basicsr'
    step(
        'wheel', folder / 'dist', lambda: call(*pip, 'wheel', '--no-build-isolation', '--no-deps', '-w', 'dist', source)
    )
    wheel = next((folder / 'dist').glob('*.whl'))
    step('installed', target, lambda: call(*pip, 'install', '--no-deps', '--target', target, wheel))
    step('import', None, lambda: call(python, '-c', CHECK_IMPORT, target))
    step('models', None, lambda: call(basicsr, 'models'))
    call(python, '-c', MAKE_IMAGE)
    step('upscale', None, lambda: call(basicsr, 'upscale', 'a.png', '-o', 'b.png', '--scale', str(FACTOR)))
    call(python, '-c', CHECK_IMAGE)


def step(name: str, made: Path | None, *actions) -> None:
    """Do one step, and print its seconds and the size of what it made."""
    start = time.time()
    for action in actions:
        action()
    took = f'{name}: {time.time() - start:.1f} s'
    if made is not None:
        size = sum(path.stat().st_size for path in made.rglob('*') if path.is_file() and not path.is_symlink())
        took += f', {size / 1e6:.1f} MB'
    print(took, flush=True)


if __name__ == '__main__':
    sys.exit(main())
