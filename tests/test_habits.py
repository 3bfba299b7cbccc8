"""The tree passes what .pre-commit-config.yaml runs before a commit: lint, format and types."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
(REPO,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))['repos']
ENTRIES = [hook['entry'].split() for hook in REPO['hooks']]


@pytest.mark.timeout(900)  # mypy without a cache reads torch's types
@pytest.mark.parametrize('entry', ENTRIES, ids=' '.join)
def test_hook(entry):
    assert entry[0] == 'python'
    done = subprocess.run([sys.executable, *entry[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
