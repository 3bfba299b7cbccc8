"""The Triton kernels, in processes of their own: triton_cases.py interpreted or on a GPU, and the compiler alone."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CORE_ALONE

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('triton') is None, reason='Triton is not installed; it is needed for the CUDA kernels only'
)

# Compiles the kernels for a device that is not there, and prints what it would need. argv: compute capabilities.
COMPILE = (
    CORE_ALONE
    + """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moeisr_basicsr.kernels.triton_decode import HALF_CONFIGS
from moeisr_basicsr.kernels.triton_kernel import decode_kernel, render_kernel, route_kernel



def compile_kernel(capability, kernel, constants, **options):
    types = {'order': '*i64', 'row_index': '*i64', 'col_index': '*i64', 'table': '*bf16', 'freq': '*bf16',
             'weights': '*bf16', 'expert_map': '*u8'}
    types |= dict.fromkeys(['count', 'n_rows', 'n_cols', 'table_width', 'table_stride'], 'i32')
    signature = {name: 'constexpr' if name in constants else types.get(name, '*fp32') for name in kernel.arg_names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith('*') or name == 'table_stride'}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget('cuda', capability, 32), options)


for capability in map(int, sys.argv[1:]):
    config = HALF_CONFIGS[0 if capability == 90 else 1]
    decode = compile_kernel(capability, decode_kernel, dict(
        LTE=False, LAYERS=4, CHANNELS=3, D_IN=256, D=256, D_OUT=16, BLOCK=config.block,
        CHUNK=config.chunk, DOT='ieee', EMULATE_BF16=False, EPS=1e-9),
        num_warps=config.num_warps, num_stages=config.num_stages)
    render = compile_kernel(capability, render_kernel, dict(
        LAYERS=6, CHANNELS=3, D=16, D_OUT=16, BLOCK=32, DOT='ieee', EMULATE_BF16=False, EPS=1e-9), num_warps=8)
    route = compile_kernel(capability, route_kernel, dict(WANT_LOGITS=False, J=4, WIDTH=32, PADDED=32, BLOCK=128))
    product = 'wgmma.mma_async' if capability == 90 else 'mma.sync'
    print(decode.metadata.shared, product in decode.asm['ptx'], len(decode.asm['cubin']) > 0,
          len(route.asm['cubin']) > 0, 'mma' in render.asm['ptx'] and len(render.asm['cubin']) > 0)
"""
)


def run(args, tmp_path, interpret):
    env = os.environ | {
        'TRITON_INTERPRET': '1' if interpret else '0',
        'TRITON_CACHE_DIR': str(tmp_path),
        'MOEISR_KERNELS': 'auto',
        'PYTHONPATH': os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]),
    }
    done = subprocess.run([sys.executable, *args], env=env, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize('mode', ['interpreter', 'gpu'])
def test_cases(mode, tmp_path):
    if mode == 'gpu' and not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    output = run(
        ['-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-p', 'no:xdist', 'triton_cases.py'],
        tmp_path,
        interpret=mode == 'interpreter',
    )
    assert ' passed' in output and ' skipped' not in output, output[-2000:]


def test_compiles_to_tensor_core_code(tmp_path):
    lines = run(['-c', COMPILE, '90', '80'], tmp_path, interpret=False).splitlines()
    for line, shared_kib in zip(lines, (227, 163), strict=True):  # what one program may have on each
        shared, *compiled = line.split()
        assert compiled == ['True'] * 4, line
        assert int(shared) <= shared_kib * 1024
