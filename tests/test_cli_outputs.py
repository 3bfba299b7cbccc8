"""Outputs of `basicsr profile` and `basicsr report` replace earlier ones of their own kind, and no other file."""

import json

import pytest
import yaml
from PIL import Image

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.cli import main

DENSE = {'type': 'LIIF', 'encoder': {'type': 'EDSREncoder', 'num_feat': 4, 'num_block': 1}, 'hidden_list': [4]}
RESULTS = schema.document(
    'test',
    {'torch': '2', 'threads': 1, 'cpu': '', 'device': 'cpu', 'kernel': 'torch'},
    [{'case': 'test', 'dataset': 'Set', 'scale': [2, 2], 'image': 'a', 'metrics': {'psnr': 30.0}}],
)
# Each looks a little like what the commands write.
OTHERS = {
    'photo.jpg': 'a photo',
    'mine.json': '{"format": "mine"}',
    'list.json': '[1, 2]',
    'text.json': 'hello',
    'mine.html': '<!DOCTYPE html>\n<html lang="en"><head><title>Super-resolution results</title></head></html>',
    'mine.csv': 'file,model,price\na,b,3\n',
    'tested.json': json.dumps(RESULTS),
}
PROFILE = ('profile', '-opt', 'missing.yml')
REPORT = ('report', 'missing.json')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('MOEISR_KERNELS', 'off')  # nothing is compiled here
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize(
    'command, words, message',
    [
        (PROFILE, ('--json', 'photo.jpg'), "--json photo.jpg: the name must end in '.json'"),
        (PROFILE, ('--json', 'mine.json'), '--json mine.json: this file exists'),
        (PROFILE, ('--json', 'list.json'), '--json list.json: this file exists'),
        (PROFILE, ('--json', 'text.json'), '--json text.json: this file exists'),
        (PROFILE, ('--json', 'tested.json'), '--json tested.json: this file exists'),
        (PROFILE, ('--json', 'folder.json'), 'folder.json is a folder'),
        (PROFILE, ('--json', 'nodir/p.json'), 'the folder nodir does not exist; make it first'),
        (PROFILE, ('--json', 'photo.jpg/sub/p.json'), 'the folder photo.jpg/sub does not exist; make it first'),
        (PROFILE, ('--plot', 'photo.jpg'), "--plot photo.jpg: the name must end in '.png'"),
        (PROFILE, ('--plot', 'photo.png'), '--plot photo.png: this file exists'),
        (PROFILE, ('--plot', 'nodir/p.png'), 'the folder nodir does not exist; make it first'),
        ((*PROFILE, '--train'), ('--json', 'mine.json'), '--json mine.json: this file exists'),
        ((*PROFILE, '--data'), ('--json', 'mine.json'), '--json mine.json: this file exists'),
        (REPORT, ('-o', 'photo.jpg'), "-o photo.jpg: the name must end in '.html'"),
        (REPORT, ('-o', 'mine.html'), '-o mine.html: this file exists'),
        (REPORT, ('-o', 'mine.csv/r.html'), 'the folder mine.csv does not exist; make it first'),
        (REPORT, ('--csv', 'photo'), "--csv photo: the name must end in '.csv'"),
        (REPORT, ('-o', 'r.html', '--csv', 'mine.csv'), '--csv mine.csv: this file exists'),
    ],
)
def test_files_of_others_are_refused_before_any_work(folder, capsys, command, words, message):
    """The input is missing, which any work would complain about."""
    (folder / 'folder.json').mkdir()
    Image.new('RGB', (1000, 400)).save('photo.png')
    for name, content in OTHERS.items():
        (folder / name).write_text(content)
    before = contents(folder)
    assert main([*command, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert contents(folder) == before


def test_earlier_results_and_pictures_are_replaced(folder):
    (folder / 'net.yml').write_text(yaml.safe_dump({'network_g': DENSE}))
    schema.save('p.json', {**RESULTS, 'command': 'profile'})
    (folder / 'p.png').touch()  # empty, as mktemp leaves it
    heights = []
    for scales in (['2'], ['2', '3']):
        assert (
            main(
                [
                    'profile',
                    '-opt',
                    'net.yml',
                    '--lq-size',
                    '5x5',
                    '--scale',
                    *scales,
                    '--repeats',
                    '1',
                    '--no-plain',
                    '--device',
                    'cpu',
                    '--json',
                    'p.json',
                    '--plot',
                    'p.png',
                ]
            )
            == 0
        )
        assert len(schema.load('p.json')['rows']) == len(scales)
        with Image.open('p.png') as picture:
            heights.append(picture.size[1])
    assert heights[0] < heights[1]
    assert sorted(path.name for path in folder.iterdir()) == ['net.yml', 'p.json', 'p.png']


@pytest.mark.parametrize('earlier', ['now', 'empty'])
def test_earlier_pages_and_tables_are_replaced(folder, earlier):
    names = ('r.html', 'r.csv')
    (folder / 'results.json').write_text(json.dumps(RESULTS))
    arguments = ['report', 'results.json', '-o', names[0], '--csv', names[1]]
    assert main(arguments) == 0
    page, rows = (folder / 'r.html').read_text(), (folder / 'r.csv').read_text()
    generator = '<meta name="generator" content="moeisr_basicsr report">'
    assert page.count(generator) == 1
    olds = {'empty': ('', ''), 'now': (page + '<!-- old -->', rows + 'old\n')}[earlier]
    for name, old in zip(names, olds):
        (folder / name).write_text(old)
    assert main(arguments) == 0
    assert ((folder / 'r.html').read_text(), (folder / 'r.csv').read_text()) == (page, rows)
