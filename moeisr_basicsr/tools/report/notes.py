"""What a reader must know of the figures: those given twice, and those that must not be compared."""

from .runs import BICUBIC, Run, group_by

SAME = 1e-6  # bicubic's figures on the same images differ by rounding at most


def without_duplicates(runs: list[Run], notes: list[str]) -> list[Run]:
    """The first run of each entry, seed and column."""
    groups = group_by(runs, lambda run: (run.entry, run.seed, run.column)).values()
    for first, *others in groups:
        notes += [
            f'{first.entry.label()} on {first.column.dataset} {first.column.label} is in {first.source.path} and again '
            f'in {run.source.path}, with {"the same" if run.metrics == first.metrics else "other"} figures; the first '
            'one counts.'
            for run in others
        ]
    return [group[0] for group in groups]


def comparability(runs: list[Run]) -> list[str]:
    """Notes on figures that look alike and must not be compared, and on images that cannot be the same."""
    notes = []
    for dataset, of_dataset in group_by(runs, lambda run: run.column.dataset).items():
        metrics = dict.fromkeys(metric for run in of_dataset for metric in run.metrics)
        for name, protocols in group_by(metrics, lambda metric: metric.name).items():
            if len(protocols) > 1:
                told = '; '.join(metric.protocol for metric in protocols)
                notes.append(
                    f'{name} on {dataset} was measured under {len(protocols)} protocols ({told}): separate tables.'
                )
        for label, of_scale in group_by(of_dataset, lambda run: run.column.label).items():
            columns = group_by(of_scale, lambda run: run.column)
            where = f'{dataset} {label}'
            if len(columns) > 1:
                notes.append(f'{where} was measured on different LR images or test images: separate columns.')
            for metric in metrics:
                for alike in columns.values():
                    values = [value for run in alike if (value := run.bicubic.get(metric)) is not None]
                    if values and max(values) - min(values) > SAME:
                        notes.append(
                            f'{BICUBIC}_{metric.name} on {where} differs between the files, from {min(values):.4f} to '
                            f'{max(values):.4f}: their images are not the same.'
                        )
    return notes
