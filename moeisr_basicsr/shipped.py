"""The models that come with the package: `weights/NAME.safetensors`, each with its model card `weights/NAME.md`.

The folder is the list, and what there is to know of a model stands in its file's metadata. Only which one is the
default is said here.
"""

from pathlib import Path

from moeisr_basicsr.errors import UserError, did_you_mean

FOLDER = Path(__file__).with_name('weights')
DEFAULT = 'moeisr_edsr_light'  # what `basicsr upscale` runs without --model


def shipped_file(name: str) -> Path:
    """The file of a shipped model."""
    return FOLDER / f'{name}.safetensors'


def names() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(path.stem for path in FOLDER.glob('*.safetensors'))


def find_model(model: str | None) -> Path:
    """The model file that `--model` means: a shipped model's name, or a path; None is the default model.

    A name that is also a file in the current folder is an error rather than a guess: './NAME' is the file.

    Raises:
        UserError: There is no such model, or the word means two things.
    """
    known = names()
    if model is None:
        if DEFAULT not in known:
            raise UserError('no default model comes with this installation; name a model file by --model.')
        return shipped_file(DEFAULT)
    path = Path(model)
    if model in known:
        if path.is_file():
            raise UserError(
                f"'{model}' is a model that comes with the package and a file in the current folder. Write ./{model} "
                f'for the file; for the other, the path that `basicsr models {model} --path` prints.'
            )
        return shipped_file(model)
    if not path.is_file():
        with_it = ', '.join(known) or 'no model'
        raise UserError(
            f'there is no model file {model}. The package comes with {with_it}.{did_you_mean(path.stem, known)}'
        )
    return path
