"""Files that `basicsr profile` and `basicsr report` write: refused before any work, replaced with --overwrite only."""

import json
import os

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
PROFILE = ('profile', '-opt', 'missing.yml')
REPORT = ('report', 'missing.json')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('MOEISR_KERNELS', 'off')  # nothing is compiled here
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    'command, words, message',
    [
        (PROFILE, ('--json', 'photo.jpg'), "--json photo.jpg: the name must end in '.json'"),
        (PROFILE, ('--json', 'mine.json'), '--json mine.json: this file exists; give --overwrite'),
        (PROFILE, ('--json', 'link.json'), '--json link.json: this file exists'),
        (PROFILE, ('--json', 'folder.json', '--overwrite'), 'folder.json is a folder'),
        (PROFILE, ('--json', 'nodir/p.json'), 'the folder nodir does not exist; make it first'),
        (PROFILE, ('--json', 'photo.jpg/sub/p.json'), 'the folder photo.jpg/sub does not exist; make it first'),
        (PROFILE, ('--plot', 'photo.jpg'), "--plot photo.jpg: the name must end in '.png'"),
        (PROFILE, ('--plot', 'photo.png'), '--plot photo.png: this file exists'),
        ((*PROFILE, '--train'), ('--json', 'mine.json'), '--json mine.json: this file exists'),
        ((*PROFILE, '--data'), ('--json', 'mine.json'), '--json mine.json: this file exists'),
        (REPORT, ('-o', 'photo.jpg'), "-o photo.jpg: the name must end in '.html'"),
        (REPORT, ('-o', 'mine.html'), '-o mine.html: this file exists'),
        (REPORT, ('-o', 'mine.json/r.html'), 'the folder mine.json does not exist; make it first'),
        (REPORT, ('--csv', 'photo'), "--csv photo: the name must end in '.csv'"),
        (REPORT, ('-o', 'r.html', '--csv', 'mine.csv'), '--csv mine.csv: this file exists'),
    ],
)
def test_mistakes_are_told_before_any_work(folder, capsys, command, words, message):
    """The input is missing, which any work would complain about."""
    (folder / 'folder.json').mkdir()
    os.symlink('gone', 'link.json')
    names = ('photo.jpg', 'photo.png', 'mine.json', 'mine.html', 'mine.csv')
    for name in names:
        (folder / name).write_text(name)
    assert main([*command, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert all((folder / name).read_text() == name for name in names)
    assert sorted(os.listdir()) == sorted(['folder.json', 'link.json', *names])


def test_overwrite_replaces(folder):
    (folder / 'net.yml').write_text(yaml.safe_dump({'network_g': DENSE}))
    words = ['-opt', 'net.yml', '--lq-size', '5x5', '--repeats', '1', '--no-plain', '--device', 'cpu', '--overwrite']
    heights = []
    for scales in (['2'], ['2', '3']):
        assert main(['profile', *words, '--json', 'p.json', '--plot', 'p.png', '--scale', *scales]) == 0
        assert len(schema.load('p.json')['rows']) == len(scales)
        with Image.open('p.png') as picture:
            heights.append(picture.size[1])
    assert heights[0] < heights[1]
    (folder / 'results.json').write_text(json.dumps(RESULTS))
    for name in ('r.html', 'r.csv'):
        (folder / name).write_text('old')
    assert main(['report', 'results.json', '-o', 'r.html', '--csv', 'r.csv', '--overwrite']) == 0
    assert (folder / 'r.html').read_text().endswith('</html>') and ',30.0' in (folder / 'r.csv').read_text()
    assert sorted(os.listdir()) == ['net.yml', 'p.json', 'p.png', 'r.csv', 'r.html', 'results.json']
