"""Sets up `.venv` in the repository root and runs commands in it. Needs nothing but Python and its standard library.

`prepare()` makes the environment if it is missing, installs the pinned requirements if they have changed since the
last time, and otherwise does nothing. An install that was interrupted is started afresh, because pip cannot tell a
package that it half copied from a complete one.

The file keeps to old syntax, so that an old Python reaches the message that says which Python is needed.
"""

from __future__ import print_function

import hashlib
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, '.venv')
STAMP = os.path.join(VENV, 'installed.sha256')
UNFINISHED = os.path.join(VENV, 'install-unfinished')
STARTED = 'MOEISR_BASICSR_BOOTSTRAPPED'
SUPPORTED = ((3, 10), (3, 11), (3, 12))
NEWER = ' BasicSR 1.4.2 cannot be built on newer ones: install Python 3.12 beside it, and run this again.'
INPUTS = ('requirements.txt', 'requirements-triton.txt', 'setup.py', 'pyproject.toml')
# Builds BasicSR's source package; must be there before the rest (see requirements.txt).
BUILD_TOOLS = ('setuptools', 'wheel')


class SetupError(Exception):
    """The environment cannot be made; the message is one line for the user."""


def venv_bin():
    """The folder of the environment's programs."""
    return os.path.join(VENV, 'Scripts' if os.name == 'nt' else 'bin')


def venv_python():
    """The environment's interpreter."""
    return os.path.join(venv_bin(), 'python.exe' if os.name == 'nt' else 'python')


def inside():
    """Whether `run` started this process, in the environment."""
    return os.environ.get(STARTED) == '1' and os.path.realpath(sys.prefix) == os.path.realpath(VENV)


def environment():
    """The variables for a command in the environment: its programs first, no packages from elsewhere."""
    env = dict(os.environ)
    for name in ('PYTHONHOME', 'PYTHONPATH', 'BASICSR_EXT'):  # BASICSR_EXT would compile CUDA extensions
        env.pop(name, None)
    env.update(
        PATH=venv_bin() + os.pathsep + env.get('PATH', os.defpath),
        VIRTUAL_ENV=VENV,
        PYTHONNOUSERSITE='1',
        PIP_USER='0',
        PIP_DISABLE_PIP_VERSION_CHECK='1',
        PIP_NO_INPUT='1',
    )
    # Threads that spin while they wait make a step many times slower where other programs use the same cores.
    env.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    return env


def prepare():
    """Make the environment complete.

    Raises:
        SetupError: No suitable Python, no way to get pip, or an install that failed.
    """
    with _only_one():
        wanted = _fingerprint()
        if _read(STAMP) == wanted and _works():
            return
        start = time.time()
        make_venv()
        _write(UNFINISHED, '')
        _write(STAMP, '')
        _install()
        _write(STAMP, wanted)
        os.remove(UNFINISHED)
        print('Environment ready in {:.0f} s: {}'.format(time.time() - start, VENV), flush=True)


def run(arguments, extra_env=None):
    """Run the environment's Python with the given arguments in the current folder; returns its exit code."""
    env = environment()
    env.update(extra_env or {})
    env[STARTED] = '1'
    process = subprocess.Popen([venv_python()] + list(arguments), env=env)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the child got the same Ctrl-C and ends by itself


def main(action):
    """Call `action` after `prepare`; turns a SetupError into one line and exit code 1."""
    try:
        prepare()
        return action()
    except SetupError as error:
        print('Error: {}'.format(error), file=sys.stderr)
        return 1


def _fingerprint():
    """Changes with the requirements, the metadata and the place of the project (an editable install points at it)."""
    digest = hashlib.sha256(ROOT.encode('utf-8'))
    for name in INPUTS:
        with open(os.path.join(ROOT, name), 'rb') as handle:
            digest.update(name.encode('utf-8') + b'\0' + handle.read() + b'\0')
    return digest.hexdigest()


