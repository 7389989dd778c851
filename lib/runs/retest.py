"""Whether a model that a run saved comes back as it was."""

from __future__ import annotations

from typing import Any

from .collect import model_of
from .store import Record, Store


def restored_row(record: Record, where: Store | None = None) -> dict[str, Any]:
    """Builds the model of a finished run from its saved weights and tests it again, on the CPU.

    Returns a row of a table: stored parameters in millions, the percentage of test images on which
    it predicts what the record says, and their number. The run is computed if its weights are not
    there; see `model_of`.
    """
    from ..inputs.splits import load_splits
    from ..measure.cost import count
    from ..training.evaluate import evaluate

    model, test = model_of(record.spec, where), load_splits(record.spec.data).test
    predictions = evaluate(model, test, record.spec.but(device="cpu")).predictions.numpy()
    return {
        "parameters (M)": count(model, record.spec.data.image_size).params_stored / 1e6,
        "equal predictions (%)": 100 * float((predictions == record.arrays["test_pred"]).mean()),
        "images": len(predictions),
    }
