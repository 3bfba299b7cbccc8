"""`basicsr demo`."""

import argparse
import importlib.util

from moeisr_basicsr.errors import UserError

from .options import add_device, add_import, add_model, import_modules

EPILOG = """\
examples:
  basicsr demo
  basicsr demo --model my_network_x4.pth --port 8000

The page lets you enlarge a picture of yours by any factor, trade quality for computation, and see which expert made
which pixel. It is served on this machine only and loads nothing from elsewhere; pictures are deleted at the end."""
PRECISIONS = ('fp32', 'bf16', 'fp16')


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add_model(parser, help_end=' (default: the one that `basicsr models` marks)')
    host = 'address to serve on; 0.0.0.0 lets everybody on your network use the page (default 127.0.0.1)'
    parser.add_argument('--host', default='127.0.0.1', metavar='H', help=host)
    parser.add_argument('--port', type=int, default=7860, metavar='N', help='(default 7860)')
    number_format = 'number format of encoder and experts (default fp32)'
    parser.add_argument('--precision', choices=PRECISIONS, default='fp32', help=number_format)
    add_device(parser)
    add_import(parser)
    # what `load_network` asks besides
    parser.set_defaults(expert_map=False, tile=None, cost_weight=0.0, budget=None)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    if importlib.util.find_spec('gradio') is None:
        raise UserError('basicsr demo needs the package gradio, which is not installed: pip install gradio')
    import_modules(args.modules)
    from moeisr_basicsr.shipped import find_model
    from moeisr_basicsr.tools import demo

    from .upscale_run import load_network

    args.model = find_model(args.model)
    demo.serve(load_network(args), args.model.stem, args.host, args.port, args.precision)
    return 0
