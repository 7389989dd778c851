"""Says which data sets and weights are on this machine, without opening or downloading any."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .. import paths
from ..spec import PACKAGED
from .published import DATA_SETS


@dataclass(frozen=True)
class Missing:
    """Holds something that runs need and that is not here: what, where it was looked for, and what
    to do."""

    what: str
    looked: str
    get: str

    def __str__(self) -> str:
        return f"{self.what}: not here ({self.looked}). To get it: {self.get}"


def missing_data(name: str) -> Missing | None:
    """Tells whether a data set is absent. name: as in `DataSpec`.

    Files inside a folder are not looked at. Raises FileNotFoundError where MOE_DATA is no folder.
    """
    from . import packed

    home = paths.data_home()
    places = [] if home is None else [home / name, packed.file_of(home, name)]
    if name == PACKAGED or any(place.exists() for place in places):
        return None
    if name.startswith("hub:"):
        return Missing(f"data set {name}", "copies of the hub are not listed", "network, once")
    known = DATA_SETS.get(name)
    looked = f"looked in {home / name}" if home else "MOE_DATA is not set"
    get = known.get if known else f"put it into MOE_DATA/{name} (page on own data)"
    return Missing(f"data set {name}", looked, get)


def missing_weights(name: str | None, architecture: str) -> Missing | None:
    """Tells whether weights are absent. Arguments as of `weights.fetch`; None = random ones.

    No checksum is computed: the run does that.
    """
    from . import weights

    if name is None:
        return None
    home = os.environ.get("MOE_WEIGHTS")
    folder = Path(home).expanduser().absolute() if home else None
    places = [] if folder is None else [weights.packed_file(folder, name, architecture)]
    what, get = f"weights {name} of {architecture}", "network at the first run"
    if name == "timm":
        places += _hub_files(architecture)
    elif name == weights.SALIENCY:
        places.append(paths.cache() / "weights" / f"{name}.safetensors")
    else:
        file = name.partition(":")[2].partition("@")[0]
        places += [] if folder is None else [folder / file]
        get = f"put {file} into the folder that MOE_WEIGHTS names"
    if any(place.is_file() for place in places):
        return None
    looked = "looked for " + ", ".join(map(str, places)) if places else "MOE_WEIGHTS is not set"
    return Missing(what, looked, get)


def _hub_files(architecture: str) -> list[Path]:
    """Lists where the clients of timm's hubs keep the weights of an architecture on this machine.

    One path names what is there or, with a star, what would be.
    """
    import timm
    import torch
    from huggingface_hub import constants, try_to_load_from_cache

    config = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    if config is None:
        return []
    if config.hf_hub_id:
        for file in ("model.safetensors", "pytorch_model.bin"):
            cached = try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(cached, str):
                return [Path(cached)]
        folder = "models--" + config.hf_hub_id.replace("/", "--")
        return [Path(constants.HF_HUB_CACHE) / folder / "snapshots" / "*" / "model.safetensors"]
    file = (config.url or "").rpartition("/")[2]
    return [Path(torch.hub.get_dir()) / "checkpoints" / file] if file else []
