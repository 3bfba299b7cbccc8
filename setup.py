"""Package metadata. The ranges are open; the versions tested together are in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name='moeisr_basicsr',
    version='0.1.0',
    description='MoEISR, arbitrary-scale image super-resolution by a mixture of implicit decoders, for BasicSR',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='super-resolution, arbitrary scale, implicit neural representation, mixture of experts, BasicSR',
    packages=find_packages(include=['moeisr_basicsr', 'moeisr_basicsr.*']),
    package_data={
        'moeisr_basicsr': ['kernels/csrc/*.cpp', 'kernels/csrc/*.h', 'weights/*.safetensors', 'weights/*.md']
    },
    python_requires='>=3.10,<3.13',  # BasicSR 1.4.2's own setup.py fails on 3.13
    install_requires=[
        'basicsr==1.4.2',  # brings tensorboard under its nightly name, lmdb's and OpenCV's bindings
        'torch>=2.1',
        'torchvision>=0.16',
        'mmengine-lite>=0.10',  # the package `mmengine` without matplotlib and a second OpenCV
        'numpy>=1.24',
        'opencv-python>=4.8',
        'Pillow>=9.1',
        'tifffile>=2022.4.22',  # comes with scikit-image, which BasicSR needs
        'lmdb>=1.4',
        'einops>=0.7',
        'safetensors>=0.4',
        'PyYAML>=6.0',
        'rich>=13.0',
        'tqdm>=4.60',
        'ninja>=1.11',  # builds the optional C++ kernels
    ],
    extras_require={'test': ['pytest>=8.0', 'pytest-timeout>=2.2', 'pytest-xdist>=3.5', 'hypothesis>=6.90']},
    entry_points={'console_scripts': ['basicsr = moeisr_basicsr.cli:main']},
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)