def _works():
    """Whether the environment's Python runs, is a supported one and has pip."""
    if not os.path.isfile(venv_python()):
        return False
    code = 'import sys, pip; print(*sys.version_info[:2])'
    process = subprocess.Popen([venv_python(), '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output = process.communicate()[0].decode('utf-8', 'replace').split()
    return process.returncode == 0 and tuple(int(part) for part in output) in SUPPORTED


def make_venv():
    """Make `.venv`, or keep it if it works and its last install ended."""
    if _works() and not os.path.exists(UNFINISHED):
        return
    python = _supported_python()
    if os.path.isdir(VENV):
        print('Removing the incomplete environment {}'.format(VENV), flush=True)
        shutil.rmtree(VENV)
    print('Making the environment {}'.format(VENV), flush=True)
    if _succeeds([python, '-c', 'import ensurepip, venv']):
        _call([python, '-m', 'venv', VENV], 'making the environment')
        return
    # Debian splits ensurepip off. An environment without pip still works there, and a pip of any age can fill it.
    advice = 'install it (Debian, Ubuntu: apt install python3-venv)'
    if not _succeeds([python, '-c', 'import venv, pip']):
        raise SetupError('{} has neither the venv module with ensurepip nor pip: {}.'.format(python, advice))
    _call([python, '-m', 'venv', '--without-pip', VENV], 'making the environment')
    where = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    site = subprocess.check_output([venv_python(), '-c', where]).decode('utf-8').strip()
    _call([python, '-m', 'pip', 'install', '--quiet', '--target', site, 'pip'], 'putting pip into the environment')


def _supported_python():
    """This interpreter if its version is supported, otherwise one that is found on the path."""
    if sys.version_info[:2] in SUPPORTED:
        return getattr(sys, '_base_executable', None) or sys.executable  # not the environment's own, if that is active
    check = 'import sys; sys.exit(sys.version_info[:2] not in {!r})'.format(SUPPORTED)
    for version in reversed(SUPPORTED):
        path = shutil.which('python{}.{}'.format(*version)) if hasattr(shutil, 'which') else None
        if path and _succeeds([path, '-c', check]):
            print(
                'Python {}.{} is not supported; using {}'.format(sys.version_info[0], sys.version_info[1], path),
                flush=True,
            )
            return path
    raise SetupError(
        'Python 3.10, 3.11 or 3.12 is needed; this is {}.{} ({}) and no other was found.{}'.format(
            sys.version_info[0],
            sys.version_info[1],
            sys.executable,
            NEWER if sys.version_info[:2] > SUPPORTED[-1] else '',
        )
    )


def _install():
    """Install the pinned requirements, this project as an editable package, and Triton where it can be had."""
    install_requirements()
    pip = [venv_python(), '-m', 'pip', 'install']
    _call(pip + ['--no-build-isolation', '--no-deps', '--editable', ROOT], 'installing this project')
    try:
        _call(pip + ['-r', os.path.join(ROOT, 'requirements-triton.txt')], 'installing Triton')
    except SetupError:
        print('Triton cannot be installed here: the tests of the CUDA kernels will be skipped', flush=True)


def install_requirements():
    """Install the pinned requirements into the environment."""
    pip = [venv_python(), '-m', 'pip', 'install']
    with open(os.path.join(ROOT, 'requirements.txt')) as handle:
        tools = [line.strip() for line in handle if line.split('==')[0] in BUILD_TOOLS]
    print('Installing the pinned requirements; the first time downloads PyTorch and takes minutes', flush=True)
    _call(pip + tools, 'installing the build tools')
    _call(pip + ['--no-build-isolation', '-r', os.path.join(ROOT, 'requirements.txt')], 'installing the requirements')


def _call(command, what):
    env = environment()
    if subprocess.call(command, env=env) != 0:
        raise SetupError('{} failed; its own message is above. Run the command again after fixing it.'.format(what))


def _succeeds(command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.communicate()
    return process.returncode == 0


def _read(path):
    if not os.path.isfile(path):
        return None
    with open(path) as handle:
        return handle.read()


def _write(path, text):
    with open(path, 'w') as handle:
        handle.write(text)


@contextmanager
def _only_one():
    """Let one process set up at a time; the system drops the lock when the process dies."""
    with open(os.path.join(ROOT, '.venv.lock'), 'w') as handle:
        if os.name != 'nt':
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == '__main__':
    sys.exit(main(lambda: 0))
