"""The whole job in minutes on two CPU cores: `python3 scripts/quickstart.py`.

Sets up `.venv` first if it is missing. Then, with the `basicsr` command that users have, it trains a small MoEISR on
six photographs, compares it with bicubic interpolation on three others, and enlarges one of those by 2.5. Everything
is written below the current folder, to `experiments/quickstart`.

Exit code 0 if the network beats bicubic by the gains of `EXPECTED_GAINS`, 1 if it does not or a step failed.
"""

import json
import os
import sys
import time

import bootstrap

ASSETS = os.path.join(bootstrap.ROOT, 'assets', 'quickstart')
OPTIONS = os.path.join(bootstrap.ROOT, 'options', 'quickstart.yml')
EXPERIMENT = os.path.join('experiments', 'quickstart')
EXPECTED_GAINS = {'x2': 0.5, 'x3.3': 0.3, 'x4': 0.3}  # dB of luma PSNR over bicubic, on the validation photographs
PHOTOGRAPH, FACTOR = 'kodim21', '2.5'
MAX_THREADS = 4  # more do not help a network of this size


def main():
    """Train, compare, upscale; returns the exit code."""
    start = time.time()
    for step in (train, convert, upscale):
        code = step()
        if code != 0:
            print(f'Quickstart stopped: the step "{step.__name__}" ended with exit code {code}.')
            return code
    too_low = report(validation_results())
    print(f'Pictures, in {os.path.abspath(EXPERIMENT)}:')
    print('  visualization/   each validation photograph at x2, x3.3 and x4, and the map of the experts that made it')
    print(f'  {enlarged_name()}   a photograph enlarged by {FACTOR}')
    print('  {}   its map of experts'.format(enlarged_name('_experts')))
    print(f'Finished in {time.time() - start:.0f} s.')
    for scale, gain in too_low:
        print(
            f'Error: the gain at {scale} is {gain:.2f} dB, expected at least {EXPECTED_GAINS[scale]:.2f} dB.',
            file=sys.stderr,
        )
    return 1 if too_low else 0


def basicsr(*arguments):
    """Run the `basicsr` command in this process."""
    from moeisr_basicsr.cli import main as command

    print('\n$ basicsr ' + ' '.join(arguments), flush=True)
    return command(list(arguments))


def train():
    """Train and validate, with the photographs' folders as absolute paths."""
    val = os.path.join(ASSETS, 'val')
    folders = {'train': os.path.join(ASSETS, 'train'), 'val': val, 'val_2': val, 'val_3': val}
    overrides = [f'datasets:{name}:dataroot_gt={path}' for name, path in folders.items()]
    return basicsr('train', '-opt', OPTIONS, '--force_yml', *overrides)


def convert():
    """Make the model file that needs no YAML."""
    return basicsr('convert', os.path.join(EXPERIMENT, 'models', 'net_g_latest.pth'), '-o', model_file())


def upscale():
    """Enlarge one validation photograph by a factor that is no whole number."""
    return basicsr(
        'upscale',
        os.path.join(ASSETS, 'val', PHOTOGRAPH + '.png'),
        '--model',
        model_file(),
        '--scale',
        FACTOR,
        '--expert-map',
        '-o',
        os.path.join(EXPERIMENT, enlarged_name()),
    )


def model_file():
    """The converted model's path."""
    return os.path.join(EXPERIMENT, 'quickstart.safetensors')


def enlarged_name(suffix=''):
    """The file name of the enlarged photograph."""
    return f'{PHOTOGRAPH}_x{FACTOR}{suffix}.png'


def validation_results():
    """The last validation's results, one dict per scale."""
    with open(os.path.join(EXPERIMENT, 'metrics.jsonl'), encoding='utf-8') as handle:
        lines = [json.loads(line) for line in handle]
    results = {line['scale']: line for line in lines if line['kind'] == 'validation'}
    return [results[scale] for scale in EXPECTED_GAINS]


def report(results):
    """Print the table; returns (scale, gain) of each gain that is too low."""
    print('\nThree photographs that were not trained on, PSNR of luma in dB:')
    print(
        '{:>6} {:>9} {:>9} {:>7}   {}'.format(
            'scale', 'bicubic', 'MoEISR', 'gain', 'share of each expert, cheapest to most expensive'
        )
    )
    too_low = []
    for result in results:
        psnr, bicubic = result['metrics']['psnr'], result['metrics']['bicubic_psnr']
        shares = '  '.join(f'{share:4.0%}' for share in result['shares'])
        print('{:>6} {:9.2f} {:9.2f} {:+7.2f}   {}'.format(result['scale'], bicubic, psnr, psnr - bicubic, shares))
        if not psnr - bicubic >= EXPECTED_GAINS[result['scale']]:  # also when it is not a number
            too_low.append((result['scale'], psnr - bicubic))
    print(flush=True)
    return too_low


def in_environment():
    """Run this script again with the environment's Python."""
    threads = str(min(MAX_THREADS, os.cpu_count() or 1))
    return bootstrap.run(
        [os.path.abspath(__file__)] + sys.argv[1:], {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', threads)}
    )


if __name__ == '__main__':
    sys.exit(main() if bootstrap.inside() else bootstrap.main(in_environment))
