"""Every model that comes with the package: complete, small, and with a card that belongs to it."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shipped_cases import LIMIT, NETWORK, NOTES, problems, stand_in

from moeisr_basicsr import shipped
from moeisr_basicsr.checkpoint import read_model


def test_every_shipped_file_is_complete():
    found = problems(shipped.FOLDER, shipped.DEFAULT)
    assert not found, '\n'.join(found)


def spoil(change):
    """Rewrite the model 'one' with `change(weights, metadata)`; its card then belongs to another file."""

    def run(folder):
        path = folder / 'one.safetensors'
        with safe_open(path, 'pt') as file:
            weights, metadata = load_file(path), file.metadata()
        change(weights, metadata)
        save_file(weights, path, metadata)

    return run


def cut(folder):
    path = folder / 'one.safetensors'
    path.write_bytes(path.read_bytes()[:-1])


def rewrite_card(old, new):
    def run(folder):
        card = folder / 'one.md'
        assert old in card.read_text()
        card.write_text(card.read_text().replace(old, new))

    return run


DEFECTS = [
    (cut, 'one.safetensors is no whole safetensors file'),
    (spoil(lambda weights, metadata: weights.pop(next(iter(weights)))), 'the weights do not fit'),
    (spoil(lambda weights, metadata: metadata.pop('license')), 'metadata license is missing'),
    (spoil(lambda weights, metadata: metadata.update(param_key='params')), 'not the averaged weights'),
    (spoil(lambda weights, metadata: next(iter(weights.values())).fill_(torch.nan)), 'NaN or infinite'),
    (spoil(lambda weights, metadata: metadata.update(iterations='8')), 'one.md: SHA-256 is missing or wrong'),
    (rewrite_card('# one', '# two'), 'one.md: title is missing'),
    (rewrite_card('## Limits', ''), 'one.md: ## Limits is missing'),
    (lambda folder: (folder / 'one.md').unlink(), 'one.md is missing'),
    (lambda folder: (folder / 'one.safetensors').rename(folder / 'x.safetensors'), 'the default one is not there'),
    (lambda folder: (folder / 'note.txt').write_text(''), 'note.txt belongs to no model'),
    (lambda folder: (folder / 'two.md').write_bytes(bytes(LIMIT)), f'{LIMIT} are allowed'),
]


@pytest.mark.parametrize(('spoiling', 'words'), DEFECTS, ids=[words for _, words in DEFECTS])
def test_the_check_itself(tmp_path, spoiling, words):
    stand_in(tmp_path, 'one')
    stand_in(tmp_path, 'two', {**NETWORK, 'experts': [[4]]})
    assert problems(tmp_path, 'one') == []
    spoiling(tmp_path)
    assert any(words in line for line in problems(tmp_path, 'one')), problems(tmp_path, 'one')


def test_the_stand_in_has_what_is_asked_for(tmp_path):
    assert NOTES.items() <= read_model(stand_in(tmp_path, 'one')).metadata.items()
