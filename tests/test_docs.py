"""What README and docs say holds: links, files, commands, code and the site that is built of them."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY

from moeisr_basicsr.core import decoder, render_image

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md'))]
FOLDERS = 'assets|docs|examples|moeisr_basicsr|options|scripts|tests'
COMMANDS = (
    *('train', 'test', 'check', 'upscale', 'models', 'profile', 'report'),
    *('convert', 'adapt', 'export', 'demo'),
)
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf'^```{language}\n(.*?)^```$', page.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures within the repository."""
    return [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'\w+:', link)]


def headings(text: str) -> set[str]:
    """Anchors that headings make."""
    titles = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title).strip().lower().replace(' ', '-') for title in titles}


def missing_links(page: Path, text: str) -> list[str]:
    missing = []
    for link in links(text):
        target, _, anchor = link.partition('#')
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in headings(path.read_text(encoding='utf-8'))):
            missing.append(link)
    return missing


def missing_files(text: str) -> list[str]:
    """Files that a text names and that are not there; NAME stands for a name that the reader chooses."""
    named = set(re.findall(rf'(?<![\w/.])(?:{FOLDERS})/[\w./*-]*[\w*]', text))
    named |= {f'options/{name}' for name in re.findall(r'(?<![\w/.])\w+_(?:edsr|rdn|swinir)\.yml', text)}
    return sorted(name for name in named if 'NAME' not in name and not list(ROOT.glob(name)))


def commands(page: Path) -> list[list[str]]:
    """The command lines of the shell blocks, in words."""
    text = '\n'.join(blocks(page, 'bash')).replace('\\\n', ' ')
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def parse(words: list[str]) -> None:
    """Check the options of one command line of this project; others are not looked at.

    Raises:
        SystemExit: argparse rejects it.
    """
    if 'moeisr_basicsr' in words[:4]:  # torchrun ... -m moeisr_basicsr
        words = ['basicsr', *words[words.index('moeisr_basicsr') + 1 :]]
    if words[0] == 'basicsr':
        assert words[1] in COMMANDS
        parser = argparse.ArgumentParser(allow_abbrev=False)
        importlib.import_module(f'moeisr_basicsr.cli.{words[1]}').add_parser(parser)
        parser.parse_args(words[2:])
    elif words[0].startswith('python') and words[1].endswith('.py'):
        source = (ROOT / words[1]).read_text(encoding='utf-8')
        unknown = [word for word in words if word.startswith('--') and f"'{word}'" not in source]
        assert unknown == [], words


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').split()) <= 900


@each_page
def test_links_and_files_exist(page):
    text = page.read_text(encoding='utf-8')
    assert missing_links(page, text) == []
    assert missing_files(text) == []


@each_page
def test_commands_parse(page):
    for words in commands(page):
        parse(words)


@each_page
def test_no_prose_is_too_wide(page):
    """Tables cannot be wrapped."""
    lines = page.read_text(encoding='utf-8').splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith('|')]
    assert wide == []


def test_the_checks_themselves():
    text = '[a](LICENSE) [b](NONE.md) [c](#start) [d](README.md#none) [e](https://example.org) ![f](no.png)\n# Start'
    page = ROOT / 'README.md'
    assert missing_links(page, text) == ['NONE.md', 'README.md#none', 'no.png']
    text = 'options/none.yml, `liif_edsr.yml`, `my_edsr.yml`, scripts/quickstart.py, options/*.yml, options/NAME.yml.'
    assert missing_files(text) == ['options/my_edsr.yml', 'options/none.yml']
    for words in ('basicsr upscale a.png -o b.png', 'torchrun -m moeisr_basicsr train --scale 3'):
        with pytest.raises(SystemExit):
            parse(words.split())
    with pytest.raises(AssertionError):
        parse(['python', 'scripts/create_lmdb.py', '--none'])


@pytest.mark.parametrize('page', ['README.md', 'docs/index.md'])
def test_python_of_the_first_pages_runs(page, capsys):
    (code,) = blocks(ROOT / page, 'python')
    exec(compile(code, page, 'exec'), {})
    assert capsys.readouterr().out.split('\n')[-2] == 'torch.Size([1, 3, 120, 256]) torch.Size([1, 120, 256])'


def test_own_parts_work_as_shown(monkeypatch):
    for registry in (ARCH_REGISTRY, LOSS_REGISTRY):
        monkeypatch.setattr(registry, '_obj_map', dict(registry._obj_map))
    monkeypatch.setattr(decoder, 'FAMILIES', dict(decoder.FAMILIES))
    page = ROOT / 'docs/encoders.md'
    for code in blocks(page, 'python'):
        exec(compile(code, str(page), 'exec'), {'__name__': 'parts_of_mine'})
    network, _ = blocks(page, 'yaml')
    net = build_network({**yaml.safe_load(network)['network_g'], 'scale': 1.5}).eval()
    assert net(torch.rand(1, 3, 8, 6)).shape == (1, 3, 12, 9)
    point = decoder.MoEDecoder(4, family='point', experts=[[8], [8, 8]], gain=2.0)
    assert point.expert_macs == [4 * 6 * 8 + 8 * 3, 4 * (6 * 8 + 8 * 8) + 8 * 3]
    assert render_image(point.eval(), torch.rand(1, 4, 5, 6), (9, 11)).output.shape == (1, 3, 9, 11)
    loss = build_loss({'type': 'SquareRootLoss', 'loss_weight': 2.0})(torch.full((2, 3), 0.2499), torch.zeros(2, 3))
    torch.testing.assert_close(loss, torch.tensor(1.0))


@pytest.mark.parametrize('block', [block for page in PAGES for block in blocks(page, 'yaml')])
def test_yaml_blocks_are_sections_of_an_options_file(block):
    options = yaml.safe_load(block)
    assert options.keys() <= {'datasets', 'network_g', 'val'}
    for dataset in options.get('datasets', {}).values():
        assert dataset['type'] in DATASET_REGISTRY
    for metric in options.get('val', {}).get('metrics', {}).values():
        assert metric['type'] in METRIC_REGISTRY


def test_site_builds_without_a_broken_link(tmp_path):
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.name for path in tmp_path.glob('*/index.html')}
    assert {path.stem for path in PAGES if path.parent.name == 'docs'} - {'index'} <= pages
    assert {'results', 'contributing', 'changelog'} <= pages
    assert 'src="../method.svg"' in (tmp_path / 'design/index.html').read_text(encoding='utf-8')


def test_the_page_of_keys_is_up_to_date():
    """In a process of its own, where no other test has registered classes."""
    command = [sys.executable, '-m', 'moeisr_basicsr', 'train', '--keys', '--markdown']
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / 'docs/keys.md').read_text(encoding='utf-8')
