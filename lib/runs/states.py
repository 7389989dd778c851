"""The weights that runs leave for those that start from them: a file a run, with the SHA-256 of its
content.

Files that older versions wrote carry none. Their weights are taken as they are; the child's record
says in `weights.parent_differs` whether they are those of the parent's record.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .. import paths
from ..spec import RunSpec

if TYPE_CHECKING:  # torch is not needed before a run is computed
    from torch import Tensor, nn

SHA256 = "sha256"  # its name among the metadata of the file


class DamagedWeights(RuntimeError):
    """Weights that a run starts from were damaged; they are set aside and can be computed again."""


def file_of(spec: RunSpec, states: Path) -> Path:
    """Names the file of a run's final weights in the folder of them."""
    return states / f"{spec.id}.safetensors"


def save(model: nn.Module, spec: RunSpec, states: Path, sha256: str) -> None:
    """Writes the final weights of a run. sha256: of `model`'s state dict, as in its record."""
    from safetensors.torch import save_file

    file, state = file_of(spec, states), model.state_dict()
    if file.is_dir():
        why = f"{file} is a folder where the weights of run {spec.id} belong"
        paths.set_aside([file], states.parent / "damaged", why, "they are written there")
    with paths.written_whole(file) as part:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        save_file(tensors, part, metadata={SHA256: sha256})


def read(spec: RunSpec, states: Path) -> tuple[dict[str, Tensor], str]:
    """Reads and verifies the final weights that a run left; returns them with their SHA-256.

    Raises FileNotFoundError if it left none, and DamagedWeights, once they are set aside, if they
    are not as they were saved.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..inputs.weights import sha256_state

    file = file_of(spec, states)
    if not file.is_file():
        raise FileNotFoundError(
            f"the run it starts from, {spec.id}, left no weights here: compute it first; if it has "
            "a record, that says why, and once it is moved away the run is computed again"
        )
    try:
        saved, state = _sha256_of(file), load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        fault = f"cannot be read ({error})"
    else:
        sha256 = sha256_state(state)
        if saved in (None, sha256):
            return state, sha256
        fault = "do not match the SHA-256 that they were saved with"
    why = f"the weights {file.name} of run {spec.id} {fault}"
    paths.set_aside([file], states.parent / "damaged", why, "the run will be computed again")
    raise DamagedWeights(f"{why}: they were set aside, start again to have them computed")


def lacks_sha256(file: Path) -> bool:
    """Tells whether an older version wrote the weights, without their SHA-256."""
    from safetensors import SafetensorError

    try:
        return _sha256_of(file) is None
    except (SafetensorError, OSError):  # who reads them will say what is wrong
        return False


def _sha256_of(file: Path) -> str | None:
    """Reads the SHA-256 that weights were saved with; None where there is none."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get(SHA256)
