"""`basicsr export`."""

import argparse
import logging
from pathlib import Path

from .options import add_import, import_modules
from .outputs import add_overwrite, check_output

EPILOG = """\
examples:
  basicsr export moeisr_edsr_light -o moeisr.onnx
  basicsr export model.safetensors -o model.onnx
  basicsr export SMFANet_DIV2K_100w_x4SR.pth -o any_factor.onnx

MODEL is what `basicsr upscale --model` takes. The file has the whole network: an image of any size, the output size
and the cost weight go in; each output pixel is computed by its own expert only. Before the file is written, onnxruntime
upscales one image with it, and the largest difference from PyTorch's result is printed. Needs
`pip install onnx onnxruntime`."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        'model', metavar='MODEL', help='a model that comes with the package, a model file or checkpoint'
    )
    parser.add_argument('-o', '--output', required=True, metavar='OUT.onnx', help='ONNX file to write')
    add_overwrite(parser)
    add_import(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Export one network."""
    import_modules(args.modules)
    check_output('-o', args.output, '.onnx', args.overwrite)
    from basicsr.utils import get_root_logger

    from moeisr_basicsr.shipped import find_model
    from moeisr_basicsr.tools.onnx_file import OPSET, export

    get_root_logger(log_level=logging.WARNING)  # not one line for each network that is built
    found = export(find_model(args.model), args.output)
    print(
        f'{args.output}: opset {OPSET}, {Path(args.output).stat().st_size / 2**20:.1f} MiB; in onnxruntime the largest '
        f'difference is {found.largest:.1e}, {found.rerouted:.2%} of the pixels go to another expert'
    )
    return 0
