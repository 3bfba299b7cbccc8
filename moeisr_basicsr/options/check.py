"""The check of a whole options file against the tables: every mistake at once, each with its file and line."""
import re
from collections.abc import Mapping
from typing import Any

from moeisr_basicsr.errors import UserError, did_you_mean

from .kinds import Data, File, Int, Kind
from .reader import Document, KeyPath, join_keys
from .schema import DATASET_OURS, UNSET, Key, Named, Section, Table, Typed
from .typed import Resolved, is_known, registered, root_keys, section_keys

TRAIN_PHASES = re.compile(r'train|val(_.+)?')
TEST_PHASES = re.compile(r'(test|val)(_.+)?')
FORCED_LAST = 10**9  # problems of the command line come after those of the file's last line


class OptionsError(UserError):
    """Mistakes in an options file; `problems` has one line for each."""

    def __init__(self, problems: list[str]):
        super().__init__('\n'.join(problems))
        self.problems = problems


class Checker:
    """Walks through the options, collects problems, fills in defaults.

    Args:
        document: The file; its data is changed (defaults), so hand in a copy.
        forced: Keys that `--force_yml` set, with the entry that did.
        is_train: For training or for testing.
    """

    def __init__(self, document: Document, forced: dict[KeyPath, str], is_train: bool):
        self.document = document
        self.forced = forced
        self.is_train = is_train
        self.problems: list[tuple[int, str]] = []
        self.missing: set[str] = set()  # paths already reported

    def run(self) -> None:
        """Check everything.

        Raises:
            OptionsError: There are problems.
        """
        data = self.document.data
        for name in ('path', 'logger', *(() if self.is_train else ('val', ))):
            if data.get(name) is None:
                data[name] = {}
        keys = root_keys(data, self.is_train)
        self.model_type(data.get('model_type'))
        self.section(data, keys, ())
        self.phases(data.get('datasets'))
        self.routing(data.get('val'))
        self.temperature(data.get('train'))
        self.finish()

    def finish(self) -> None:
        """Raise what was found.

        Raises:
            OptionsError: There are problems.
        """
        if self.problems:
            raise OptionsError([text for _, text in sorted(self.problems, key=lambda problem: problem[0])])

    def add(self, keys: KeyPath, message: str) -> None:
        """Note a problem of the value at `keys`."""
        for depth in range(len(keys), 0, -1):
            if keys[:depth] in self.forced:
                where, order = self.forced[keys[:depth]], FORCED_LAST
                break
        else:
            where, order = self.document.where(keys), self.document.line(keys)
        shown = f'{join_keys(keys)}: ' if keys else ''
        self.problems.append((order, f'{where}: {shown}{message}'))

    def section(self, data: dict, keys: Resolved, at: KeyPath) -> None:
        """Check the keys of one section."""
        for name in list(data):
            if name in keys.table:
                self.value(data, name, keys.table[name], (*at, name))
            elif not keys.open:
                known = [key for key in keys.table if key not in data]
                hint = did_you_mean(name, known) or (f' Allowed here: {", ".join(sorted(known))}.' if known else '')
                self.add((*at, name), f'unknown key.{hint}')
        for name, key in keys.table.items():
            if name in data:
                continue
            if key.required:
                about = f' ({key.about})' if key.about else ''
                self.add(at, f"the key '{name}' is missing{about}.")
            elif key.default is not UNSET:
                data[name] = key.default

    def value(self, data: dict, name: str, key: Key, at: KeyPath) -> None:
        """Check one value, and what lies below it."""
        value = data[name]
        if value is None and key.null:
            return
        problem = key.kind.problem(value)
        if problem:
            if isinstance(key.kind, (Data, File)) and isinstance(value, str):
                if value in self.missing:
                    return  # one missing folder is one mistake, however many datasets name it
                self.missing.add(value)
            self.add(at, problem)
        elif isinstance(key.kind, Int):
            data[name] = int(value)  # 1e5 is a float in YAML
        elif isinstance(key.kind, Named):
            item = Key(key.kind.item, '')
            for entry in value:
                self.value(value, entry, item, (*at, entry))
        elif isinstance(key.kind, (Section, Typed)):
            self.section(value, section_keys(key.kind, value, name), at)

    def model_type(self, name: Any) -> None:
        """The model must be registered."""
        if isinstance(name, str) and name.strip() and registered('MODEL', name) is None:
            from .typed import registry
            known = list(registry('MODEL').keys())
            self.add(('model_type', ), f'must be the name of a registered model: {", ".join(known)}; got {name!r}.'
                                       f'{did_you_mean(name, known)}')

    def phases(self, datasets: Any) -> None:
        """Training has one `train` dataset, and `val` ones; testing has `test` or `val` ones."""
        if not isinstance(datasets, Mapping):
            return
        allowed = TRAIN_PHASES if self.is_train else TEST_PHASES
        words = 'train, val, val_2, ... in training' if self.is_train else 'test, test_2, ... (or val, ...) in testing'
        for name, dataset in datasets.items():
            if not allowed.fullmatch(name):
                near = did_you_mean(name, ('train', 'val', 'val_2') if self.is_train else ('test', 'test_2', 'val'))
                self.add(('datasets', name), f'a dataset must be called {words}.{near}')
            elif isinstance(dataset, Mapping):
                self.images(dataset, ('datasets', name))
        if self.is_train and 'train' not in datasets:
            self.add(('datasets', ), "the key 'train' is missing.")
        if not self.is_train and not datasets:
            self.add(('datasets', ), "a test needs at least one dataset, called 'test'.")

    def images(self, dataset: Mapping, at: KeyPath) -> None:
        """A dataset of ours or of BasicSR needs its folders, and an LMDB folder has a name that says so."""
        backend = dataset.get('io_backend')
        kind = backend.get('type') if isinstance(backend, Mapping) else None
        for name in ('dataroot_gt', 'dataroot_lq'):
            root = dataset.get(name)
            if kind == 'lmdb' and isinstance(root, str) and not root.endswith('.lmdb'):
                self.add((*at, name), f"the name of an LMDB folder must end in '.lmdb'; got {root!r}.")
        self.patches(dataset, at)
        entry = dataset.get('type')
        known = registered('DATASET', entry) if isinstance(entry, str) else None
        if known is not None and is_known(known) and not any(
                dataset.get(name) for name in ('dataroot_gt', 'dataroot_lq')):
            self.add(at, 'a dataset needs dataroot_gt or dataroot_lq.')

    def patches(self, dataset: Mapping, at: KeyPath) -> None:
        """What the keys of an arbitrary-scale dataset must be together."""
        if dataset.get('type') not in DATASET_OURS:
            return
        lq_size, sample_q = dataset.get('lq_size', 48), dataset.get('sample_q', 2304)
        if all(isinstance(value, int) and value > 0 for value in (lq_size, sample_q)) and sample_q > lq_size**2:
            self.add((*at, 'sample_q'), f'must be at most lq_size squared, {lq_size**2}: at a factor of 1 an HR patch '
                                        f'has no more pixels; got {sample_q}.')
        limits = dataset.get('scale_range')
        if isinstance(limits, list) and len(limits) == 2 and all(isinstance(value, (int, float)) for value in limits):
            if limits[0] > limits[1]:
                self.add((*at, 'scale_range'), f'must rise; got {limits}.')
        if at[1] != 'train' and dataset['type'] == 'ArbitraryScaleImageDataset' and dataset.get('scale') is None \
                and self.document.data.get('scale') is None:
            self.add(at, "the key 'scale' is missing: the factor to evaluate at, or [rows, columns].")

    def routing(self, val: Any) -> None:
        """A budget decides the cost weight; both at once contradict each other."""
        if isinstance(val, Mapping) and val.get('budget') is not None and val.get('cost_weight') is not None:
            self.add(('val', 'cost_weight'), 'give either budget or cost_weight, not both.')

    def temperature(self, train: Any) -> None:
        """A temperature that changes needs to know where to and when."""
        options = train.get('temperature') if isinstance(train, Mapping) else None
        if isinstance(options, Mapping) and options.get('type', 'constant') != 'constant':
            for name in ('end', 'total_iter'):
                if name not in options:
                    self.add(('train', 'temperature'), f"the key '{name}' is missing; {options['type']} needs it.")


def known_keys(data: dict, keys: tuple[str, ...], is_train: bool) -> tuple[Table, bool]:
    """The keys allowed in the section at `keys`, and whether others pass too; for `--force_yml`."""
    resolved, value = root_keys(data, is_train), data
    for place, name in enumerate(keys):
        value = value.get(name) if isinstance(value, dict) else None
        value = value if isinstance(value, dict) else {}
        kind: Kind = resolved.table[name].kind if name in resolved.table else Kind()
        if isinstance(kind, Named):
            resolved = Resolved({entry: Key(kind.item, '') for entry in value})
        else:
            resolved = section_keys(kind, value, keys[place])
    return resolved
