"""The models that come with the package: `weights/NAME.safetensors`, each with its model card `weights/NAME.md`.

The folder is the list, and what there is to know of a model stands in its file's metadata. Only which one is the
default is said here.
"""

from pathlib import Path

from moeisr_basicsr.checkpoint import read_model
from moeisr_basicsr.errors import UserError, did_you_mean

FOLDER = Path(__file__).with_name('weights')
DEFAULT = 'moeisr_edsr_light'  # what `basicsr upscale` runs without --model


def names() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(path.stem for path in FOLDER.glob('*.safetensors'))


def find_model(model: str | None) -> Path:
    """The model file that `--model` means: a shipped model's name, or a path; None is the default model.

    A name that is also a file in the current folder is an error rather than a guess: './NAME' is the file.

    Raises:
        UserError: There is no such model, the word means two things, or a shipped file is damaged.
    """
    known = names()
    if model is None:
        return shipped_file(default())
    path = Path(model)
    if model in known:
        if path.is_file():
            raise UserError(
                f"'{model}' is a model that comes with the package and a file in the current folder. Write "
                f'./{model} for the file; for the other, the path that `basicsr models {model} --path` '
                'prints.'
            )
        return shipped_file(model)
    if not path.is_file():
        shipped = f'; the models that come with the package are {", ".join(known)}' if known else ''
        raise UserError(f'there is no model file {model}{shipped}.{did_you_mean(path.stem, known)}')
    return path


def default() -> str:
    """The name of the default model.

    Raises:
        UserError: It does not come with this installation.
    """
    known = names()
    if DEFAULT in known:
        return DEFAULT
    others = f' or one of {", ".join(known)}' if known else ''
    raise UserError(
        'no default model comes with this installation; name a model file: --model FILE.safetensors'
        f'{others}. `basicsr convert` makes a model file of a checkpoint.'
    )


def shipped_file(name: str) -> Path:
    """The file of a shipped model.

    Raises:
        UserError: There is no such model, or its file is damaged.
    """
    known = names()
    if name not in known:
        there_are = f'there are {", ".join(known)}' if known else 'there are none in this installation'
        raise UserError(f"no model '{name}' comes with the package; {there_are}.{did_you_mean(name, known)}")
    path = FOLDER / f'{name}.safetensors'
    try:
        read_model(path)  # milliseconds: all of them together are small
    except UserError as error:
        raise UserError(
            f"the model '{name}' that comes with the package cannot be used: {error} Install moeisr_basicsr again."
        ) from error
    return path


def card(path: Path) -> str | None:
    """The model card beside a model file; None where there is none."""
    place = path.with_suffix('.md')
    return place.read_text(encoding='utf-8') if place.is_file() else None
