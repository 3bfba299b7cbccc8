"""Package metadata. The ranges are open; the versions tested together are in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: the package imports torch, which a build does not have.
VERSION = re.search(r"^__version__ = '(.+?)'", (ROOT / 'moeisr_basicsr/__init__.py').read_text(encoding='utf-8'), re.M)
assert VERSION is not None
DATA = (
    'cpp',
    'css',
    'h',
    'html',
    'j2',
    'json',
    'md',
    'safetensors',
    'yml',
)  # endings of what is no code in the package

setup(
    name='moeisr_basicsr',
    version=VERSION[1],
    description='MoEISR, arbitrary-scale image super-resolution by a mixture of implicit decoders, for BasicSR',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='super-resolution, arbitrary scale, implicit neural representation, mixture of experts, BasicSR',
    packages=find_packages(include=['moeisr_basicsr', 'moeisr_basicsr.*']),
    package_data={'moeisr_basicsr': ['py.typed', *(f'**/*.{ending}' for ending in DATA)]},
    python_requires='>=3.10,<3.13',  # BasicSR 1.4.2's own setup.py fails on 3.13
    install_requires=[
        'basicsr==1.4.2',  # brings tensorboard under its nightly name, lmdb's and OpenCV's bindings
        'torch>=2.6',  # from here on torch.load runs no code from a file, in BasicSR's own calls too
        'torchvision>=0.21',
        'mmengine-lite>=0.10',  # the package `mmengine` without matplotlib and a second OpenCV
        'numpy>=1.24',
        'opencv-python>=4.8',
        'Pillow>=11.3',  # reads AVIF
        'tifffile>=2022.4.22',  # comes with scikit-image, which BasicSR needs
        'lmdb>=1.4',
        'einops>=0.7',
        'filelock>=4.1',
        'safetensors>=0.4',
        'spandrel>=0.4.2',  # knows networks by their weights, for encoders from checkpoints
        'PyYAML>=6.0',
        'pydantic>=2.6',
        'jsonschema>=4.18',
        'Jinja2>=3.1',
        'rich>=13.0',
        'tqdm>=4.60',
        'ninja>=1.11',  # builds the optional C++ kernels
    ],
    extras_require={
        'test': ['pytest>=8.0', 'pytest-timeout>=2.2', 'pytest-xdist>=3.5', 'hypothesis>=6.90'],
        'onnx': ['onnx>=1.16', 'onnxruntime>=1.18'],
        'demo': ['gradio>=6.0'],  # the page of `basicsr demo`; takes theme and style at launch from 6.0 on
        'docs': ['mkdocs>=1.6'],
        'dev': ['ruff>=0.12', 'mypy>=1.15', 'types-PyYAML', 'pre-commit>=4.0'],
    },
    entry_points={'console_scripts': ['basicsr = moeisr_basicsr.cli:main']},
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Processing',
        'Typing :: Typed',
    ],
)
