"""What a run is: frozen, validated, hashable descriptions. Nothing here imports torch.

A `RunSpec` says everything that decides a result: data, backbone, MoE layers, steps, training,
seed, dtype and threads. Its `id` names the record that the run leaves. Two rules keep old records
valid while the project grows:

- fields at their default value stay out of the hash, so a new field whose default means "as before"
  changes no id;
- each class carries a `semantics` number that is always hashed; it is raised when a change to the
  code would alter results.

Axis letters, here and in all of `lib`: **B** images, **N** tokens of an image, **T** = B*N, **D**
width, **H** expert hidden width, **E** experts, **K** experts per token.
"""

from .backbone import BackboneSpec
from .base import Positive, Share, Spec, sentence
from .channels import ChannelSpec
from .data import PACKAGED, TITLES, DataSpec, class_groups
from .extraction import CalibrationSpec, ClusterSpec, CorrectionSpec, ExtractSpec, NeuronSpec
from .moe import ROUTERS, MoESpec, RouterWord
from .pruning import DropSpec, PruneSpec
from .run import RunSpec
from .training import MaskSpec, TrainSpec

__all__ = [
    "PACKAGED",
    "ROUTERS",
    "TITLES",
    "BackboneSpec",
    "CalibrationSpec",
    "ChannelSpec",
    "ClusterSpec",
    "CorrectionSpec",
    "DataSpec",
    "DropSpec",
    "ExtractSpec",
    "MaskSpec",
    "MoESpec",
    "NeuronSpec",
    "Positive",
    "PruneSpec",
    "RouterWord",
    "RunSpec",
    "Share",
    "Spec",
    "TrainSpec",
    "class_groups",
    "sentence",
]
