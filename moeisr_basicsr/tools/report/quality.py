"""The tables of PSNR, SSIM and other metrics: a row per model and control, a column per scale."""

from typing import NamedTuple

from .runs import BICUBIC, Column, Measured, Metric, Report, Value

MISSING = '–'


class Cell(NamedTuple):
    """A figure, and its difference to the baseline's."""

    text: str = MISSING
    difference: str = MISSING
    is_best: bool = False


class QualityTable(NamedTuple):
    """One metric of one dataset under one protocol."""

    metric: Metric
    columns: list[Column]
    rows: dict[str, list[Cell]]  # label -> a cell per column
    files: dict[str, list[int]]  # label -> their numbers

    @property
    def shared_setting(self) -> str | None:
        """LR images and test images, where they are those of all columns."""
        settings = {column.setting for column in self.columns}
        return settings.pop() if len(settings) == 1 else None


def quality_tables(report: Report, baseline: str) -> list[QualityTable]:
    """Every metric of every dataset, under each protocol its own table."""
    tables = []
    for columns in report.datasets().values():
        measured = [one for entries in columns.values() for one in entries]
        for metric in dict.fromkeys(metric for one in measured for run in one.runs for metric in run.metrics):
            having = [one for one in measured if any(metric in run.metrics for run in one.runs)]
            tables.append(quality_table(report, having, metric, baseline))
    return tables


def quality_table(report: Report, measured: list[Measured], metric: Metric, baseline: str) -> QualityTable:
    """Bicubic interpolation, then the models in order of appearance."""
    values: dict[str, dict[Column, Value | None]] = {label: {} for label in (BICUBIC, *report.labels.values())}
    files: dict[str, set[int]] = {label: set() for label in values}
    for one in measured:
        label = report.labels[one.entry]
        values[label][one.column] = one.metric(metric)
        for run in one.runs:
            files[label].add(run.source.number)
            enlarged = run.bicubic.get(metric)
            if enlarged is not None and one.column not in values[BICUBIC]:  # the same beside whichever model
                values[BICUBIC][one.column] = Value(enlarged, 0.0, 1)
                files[BICUBIC].add(run.source.number)
    columns = list(dict.fromkeys(one.column for one in measured))
    rows: dict[str, list[Cell]] = {label: [] for label, found in values.items() if found}
    for column in columns:
        best = best_text(metric, [values[label].get(column) for label in rows if label != BICUBIC])
        for label, cells in rows.items():
            cell = make_cell(values[label].get(column), values[baseline].get(column), metric.decimals)
            if label == baseline and cell.text != MISSING:
                cell = cell._replace(difference='base')
            is_best = label != BICUBIC and cell.text.partition(' ')[0] == best
            cells.append(cell._replace(is_best=is_best))
    return QualityTable(metric, columns, rows, {label: sorted(files[label]) for label in rows})


def best_text(metric: Metric, values: list[Value | None]) -> str | None:
    """The highest value as printed: equal ones are all the best. None where nothing is known of what is better."""
    known = [value.mean for value in values if value is not None]
    if len(known) < 2 or not (metric.is_psnr or 'ssim' in metric.name.lower()):
        return None
    return f'{max(known):.{metric.decimals}f}'


def make_cell(value: Value | None, base: Value | None, decimals: int) -> Cell:
    """The mean, with half the range of several seeds, and the distance to the baseline."""
    if value is None:
        return Cell()
    spread = f' ± {value.half_range:.{decimals}f} ({value.seeds})' if value.seeds > 1 else ''
    text = f'{value.mean:.{decimals}f}{spread}'
    if base is None:
        return Cell(text)
    return Cell(text, f'{round(value.mean - base.mean, decimals) + 0.0:+.{decimals}f}')  # + 0.0: no negative zero
