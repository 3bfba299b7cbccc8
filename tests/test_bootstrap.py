"""The set-up script, without its downloads: when it installs, what it keeps, and what it says when it cannot."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / 'scripts' / 'bootstrap.py'
REQUIREMENTS = SCRIPT.parents[1] / 'requirements.txt'
TRITON = SCRIPT.parents[1] / 'requirements-triton.txt'


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The script as a module for a project in `tmp_path`; its commands are recorded in `calls` instead of run."""
    spec = importlib.util.spec_from_file_location('bootstrap_under_test', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in {'ROOT': '', 'VENV': '.venv', 'STAMP': '.venv/stamp', 'UNFINISHED': '.venv/unfinished'}.items():
        monkeypatch.setattr(module, name, str(tmp_path / path))
    for name in module.INPUTS:
        (tmp_path / name).write_text('setuptools==1\ntorch==2\nwheel==3\n')
    module.calls = []

    def record(command, what):
        module.calls.append(command)
        if '-m' in command and 'venv' in command:
            os.makedirs(module.venv_bin())
            os.symlink(sys.executable, module.venv_python())

    monkeypatch.setattr(module, '_call', record)
    return module


def installs(bootstrap):
    """What pip was asked to install since the last call of this function."""
    done = [command[command.index('install') + 1 :] for command in bootstrap.calls if 'install' in command]
    bootstrap.calls.clear()
    return done


def test_first_run_installs_and_second_does_nothing(bootstrap):
    bootstrap.prepare()
    tools, requirements, project, triton = installs(bootstrap)
    assert tools == ['setuptools==1', 'wheel==3']
    assert '--no-build-isolation' in requirements and '-r' in requirements
    assert {'--no-build-isolation', '--no-deps', '--editable'} < set(project)
    assert triton[-1].endswith('requirements-triton.txt')
    bootstrap.prepare()
    assert bootstrap.calls == []


def test_changed_requirements_install_into_the_same_environment(bootstrap, tmp_path):
    bootstrap.prepare()
    installs(bootstrap)
    (tmp_path / 'requirements.txt').write_text('torch==3\n')
    kept = tmp_path / '.venv' / 'kept'
    kept.touch()
    bootstrap.prepare()
    assert len(installs(bootstrap)) == 4 and kept.exists()


def test_interrupted_install_starts_afresh(bootstrap, tmp_path, monkeypatch):
    def killed():
        (tmp_path / '.venv' / 'half_a_package').touch()
        raise KeyboardInterrupt

    install = bootstrap._install
    monkeypatch.setattr(bootstrap, '_install', killed)
    with pytest.raises(KeyboardInterrupt):
        bootstrap.prepare()
    monkeypatch.setattr(bootstrap, '_install', install)
    bootstrap.prepare()
    assert len(installs(bootstrap)) == 4 and not (tmp_path / '.venv' / 'half_a_package').exists()


def test_broken_environment_is_made_again(bootstrap):
    bootstrap.prepare()
    installs(bootstrap)
    os.remove(bootstrap.venv_python())
    bootstrap.prepare()
    assert len(installs(bootstrap)) == 4


def test_without_ensurepip_pip_comes_from_outside(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, '_succeeds', lambda command: 'ensurepip' not in command[-1])
    bootstrap.prepare()
    assert '--without-pip' in bootstrap.calls[0] and bootstrap.calls[1][-1] == 'pip'


@pytest.mark.parametrize(
    ('version', 'succeeds', 'message'),
    [
        ((3, 9), False, r'Python 3\.10, 3\.11 or 3\.12 is needed; this is 3\.9'),
        ((3, 9, 2), False, r'other was found\.$'),
        ((3, 13, 1), False, r'this is 3\.13 .* BasicSR 1\.4\.2 cannot be built on newer ones: install Python 3\.12'),
        ((3, 11), False, 'neither the venv module with ensurepip nor pip'),
    ],
)
def test_unsuitable_python_gets_one_line(bootstrap, monkeypatch, capsys, version, succeeds, message):
    monkeypatch.setattr(sys, 'version_info', version)
    monkeypatch.setattr(bootstrap, '_succeeds', lambda command: succeeds)
    assert bootstrap.main(lambda: 0) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count('\n') == 1


def test_failed_install_leaves_no_stamp(bootstrap, monkeypatch, capsys):
    bootstrap.make_venv()
    monkeypatch.setattr(bootstrap, '_call', lambda command, what: (_ for _ in ()).throw(bootstrap.SetupError(what)))
    monkeypatch.setattr(bootstrap, 'make_venv', lambda: None)
    assert bootstrap.main(lambda: 0) == 1
    assert not bootstrap._read(bootstrap.STAMP) and os.path.exists(bootstrap.UNFINISHED)


def test_the_environment_is_complete_without_triton(bootstrap, monkeypatch, capsys):
    record = bootstrap._call

    def refuse(command, what):
        record(command, what)
        if 'Triton' in what:
            raise bootstrap.SetupError(what)

    monkeypatch.setattr(bootstrap, '_call', refuse)
    assert bootstrap.main(lambda: 0) == 0 and 'CUDA kernels will be skipped' in capsys.readouterr().out
    installs(bootstrap)
    bootstrap.prepare()
    assert bootstrap.calls == [], 'not tried again at each start'


def test_run_passes_the_exit_code_and_the_environment(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, 'venv_python', lambda: sys.executable)
    monkeypatch.setenv('PYTHONPATH', '/nowhere')
    check = 'import os, sys; sys.exit(7 if os.environ["X"] == "1" and "PYTHONPATH" not in os.environ else 1)'
    assert bootstrap.run(['-c', check], {'X': '1'}) == 7


def test_the_requirements_pin_everything_once_per_python():
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith('#')]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) '3\.11')?", line) for line in lines)
    for marker in ('<', '>='):
        names = [
            line.split('==')[0].lower() for line in lines if ';' not in line or f'python_version {marker} ' in line
        ]
        assert len(names) == len(set(names))
        assert [name for name in names if name.startswith('opencv')] == ['opencv-python']


def test_triton_is_the_one_that_pytorch_asks_for():
    """Otherwise pip would exchange the one that came with PyTorch for CUDA; the build for CPUs asks for none."""
    pin = [line for line in TRITON.read_text().splitlines() if not line.startswith('#')]
    assert len(pin) == 1 and re.fullmatch(r"triton==[\d.]+; platform_system == 'Linux' and .*'x86_64'", pin[0])
    wanted = [line.split(';')[0].strip() for line in importlib.metadata.requires('torch') if line.startswith('triton')]
    assert all(line == pin[0].split(';')[0] for line in wanted)


def test_the_ci_command_fails_when_a_test_fails(tmp_path):
    """The script hands pytest's exit code on; shown with this Python in place of the environment's."""
    failing = tmp_path / 'test_failing.py'
    failing.write_text('def test_failing():\n    assert False\n')
    code = (
        f'import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import bootstrap, run_tests; bootstrap.venv_python = '
        'lambda: sys.executable; sys.exit(run_tests.run_tests())'
    )
    for arguments, expected in (([str(failing)], 1), ([str(failing), '-k', 'nothing'], 5)):
        done = subprocess.run(
            [sys.executable, '-c', code, '-p', 'no:xdist', '-p', 'no:cacheprovider', *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == expected, done.stdout + done.stderr
        assert re.search(r'(failed|deselected).* in [\d.]+s', done.stdout.splitlines()[-1])
