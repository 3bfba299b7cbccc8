"""The build of the fused CPU kernels: switched off, impossible, or begun by two processes at once."""

import os
import platform
import shutil
import subprocess
import sys
import threading

import pytest
from helpers import CORE_ALONE

from moeisr_basicsr.kernels import build, cpu
from moeisr_basicsr.kernels.build import DIGEST_SIZE, BuildError, _cache_root, _fingerprint, load_library
from moeisr_basicsr.kernels.native import OLDER

CHILD = (
    CORE_ALONE
    + """
import torch
from moeisr_basicsr.kernels import cpu
from moeisr_basicsr.kernels.build import BuildError, load_library
print(cpu.available(), cpu.reason())
if cpu.available():
    out = torch.zeros(1, 2, 2)
    axis = cpu.GridAxis(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 0.5))
    expert = dict(w_rel=torch.zeros(2, 32), hidden=[], last=(torch.ones(1, 32), torch.zeros(1)))
    expert_map = torch.zeros(2, 2, dtype=torch.uint8)
    cpu.decode(cpu.PackedExperts([expert]), [torch.ones(1, 1, 32)], axis, axis, expert_map, out)
    assert (out == 32).all(), out
"""
)


needs_kernels = pytest.mark.skipif(not cpu.available(), reason=f'the fused kernels cannot run here: {cpu.reason()}')


def start_child(folder, **variables):
    env = {**os.environ, 'TORCH_EXTENSIONS_DIR': str(folder), 'MOEISR_KERNELS': 'auto', **variables}
    return subprocess.Popen(
        [sys.executable, '-c', CHILD], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish_child(child):
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    return out.strip()


def test_switched_off(tmp_path):
    assert finish_child(start_child(tmp_path, MOEISR_KERNELS='off')).startswith('False torch code: MOEISR_KERNELS=off')
    assert not list(tmp_path.iterdir())


@needs_kernels
@pytest.mark.parametrize('newest', [isa for isa in OLDER if isa in cpu.supported_isas()])
def test_older_instructions_on_request(newest):
    built = _cache_root().parent  # by this process: the library holds them all
    said = finish_child(start_child(built, MOEISR_KERNELS=newest))
    fp32 = 'avx2' if newest == 'avx2' else 'avx512'
    bf16 = newest if newest == 'avx512_bf16' else fp32  # without its instructions computed in fp32
    assert said == f'True fused C++ kernels: fp32 by {fp32}, bf16 by {bf16}'


def test_no_compiler_falls_back(tmp_path):
    out = finish_child(start_child(tmp_path, CXX='/nonexistent/c++'))
    assert out.startswith('False torch code') and 'the C++ build failed' in out and '\n' not in out
    assert not list(tmp_path.rglob('*.so')) and not list(tmp_path.rglob('build_*'))


def test_unwritable_cache_is_reported(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path / 'file'))
    with pytest.raises(BuildError, match='file'):
        load_library()


@pytest.mark.skipif(
    shutil.which(os.environ.get('CXX', 'c++')) is None
    or platform.system() != 'Linux'
    or platform.machine() != 'x86_64',
    reason='no C++ compiler for x86-64 Linux',
)
def test_the_sources_compile():
    """Where they could: the other tests are skipped after a build that failed."""
    load_library()


def built_library():
    """This process's."""
    return _cache_root() / f'decode_{_fingerprint()}.so'


def damaged_libraries(whole, folder):
    """What a crash, a full disk or a bad one leaves in place of a library."""
    compiler = os.environ.get('CXX', 'c++')
    empty = folder / 'empty.so'
    subprocess.run([compiler, '-shared', '-x', 'c++', '-', '-o', str(empty)], input=b'', check=True)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    yield from (b'', whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(flipped))
    yield from (b'garbage' * 1000, bytes(len(whole)), empty.read_bytes())


@needs_kernels
def test_a_damaged_library_is_built_again(tmp_path, monkeypatch):
    """Truncated, of zeros, without symbols: neither a crash nor slow code for ever."""
    built, folder = built_library(), tmp_path / 'moeisr_basicsr'
    whole = built.read_bytes()
    folder.mkdir()
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    builds = []

    def compile_again(path):  # what the compiler would make, without its minute
        builds.append(path)
        (tmp_path / 'new.so').write_bytes(whole[:-DIGEST_SIZE])
        build._put(tmp_path / 'new.so', path)

    monkeypatch.setattr(build, '_compile', compile_again)
    for count, content in enumerate(damaged_libraries(whole, tmp_path), start=1):
        path = folder / built.name
        path.unlink(missing_ok=True)  # never write into a library that this process has loaded
        path.write_bytes(content)
        for _ in range(2):
            assert load_library().moeisr_supported() > 0
        assert builds == [path] * count and path.read_bytes() == whole


@needs_kernels
def test_a_library_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, 'fsync', lambda handle: calls.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, 'replace', lambda old, new: calls.append('replace') or os.rename(old, new))
    (tmp_path / 'new.so').write_bytes(b'library')
    build._put(tmp_path / 'new.so', tmp_path / 'placed.so')
    assert calls == [(tmp_path / 'placed.so').stat().st_ino, 'replace', tmp_path.stat().st_ino]
    assert build._is_whole(tmp_path / 'placed.so') and not (tmp_path / 'new.so').exists()


# In place of the minute of a real one: all that it makes is the library that there is.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo >> {folder}/calls; sleep 1; exec cp {folder}/library "$2"; fi
    shift
done
"""


@needs_kernels
def test_concurrent_first_builds(tmp_path):
    """Two processes start on half a library, a SIGBUS if loaded, after a killed build: both end with the kernels."""
    folder, compiler = tmp_path / 'moeisr_basicsr', tmp_path / 'compiler'
    (folder / 'build_killed').mkdir(parents=True)
    whole = built_library().read_bytes()
    (tmp_path / 'library').write_bytes(whole[:-DIGEST_SIZE])
    compiler.write_text(COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    (folder / built_library().name).write_bytes(whole[: len(whole) // 2])
    (folder / 'build.lock').write_text('')  # left by a process that died: the lock itself died with it
    outputs = []
    children = [start_child(tmp_path, CXX=str(compiler)) for _ in range(2)]
    waiters = [threading.Thread(target=lambda c=child: outputs.append(finish_child(c))) for child in children]
    for waiter in waiters:
        waiter.start()
    for waiter in waiters:
        waiter.join()
    assert len(outputs) == 2 and all(out.startswith('True') for out in outputs), outputs
    assert [path.read_bytes() for path in folder.glob('*.so')] == [whole]
    assert len((tmp_path / 'calls').read_text()) == len(build._sources()) + 1  # of one process: objects, library
