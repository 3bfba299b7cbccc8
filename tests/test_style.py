"""What CONTRIBUTING asks of every file and can be counted."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ('examples', 'moeisr_basicsr', 'scripts', 'tests')
WIDTH = 120


def too_wide(text):
    """The numbers of the lines that are wider than `WIDTH`, from 1."""
    return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]


def test_no_line_is_too_wide():
    files = [*ROOT.glob('*.py'), *(path for folder in FOLDERS for path in (ROOT / folder).rglob('*.py'))]
    assert {Path(__file__).resolve(), ROOT / 'setup.py', ROOT / 'examples/fit_depth.py'} <= set(files)
    assert [
        f'{path.relative_to(ROOT)}:{number}'
        for path in sorted(files)
        for number in too_wide(path.read_text(encoding='utf-8'))
    ] == []


def test_no_prose_is_too_wide():
    """Tables cannot be wrapped."""
    for path in ROOT.glob('*.md'):
        lines = path.read_text(encoding='utf-8').splitlines()
        assert [number for number in too_wide('\n'.join(lines)) if not lines[number - 1].startswith('|')] == [], path


def test_the_check_itself():
    assert too_wide(f'{"x" * 120}\n{"x" * 121}\n{"ä" * 120}\n') == [2]
