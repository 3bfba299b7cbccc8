"""`basicsr upscale`: its arguments. `upscale_jobs` says which image goes to which file, `upscale_run` does it."""

import argparse
import os
import re

from .options import add_device, add_import, add_model, add_routing, import_modules

EPILOG = """\
examples:
  basicsr upscale photo.jpg -o photo_large.png --scale 3.3
  basicsr upscale photos -o large --model model.safetensors --size 3840x2160 --ext webp
  basicsr upscale photo.jpg -o out.png --model RealESRGAN_x4plus.pth --scale 3.3
  basicsr upscale scan.png -o . --model model.safetensors --scale 2.5x4 --expert-map

MODEL may also be a checkpoint of a network for one factor: every one that spandrel reads, and SMFANet. Its image is
resampled, sharply, to the factor that is asked for.

OUT is a file name for one image, or a folder; in a folder the name says the factor: photo_x3.3.png. Of animations the
first frame is taken. Transparency, 16 bit per channel and grey stay as they are, as far as the output's format can hold
them.

The expert map shows which expert made which pixel: cheapest to most expensive in yellow, green, blue and red.
Under torchrun the images are shared among the processes."""
FACTOR = r'(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?'
MAX_FACTOR = 1_000_000  # no image format has so many rows


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add = parser.add_argument
    add('inputs', nargs='+', metavar='IMAGE_OR_FOLDER', help='images, or folders of images')
    add('-o', '--output', required=True, metavar='OUT', help='output file or folder')
    add_model(parser, help_end=' (default: the one that `basicsr models` marks)')
    target = parser.add_mutually_exclusive_group(required=True)
    scale_help = 'factor of at least 1, for example 3.3; or rows x columns, for example 2.5x4'
    target.add_argument('--scale', type=parse_scale, metavar='S', help=scale_help)
    size_help = 'output size, width first, for example 3840x2160'
    target.add_argument('--size', type=parse_size, metavar='WxH', help=size_help)
    add_routing(parser)
    add('-r', '--recursive', action='store_true', help='also the images in subfolders, in subfolders of OUT')
    add('--expert-map', action='store_true', help='also write OUT_experts.png, the map of the experts')
    ext_help = 'format of the output files (default: that of OUT, png in a folder)'
    add('--ext', choices=('png', 'jpg', 'tif', 'webp'), help=ext_help)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument('--overwrite', action='store_true', help='replace output files that exist')
    existing.add_argument('--resume', action='store_true', help='leave out images whose output file exists')
    add_device(parser)
    tile_help = 'input pixels per side that the encoder sees at once; 0 is the whole image (default: by its size)'
    add('--tile', type=int, metavar='N', help=tile_help)
    add_import(parser)
    parser.epilog = EPILOG


def parse_scale(text: str) -> tuple[float, float]:
    """'3.3' or '2.5x4' as (row factor, column factor)."""
    match = re.fullmatch(rf'({FACTOR})(?:[xX×]({FACTOR}))?', text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a factor such as 3.3, or rows x columns such as 2.5x4")
    rows, cols = float(match[1]), float(match[2] or match[1])
    if not (1 <= rows <= MAX_FACTOR and 1 <= cols <= MAX_FACTOR):
        raise argparse.ArgumentTypeError(f"a factor must be at least 1, at most {MAX_FACTOR:,}; got '{text}'")
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
    from .upscale_run import run_jobs

    is_chosen = args.model is not None
    args.model = find_model(args.model)
    jobs = plan(args)  # before the model is loaded: most mistakes are found in a moment
    if not is_chosen and os.environ.get('RANK', '0') == '0':
        print(f'Model: {args.model.stem}, the default; `basicsr models` tells more.')
    return run_jobs(jobs, args)
