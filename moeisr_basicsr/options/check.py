"""The check of a whole options file against the tables: every mistake at once, each with its file and line."""

from typing import Any

from moeisr_basicsr.errors import UserError, did_you_mean

from .kinds import Choice, Data, File, Kind
from .reader import Document, KeyPath, join_keys
from .rules import check_together
from .schema import REFUSED, UNSET, Key, Named, Section, Typed
from .typed import Resolved, registered, registry, root_keys, section_keys

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
        for name in ('path', 'logger', *(() if self.is_train else ('val',))):
            if data.get(name) is None:
                data[name] = {}
        if self.is_train and data.get('val') is None:
            leave_out_validation(data)
        keys = root_keys(data, self.is_train)
        self.model_type(data.get('model_type'))
        self.section(data, keys, ())
        for at, message in check_together(data, self.is_train):
            self.add(at, message)
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
        # the value itself, a section around it, or one that an entry for a key in it has made
        made = [] if keys in self.document.lines else [entry for entry in self.forced if entry[: len(keys)] == keys]
        for entry in [*(keys[:depth] for depth in range(len(keys), 0, -1)), *(made if keys else [])]:
            if entry in self.forced:
                where, order = self.forced[entry], FORCED_LAST
                break
        else:
            where, order = self.document.where(keys), self.document.line(keys)
        shown = f'{join_keys(keys)}: ' if keys else ''
        problem = (order, f'{where}: {shown}{message}')
        if problem not in self.problems:  # of several groups of scale factors, say
            self.problems.append(problem)

    def section(self, data: dict, keys: Resolved, at: KeyPath) -> None:
        """Check the keys of one section."""
        for name in list(data):
            if name in keys.table:
                self.value(data, name, keys.table[name], (*at, name))
            elif (*at, name) in REFUSED:
                self.add((*at, name), REFUSED[(*at, name)])
            elif name in keys.elsewhere:
                self.add((*at, name), f"unknown key; '{keys.elsewhere[name]}' has it, '{data['type']}' has not.")
            elif not keys.open:
                known = [key for key in keys.table if key not in data]
                hint = did_you_mean(name, known) or (f' Allowed here: {", ".join(sorted(known))}.' if known else '')
                self.add((*at, name), f'unknown key.{hint}')
        for name, key in keys.table.items():
            if name in data:
                continue
            if key.required:
                about = f' ({key.about})' if key.about else ''
                self.add(at, f"the key '{name}' is missing{about}.{allowed(key.kind, name)}")
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
        elif isinstance(key.kind, Named):
            item = Key(key.kind.item, '')
            for entry in list(value):
                if value[entry] is None and (*at, entry) in self.forced:
                    del value[entry]  # --force_yml datasets:val_2=none
                else:
                    self.value(value, entry, item, (*at, entry))
        elif isinstance(key.kind, (Section, Typed)):
            self.section(value, section_keys(key.kind, value, name), at)
        else:
            data[name] = key.kind.convert(value)

    def model_type(self, name: Any) -> None:
        """The model must be registered."""
        if isinstance(name, str) and name.strip() and registered('MODEL', name) is None:
            known = list(registry('MODEL').keys())
            self.add(
                ('model_type',),
                f'must be the name of a registered model: {", ".join(known)}; got {name!r}.{did_you_mean(name, known)}',
            )


def leave_out_validation(data: dict) -> None:
    """Without `val` nothing is validated: the folders of such datasets need not be there."""
    datasets = data.get('datasets')
    if isinstance(datasets, dict):
        for phase in [phase for phase in datasets if isinstance(phase, str) and phase.split('_')[0] == 'val']:
            del datasets[phase]


def allowed(kind: Kind, name: str) -> str:
    """The names that a missing key could have, as a sentence; nothing where any value would do."""
    if isinstance(kind, Typed):
        return allowed(section_keys(kind, {}, name).table['type'].kind, name).replace('It', 'Its `type`', 1)
    return f' It must be {kind.words()}.' if isinstance(kind, Choice) else ''


def known_keys(data: dict, keys: tuple[str, ...], is_train: bool) -> Resolved:
    """The keys allowed in the section at `keys`; for `--force_yml`."""
    resolved, value = root_keys(data, is_train), data
    for place, name in enumerate(keys):
        value = value.get(name) if isinstance(value, dict) else None
        value = value if isinstance(value, dict) else {}
        kind: Kind = resolved.table[name].kind if name in resolved.table else Kind()
        if isinstance(kind, Named):
            resolved = Resolved({entry: Key(kind.item, '') for entry in value}, item=Key(kind.item, ''))
        else:
            resolved = section_keys(kind, value, keys[place])
    return resolved
