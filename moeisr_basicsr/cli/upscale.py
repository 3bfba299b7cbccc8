"""`basicsr upscale`."""

import argparse
import os
import re

from .options import add_import, add_model, import_modules

EPILOG = """\
examples:
  basicsr upscale photo.jpg -o photo_large.png --scale 3.3
  basicsr upscale photos -o large --model model.safetensors --size 3840x2160 --ext webp
  basicsr upscale scan.png -o . --model model.safetensors --scale 2.5x4 --expert-map

OUT is a file name for one image, or a folder; in a folder the name says the factor: photo_x3.3.png. Transparency,
16 bit per channel and grey stay as they are, as far as the output's format can hold them.

`basicsr models` lists the models that come with the package. A name of that list means that model; where a file of
exactly this name lies in the current folder, ./NAME is the file, and NAME alone an error.

The expert map shows which expert made which pixel, from cheap to dear in yellow, green, blue and red.
Under torchrun the images are shared among the processes."""
FACTOR = r'\d+(?:\.\d*)?|\.\d+'


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument('inputs', nargs='+', metavar='IMAGE_OR_FOLDER', help='images, or folders of images')
    parser.add_argument('-o', '--output', required=True, metavar='OUT', help='output file or folder')
    add_model(parser, help_end=' (default: the one that `basicsr models` marks)')
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        '--scale',
        type=parse_scale,
        metavar='S',
        help='factor of at least 1, for example 3.3; or rows x columns, for example 2.5x4',
    )
    target.add_argument(
        '--size', type=parse_size, metavar='WxH', help='output size, width first, for example 3840x2160'
    )
    routing = parser.add_mutually_exclusive_group()
    routing.add_argument(
        '--cost-weight',
        type=parse_number,
        default=0.0,
        metavar='K',
        help='above 0 cheaper, below 0 dearer than the trained routing (default 0)',
    )
    routing.add_argument(
        '--budget',
        type=parse_number,
        metavar='F',
        help='decoder cost, as a fraction of the dearest expert everywhere, in (0, 1]',
    )
    parser.add_argument('--expert-map', action='store_true', help='also write OUT_experts.png, the map of the experts')
    parser.add_argument(
        '--ext',
        choices=('png', 'jpg', 'tif', 'webp'),
        help='format of the output files (default: that of OUT, png in a folder)',
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument('--overwrite', action='store_true', help='replace output files that exist')
    existing.add_argument('--resume', action='store_true', help='leave out images whose output file exists')
    parser.add_argument('--device', metavar='D', help='cpu, cuda, cuda:1 (default: a GPU if there is one)')
    parser.add_argument(
        '--precision',
        choices=('fp32', 'bf16', 'fp16'),
        default='fp32',
        help='number format of encoder and experts (default fp32)',
    )
    parser.add_argument(
        '--tile',
        type=int,
        metavar='N',
        help='input pixels per side that the encoder sees at once; 0 is the whole image (default: as '
        'the size of the image asks)',
    )
    add_import(parser)
    parser.epilog = EPILOG


def parse_number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = float('nan')
    if not abs(value) < float('inf'):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return value


def parse_scale(text: str) -> tuple[float, float]:
    """'3.3' or '2.5x4' as (row factor, column factor)."""
    match = re.fullmatch(rf'({FACTOR})(?:[xX×]({FACTOR}))?', text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a factor such as 3.3, or rows x columns such as 2.5x4")
    rows, cols = float(match[1]), float(match[2] or match[1])
    if rows < 1 or cols < 1:
        raise argparse.ArgumentTypeError(f"a factor must be at least 1; got '{text}'")
    return rows, cols


def parse_size(text: str) -> tuple[int, int]:
    """'3840x2160', width first, as (rows, columns)."""
    match = re.fullmatch(r'(\d+)[xX×](\d+)', text.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 3840x2160, width first")
    return int(match[2]), int(match[1])


def run(args: argparse.Namespace) -> int:
    """Upscale every image; one that fails is reported, and the others go on."""
    import_modules(args.modules)
    from moeisr_basicsr.shipped import find_model

    from .upscale_jobs import plan

    is_chosen = args.model is not None
    args.model = find_model(args.model)
    jobs = plan(args)  # before the model is loaded: most mistakes are found in a moment
    if not is_chosen and os.environ.get('RANK', '0') == '0':
        print(f'Model: {args.model.stem}, the default; `basicsr models` tells more.')
    from .upscale_run import Upscaler

    return Upscaler(args).run(jobs)
