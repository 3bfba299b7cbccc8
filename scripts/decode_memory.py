"""Peak memory of decoding one large image, alone in its process; a part of `benchmark_decode.py`.

Prints one JSON object: `mib`, the peak beyond features and output (null where the system cannot say), `code`
('torch' or 'fused'), and `loads`, the experts' shares of the pixels.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch

from moeisr_basicsr.analysis.measure import MIB, PeakMeter
from moeisr_basicsr.analysis.routing_stats import expert_shares
from moeisr_basicsr.core import MoEDecoder, output_size, render
from moeisr_basicsr.core.control import Budget
from moeisr_basicsr.core.render import TORCH
from moeisr_basicsr.inference import evaluation
from moeisr_basicsr.kernels import fused_backend


def main() -> None:
    """Decode with the mapper's own routing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--precision', default='fp32')
    parser.add_argument('--lq-size', type=int, default=512)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--budget', type=float, help='route by a budget; by default as trained')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    decoder = MoEDecoder(64)
    with torch.no_grad():
        decoder.mapper.query_out.weight.mul_(100)  # random weights would send nearly all pixels to one expert
    backend = fused_backend(decoder, torch.device('cpu'), args.precision)
    feat = torch.randn(1, 64, args.lq_size, args.lq_size)
    with evaluation(decoder, 'cpu', args.precision):
        for part in (feat[..., :16, :16], feat):  # a first small one loads the libraries
            control = None if args.budget is None else Budget(args.budget, decoder.expert_costs)
            meter = PeakMeter(torch.device('cpu'))
            size = output_size(part.shape[-2:], 8)
            output, expert_map = render(decoder, part, size, control=control, backend=backend or TORCH)
            peak = meter.read()
    result = {'code': 'torch' if backend is None else 'fused', 'loads': expert_shares(expert_map, 4)}
    print(json.dumps({**result, 'mib': peak and peak - (output.nbytes + expert_map.nbytes) / MIB}))


if __name__ == '__main__':
    main()
